"""A system's adapter trained and measured on a real log, as a user does it: `raypipe ingest`, `lm`, `train`, `align`.

The language model and the recommender never see the users who are asked about. The workspace is kept, so that a run that
was interrupted goes on from its last checkpoint when the command is given again, and the two are trained once. With
`--golden` the figures take their place in `tests/golden/alignment-<dataset>.json`, controls as models of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

from tests.benchmarks.recommenders import MODELS, ROOT, log_options, merge, run

SHARE = "0.1"
NAMES = {"recinterpreter": "RecInterpreter", "recexplainer": "RecExplainer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="ml-100k", choices=("ml-100k", "ml-1m", "amazon-industrial"))
    parser.add_argument("--system", default="recinterpreter", choices=tuple(NAMES))
    parser.add_argument("--model", default="sasrec", choices=MODELS, help="the recommender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="behind the system's name in the table")
    parser.add_argument("--workspace", default=str(ROOT / "build/align"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe align`, after --")
    given = parser.parse_args()
    workspace = ["--workspace", f"{given.workspace}/{given.dataset}", "--tracking", "off"]
    share = ["--held_out_share", SHARE]
    run("ingest", *workspace, *log_options(given.dataset))
    run("lm", *workspace, *share, "--data.instructions.catalogue_repeats", "20", "--trainer.workers", "1")
    recommender = ROOT / f"jobs/train/{given.model}-{given.dataset}.yaml"
    trained = run("train", "--config", str(recommender), *workspace, *share)
    system = ROOT / f"jobs/align/{given.system}-{given.dataset}.yaml"
    model = f"{given.model}/{trained['models'][given.model]}"
    words = [*workspace, *share, "--model", model, "--trainer.seed", str(given.seed), *given.options]
    metrics = run("align", "--config", str(system), *words)["metrics"]
    options = " -- " + " ".join(given.options) if given.options else ""
    label = f" {given.label}" if given.label else ""
    name = f"{NAMES[given.system]}{label} of {given.model}"
    shared = {
        "dataset": given.dataset,
        "seed": given.seed,
        "protocol": f"leave-one-out, users held out from every training, {metrics['asked']} of them asked",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "command": f"make bench NAME=alignment ARGS='--dataset {given.dataset} --system {given.system} --model {given.model} "
        f"--seed {given.seed}{f' --label {given.label}' if given.label else ''} --golden{options}'",
    }
    rows = [{**shared, **row(name, metric, value)} for metric, value in metrics.items() if is_figure(metric)]
    if given.golden:
        merge(ROOT / f"tests/golden/alignment-{given.dataset}.json", rows)
    figures = {row["model"] + " " + row["metric"]: row["value"] for row in rows}
    print(json.dumps({"bench": "alignment", "figures": figures, "machine": shared["machine"]}))


def is_figure(metric: str) -> bool:
    """Not what tells of the training."""
    return metric.rsplit(": ", 1)[-1].split(" ")[0] in {
        *("recovery", "residual", "oracle", "order", "valid", "rouge_l"),
        *("T1", "T2", "T3", "T6"),
    }


def row(name: str, metric: str, value: float) -> dict[str, Any]:
    """A control's figure belongs to a model that has its name."""
    *control, metric = metric.split(": ")
    return {"model": ", ".join([name, *control]), "metric": metric, "value": value}


if __name__ == "__main__":
    main()
