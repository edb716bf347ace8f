"""LLM-TRSR on a real log, as a user does it: `raypipe ingest`, `lm`, `train`, `summarize`, `align --system trsr`.

Every user with three events or more is asked for the last one among 21 candidates, which nothing that is trained or counted has
seen. The workspace is kept, so that a run that was interrupted goes on where it stopped when the command is given again, and what
is shared is made once. With `--golden` the figures take their place in `tests/golden/trsr-<dataset>.json`: the system's, of its
controls and of what ranks the same candidates without a language model. Every row of a sweep is one such command:

    no summary              --summaries none
    hierarchical            --summaries hierarchical
    recent items            --label 'recent 1' -- --trsr.recent 1
    whole history shown     --label 'whole history' -- --trsr.recent null
    as the paper, no facts  --label 'no facts' -- --trsr.no-facts
    all weights             --label full -- --trsr.full --trsr.lora null
    blocks of ten           --block_items 10
    disturbed summaries     --label 'half missing' -- --trsr.missing .5
    history length          --label 'history 100' -- --trsr.history 100
    a lesser SASRec beside  --dataset ml-1m --sasrec short

With `--paired` the same is trained without summaries first: how far summaries rank better than none, user by user.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tests.benchmarks.recommenders import ROOT, log_options, merge, run

SYSTEM = "LLM-TRSR"
PARADIGMS = ("recurrent", "hierarchical", "none")
SIZES = ("tiny", "small", "base", "large")
_PUBLISHED_AT = (3, 5, 10)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-industrial", choices=("ml-100k", "ml-1m", "amazon-industrial"))
    parser.add_argument("--summaries", default="recurrent", choices=PARADIGMS)
    parser.add_argument("--block_items", type=int, default=5, help="of the blocks that summaries are written of")
    parser.add_argument("--lm", default="small", choices=SIZES, help="size of the built-in language model")
    parser.add_argument("--lm_steps", type=int, default=2_500, help="of its training")
    parser.add_argument(
        "--sasrec", default="", help="recipe of the one beside it: jobs/train/sasrec-DATASET-RECIPE.yaml"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="behind the system's name in the table")
    parser.add_argument("--paired", action="store_true", help="compare with the same without summaries, user by user")
    parser.add_argument("--workspace", default=str(ROOT / "build/trsr"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe align`, after --")
    given = parser.parse_args(argv)
    workspace = ["--workspace", f"{given.workspace}/{given.dataset}", "--tracking", "off"]
    run("ingest", *workspace, *log_options(given.dataset))
    learnt = ["--data.model.size", given.lm, "--data.instructions.catalogue_repeats", "20", "--trainer.workers", "1"]
    lm = run("lm", *workspace, *learnt, "--trainer.steps", str(given.lm_steps))["models"]["lm"]
    recipe = ROOT / f"jobs/train/{'-'.join(filter(None, ('sasrec', given.dataset, given.sasrec)))}.yaml"
    sasrec = run("train", "--config", str(recipe), *workspace, "--trainer.seed", str(given.seed))["models"]["sasrec"]
    words = ["--config", str(ROOT / f"jobs/align/trsr-{given.dataset}.yaml"), *workspace]
    words += ["--lm", f"builtin/{lm}", "--model", f"sasrec/{sasrec}", "--trainer.seed", str(given.seed)]
    shown = ["--summaries", *summarised(given, workspace)]
    if given.paired:
        none = run("align", *words, "--summaries", "null", *given.options)["models"]["trsr"]
        shown += ["--trsr.against", f"trsr/{none}"]
    result = run("align", *words, *shown, *given.options)
    rows = rows_of(result, given, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    if given.golden:
        merge(ROOT / f"tests/golden/trsr-{given.dataset}.json", rows)
    figures = {f"{row['model']} {row['metric']}": row["value"] for row in rows}
    print(json.dumps({"bench": "trsr", "models": result["models"], "figures": figures, "machine": rows[0]["machine"]}))


def summarised(given: argparse.Namespace, workspace: Sequence[str]) -> list[str]:
    """Writes the summaries that are shown and returns the words that name them."""
    if given.summaries == "none":
        return ["null"]
    blocks = ["--summaries.paradigm", given.summaries, "--summaries.block_items", str(given.block_items)]
    # Of what is asked about and of each event that is learnt: what a history shorter than a block is, no block tells.
    for cut in range(1, recipe_of(given)["positions"] + 2):
        run("summarize", *workspace, *blocks, "--summaries.hold_out", str(cut))
    return [given.summaries, "--trsr.block_items", str(given.block_items)]


def recipe_of(given: argparse.Namespace) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / f"jobs/align/trsr-{given.dataset}.yaml").read_text()))


def rows_of(result: Mapping[str, Any], given: argparse.Namespace, machine: str) -> list[dict[str, Any]]:
    """The golden table's rows: `LLM-TRSR` where it is the system itself, its switches and controls behind it, and others under
    their own names."""
    metrics = result["metrics"]
    apart = [
        {"recurrent": "", "none": "no summary"}.get(given.summaries, given.summaries),
        f"blocks of {given.block_items}" if given.block_items != 5 else "",
        f"{given.lm} LM" if given.lm != "small" else "",
        given.label,
    ]
    model = " ".join([SYSTEM, *filter(None, apart)])
    named = given.options.index("--trsr.history") + 1 if "--trsr.history" in given.options else None
    history = recipe_of(given)["trsr"]["history"] if named is None else given.options[named]
    shared = {
        "dataset": given.dataset,
        "seed": given.seed,
        "protocol": f"leave-one-out, 21 candidates, last {history} events shown, {metrics['asked']} users",
        "machine": machine,
        "command": f"make bench NAME=trsr ARGS={shlex.quote(shlex.join(_words(given)))}",
    }
    rows = [{**shared, **row(model, metric, value)} for metric, value in metrics.items() if is_figure(metric)]
    for told in rows:
        if told["model"] == "sasrec":
            told["model"] = " ".join(filter(None, ("sasrec", given.sasrec)))
    read = {"recurrent": "all before", "hierarchical": "the last 50"}.get(given.summaries)
    for told in rows if read is not None else []:
        # What ranks without a language model reads no summary.
        if told["model"].startswith(SYSTEM):
            told["protocol"] += f", summaries of {read}"
    return rows


def row(model: str, metric: str, value: float) -> dict[str, Any]:
    """What a control tells belongs to a model that has its name, and of what ranks without a language model to its own."""
    name, _, figure = metric.rpartition(": ")
    if name.startswith("above "):
        return {"model": model, "metric": f"above no summary: {figure}", "value": value}
    if "summaries" in name:
        return {"model": f"{model}, {name}", "metric": figure, "value": value}
    return {"model": name or model, "metric": figure, "value": value}


def is_figure(metric: str) -> bool:
    """Not what tells of the training alone."""
    figure = metric.rpartition(": ")[2].split(" ")[0]
    ranks = {f"{name}@{k}" for name in ("Recall", "MRR") for k in _PUBLISHED_AT}
    return figure in ranks | {"seconds", "tokens_asked", "train_seconds", "tokens", "refused"} or metric.startswith(
        "summary_"
    )


def _words(given: argparse.Namespace) -> list[str]:
    """The command line that is given again."""
    named = ("dataset", "summaries", "block_items", "lm", "lm_steps", "sasrec", "seed", "label")
    values = {name: getattr(given, name) for name in named}
    words = [word for name, value in values.items() if value != "" for word in (f"--{name}", str(value))]
    words += ["--paired"] if given.paired else []
    return [*words, "--golden", *(["--", *given.options] if given.options else [])]


if __name__ == "__main__":
    main()
