"""A recommender trained and measured on a real log, as a user does it: `raypipe ingest`, `train`, `evaluate`.

The workspace is kept, so that a run that was interrupted goes on from its last checkpoint when the command is given
again. With `--golden` the figures of this model and seed take their place in `tests/golden/recommenders-<dataset>.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from raypipe.cli.main import main as raypipe

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
MODELS = ("sasrec", "gru4rec", "bert4rec", "caser", "dreamrec", "mf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="ml-100k", choices=("ml-100k", "ml-1m", "amazon-industrial"))
    parser.add_argument("--model", default="sasrec", choices=MODELS)
    parser.add_argument("--variant", default="", help="of the recipe: jobs/train/MODEL-DATASET-VARIANT.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workspace", default=str(ROOT / "build/recommenders"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe train`, after --")
    given = parser.parse_args()
    workspace = ["--workspace", f"{given.workspace}/{given.dataset}", "--tracking", "off"]
    run("ingest", *workspace, *log_options(given.dataset))
    variant = f"-{given.variant}" if given.variant else ""
    seed = ["--trainer.seed", str(given.seed)]

    def trained(model: str, recipe: str, *options: str) -> str:
        config = ROOT / f"jobs/train/{model}-{given.dataset}{recipe}.yaml"
        return f"{model}/{run('train', '--config', str(config), *workspace, *seed, *options)['models'][model]}"

    # One that starts from SASRec's item vectors has those of the same seed.
    table = ["--recommender.dreamrec.table", trained("sasrec", "")] if given.variant == "warm" else []
    model = trained(given.model, variant, *table, *given.options)
    filtered = given.dataset != "amazon-industrial"  # whose users buy the same item again
    switch = [] if filtered else ["--no-filter_seen"]
    metrics = run("evaluate", *workspace, "--model", model, *switch)["metrics"]
    # Training validates with seen items filtered, whatever is evaluated.
    chosen = (
        "seen items filtered, best validation" if filtered else "seen items kept, best validation with them filtered"
    )
    protocol = f"leave-one-out, whole catalogue, {chosen}"
    options = " -- " + " ".join(given.options) if given.options else ""
    rows = [
        {
            "dataset": given.dataset,
            "model": name.split(".")[0] + (variant if name.startswith(f"{given.model}.") else ""),
            "metric": name.split(".", 1)[1],
            "value": value,
            "seed": given.seed,
            "protocol": protocol,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "command": f"make bench NAME=recommenders ARGS='--dataset {given.dataset} --model {given.model} "
            f"{f'--variant {given.variant} ' if given.variant else ''}"
            f"--seed {given.seed} --golden{options}'",
        }
        for name, value in metrics.items()
        if not name.startswith("published.")  # measured by others
    ]
    if given.golden:
        merge(ROOT / f"tests/golden/recommenders-{given.dataset}.json", rows)
    figures = {name: metrics[name] for name in metrics if name.endswith(("HR@10", "NDCG@10"))}
    print(json.dumps({"bench": "recommenders", "figures": figures, "machine": rows[0]["machine"]}))


def log_options(dataset: str) -> list[str]:
    folder = SHARED / dataset
    if dataset == "ml-100k":
        return ["--log.path", str(folder), "--log.format", "movielens"]
    order = ["--log.columns.user", "user_id", "--log.columns.item", "item_id", "--log.columns.order", "pos"]
    return [
        *("--log.path", str(folder / "interactions.csv.gz"), *order),
        *("--catalogue.path", str(folder / "items.csv.gz"), "--catalogue.columns.item", "item_id"),
    ]


def run(*words: str) -> dict[str, Any]:
    """One job; its JSON result. Ends this process with the job's exit code where that is not 0."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = raypipe(list(words))
    if code:
        sys.exit(code)
    return dict(json.loads(output.getvalue().strip().splitlines()[-1]))


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put `rows` in the place of those of the same models, beside the same recommenders where they have one, seed and protocol.

    Old rows of a model's controls and probes, `MODEL, CONTROL`, go with it where another command trained what they were read of.
    """

    def key(row: dict[str, Any]) -> tuple[str, str, int, str]:
        return row["model"], row.get("recommender", ""), row["seed"], row["protocol"]

    def trained_by(row: dict[str, Any]) -> str:
        return str(row["command"]).replace(" --no-beside", "")

    old = json.loads(path.read_text()) if path.exists() else []
    named = {key(row): trained_by(row) for row in rows}

    def stands(row: dict[str, Any]) -> bool:
        of = named.get((row["model"].partition(", ")[0], *key(row)[1:]))
        return key(row) not in named and of in (None, trained_by(row))

    kept = [row for row in old if stands(row)]
    path.write_text(json.dumps(sorted([*kept, *rows], key=key), indent=1) + "\n")


if __name__ == "__main__":
    main()
