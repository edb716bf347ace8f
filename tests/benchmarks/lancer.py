"""LANCER trained and measured on a real log, as a user does it: `raypipe ingest`, `lm`, `align --system lancer`.

One run is one ablation and one seed, over the whole catalogue and beside popularity and item transitions of the same training
events. Rows of the sweep:

    ablations             --ablation reasoning, --ablation knowledge, --ablation both: without these prompts
    size of the LM        --lm base
    several frames        --label 'several frames' -- --lancer.prompts.training '[{"lead": "Chosen so far:"}, {"join": " /"}]'
    held to the catalogue --constrained: the stored model asked again, nothing trained
    another data set      --trained_on ml-100k --dataset amazon-industrial: nothing trained there

The workspace is kept, so that a run that was interrupted goes on from its last checkpoint when the command is given again, and
what is shared is trained once. With `--golden` the figures take their place in `tests/golden/lancer-<dataset>.json`: the system's
as `LANCER`, those of ablations, controls, perturbed templates and floors as models of their own. `validation_logprob`, of the line
of the event before the one that is asked for, tells models apart that lists of a thousand users do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.cli.options import parse_config
from raypipe.pipeline.align_options import AlignConfig
from tests.benchmarks.recommenders import ROOT, log_options, merge, run

SETS = ("ml-100k", "ml-1m", "amazon-industrial")
SIZES = ("small", "base", "large")
FLOORS = ("popularity", "transitions")
_ABLATIONS = {
    "": [],
    "reasoning": ["--no-lancer.reasoning"],
    "knowledge": ["--no-lancer.knowledge", "--lancer.first_epochs", "0"],
    "both": ["--no-lancer.reasoning", "--no-lancer.knowledge", "--lancer.first_epochs", "0"],
}
_NAMES = {"reasoning": "no reasoning prompt", "knowledge": "no knowledge prompt", "both": "no prompts"}
_OF_TRAINING = {
    "loss_first",
    "loss_last",
    "steps",
    "train_seconds",
    "items",
    "targets",
    "line_tokens",
    "validation_step",
}
_OF_PROTOCOL = {"asked", "askable"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", choices=SETS)
    parser.add_argument("--ablation", default="", choices=tuple(_ABLATIONS))
    parser.add_argument("--lm", default=SIZES[0], help="size of the built-in language model, or a folder or hub name")
    parser.add_argument("--constrained", action="store_true", help="lines are held to the catalogue's")
    parser.add_argument("--trained_on", default="", choices=("", *SETS), help="another data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="behind the model's name in the table")
    parser.add_argument("--workspace", default=str(ROOT / "build/lancer"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe align`, after --")
    given = parser.parse_args(argv)

    def asked(dataset: str, *more: str) -> dict[str, Any]:
        """What `align` ends with, trained on and asked of this data set unless `more` says otherwise."""
        workspace = ["--workspace", f"{given.workspace}/{dataset}", "--tracking", "off"]
        run("ingest", *workspace, *log_options(dataset))
        words = [*workspace, *recipe(given, dataset)]
        if "--adapter" not in more:
            words += ["--lm", language_model(given.lm, workspace)]
        return run("align", *words, *more)

    home = given.trained_on or given.dataset
    result = asked(home)
    if given.constrained or given.trained_on:
        ((name, content),) = result["models"].items()
        options = ["--adapter", f"{name}/{content}", "--adapter_workspace", f"{given.workspace}/{home}"]
        options += ["--lm", given.lm] if given.lm not in SIZES else []
        result = asked(given.dataset, *options, *(["--lancer.constrained"] if given.constrained else []))
    rows = rows_of(result["metrics"], given, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    if given.golden:
        merge(ROOT / f"tests/golden/lancer-{given.dataset}.json", rows)
    figures = {f"{row['model']} {row['metric']}": row["value"] for row in rows}
    print(json.dumps({"bench": "lancer", "figures": figures, "machine": rows[0]["machine"]}))


def recipe(given: argparse.Namespace, dataset: str) -> list[str]:
    """The options of `raypipe align` by which it is made and asked on this data set."""
    config = ["--config", str(ROOT / f"jobs/align/lancer-{dataset}.yaml"), "--trainer.seed", str(given.seed)]
    return [*config, *_ABLATIONS[given.ablation], *given.options]


def filters_seen(given: argparse.Namespace) -> bool:
    """Whether what a user has seen is left out of the lists: of what was trained elsewhere as there, unless it is told here."""
    read = [
        parse_config("align", AlignConfig, ["--workspace", given.workspace, *recipe(given, dataset)]).lancer
        for dataset in (given.dataset, given.trained_on or given.dataset)
    ]
    return next((one for one in read if "filter_seen" in one.model_fields_set), read[-1]).filter_seen


def language_model(named: str, workspace: Sequence[str]) -> str:
    """The workspace's own of that size, trained first, or the one that is named."""
    if named not in SIZES:
        return named
    learnt = ["--data.model.size", named, "--data.instructions.catalogue_repeats", "40", "--trainer.workers", "1"]
    learnt += ["--data.instructions.block_examples", "2000", "--data.instructions.merge_examples", "1000"]
    learnt += ["--data.instructions.update_examples", "0"]
    return f"builtin/{run('lm', *workspace, '--hold_out', '2', *learnt)['models']['lm']}"


def rows_of(metrics: Mapping[str, float], given: argparse.Namespace, machine: str) -> list[dict[str, Any]]:
    """The golden table's rows; a floor's are nobody's but its own."""
    apart = [
        _NAMES.get(given.ablation, ""),
        f"{given.lm} LM" if given.lm != SIZES[0] else "",
        "constrained" if given.constrained else "",
        f"trained on {given.trained_on}" if given.trained_on else "",
        given.label,
    ]
    name = " ".join(["LANCER", *filter(None, apart)])
    # Of everybody it is what recommenders are asked, and its rows stand in one table with theirs.
    asked = "" if metrics["asked"] == metrics.get("askable") else f", {metrics['asked']:.0f} users asked"
    seen = "filtered" if filters_seen(given) else "kept"
    shared = {
        "dataset": given.dataset,
        "seed": given.seed,
        "protocol": f"leave-one-out, whole catalogue, seen items {seen}, best validation{asked}",
        "machine": machine,
        "command": f"make bench NAME=lancer ARGS={shlex.quote(shlex.join(_words(given)))}",
    }
    rows = []
    for metric, value in metrics.items():
        *control, figure = metric.split(": ")
        if figure in _OF_TRAINING | _OF_PROTOCOL or figure.startswith(("first_", "tokens_", "refused")):
            continue
        model = control[0] if control and control[0] in FLOORS else ", ".join([name, *control])
        rows.append({**shared, "model": model, "metric": figure, "value": value})
    return rows


def _words(given: argparse.Namespace) -> list[str]:
    """The command line that is given again."""
    named = ("dataset", "ablation", "lm", "trained_on", "seed", "label")
    words = [word for name in named if getattr(given, name) != "" for word in (f"--{name}", str(getattr(given, name)))]
    words += ["--constrained"] if given.constrained else []
    return [*words, "--golden", *(["--", *given.options] if given.options else [])]


if __name__ == "__main__":
    main()
