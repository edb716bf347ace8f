"""A system's adapter trained and measured on a real log, as a user does it: `raypipe ingest`, `lm`, `train`, `align`.

The language model and the recommender never see the users who are asked about. The workspace is kept, so that a run that
was interrupted goes on from its last checkpoint when the command is given again, and what is shared is trained once. With
`--golden` the figures take their place in `tests/golden/alignment-<dataset>.json`: the system's under its name, those of
controls, probes and baselines as models of their own, and the recommender in a column beside them. Every row of a sweep is one
such command:

    a task left out       --system recexplainer --label 'without T2' -- --recexplainer.tasks '["T1","T3","T4","T6"]'
    other prompts         --recipe terse
    hidden width          --width 16
    size of the LM        --lm large
    another's adapter     --model gru4rec --adapter_of sasrec
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.recommenders import MODELS, ROOT, log_options, merge, run

SHARE = "0.1"
# Places a user that probes learn from: with all of them they take longer than the adapter, and tell no more.
PROBED = "50"
SYSTEMS = ("recinterpreter", "recexplainer")
SIZES = ("small", "base", "large")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", choices=("ml-100k", "ml-1m", "amazon-industrial"))
    parser.add_argument("--system", default="recinterpreter", choices=SYSTEMS)
    parser.add_argument("--recipe", default="", help="of the system: jobs/align/SYSTEM-DATASET-RECIPE.yaml")
    parser.add_argument("--model", default="sasrec", choices=MODELS, help="the recommender")
    parser.add_argument("--width", type=int, help="of its states, where not the recipe's")
    parser.add_argument("--lm", default="small", choices=SIZES, help="size of the built-in language model")
    parser.add_argument("--adapter_of", choices=MODELS, help="measure the adapter trained beside this recommender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="behind the system's name in the table")
    parser.add_argument("--workspace", default=str(ROOT / "build/align"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe align`, after --")
    given = parser.parse_args(argv)
    workspace = ["--workspace", f"{given.workspace}/{given.dataset}", "--tracking", "off"]
    share = ["--held_out_share", SHARE]
    run("ingest", *workspace, *log_options(given.dataset))
    learnt = ["--data.model.size", given.lm, "--data.instructions.catalogue_repeats", "20", "--trainer.workers", "1"]
    lm = run("lm", *workspace, *share, *learnt)["models"]["lm"]
    system = ROOT / f"jobs/align/{given.system}-{given.dataset}{f'-{given.recipe}' if given.recipe else ''}.yaml"
    words = ["--config", str(system), *workspace, *share, "--lm", f"builtin/{lm}", "--trainer.seed", str(given.seed)]

    def aligned(recommender: str, *more: str) -> dict[str, Any]:
        recipe = str(ROOT / f"jobs/train/{recommender}-{given.dataset}.yaml")
        width = ["--recommender.width", str(given.width)] if given.width else []
        seed = ["--trainer.seed", str(given.seed)]
        trained = run("train", "--config", recipe, *workspace, *share, *width, *seed)["models"][recommender]
        return run("align", *words, "--model", f"{recommender}/{trained}", *more, *given.options)

    ((name, content),) = aligned(given.adapter_of or given.model)["models"].items()
    result = aligned(given.model, "--adapter", f"{name}/{content}", "--beside", "--positions", PROBED)
    rows = rows_of(result, given, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    if given.golden:
        merge(ROOT / f"tests/golden/alignment-{given.dataset}.json", rows)
    figures = {f"{row['model']} {row['metric']}": row["value"] for row in rows}
    print(json.dumps({"bench": "alignment", "figures": figures, "machine": rows[0]["machine"]}))


def rows_of(result: Mapping[str, Any], given: argparse.Namespace, machine: str) -> list[dict[str, Any]]:
    """The golden table's rows of what `align` ended with: `RecInterpreter`, `RecExplainer-H`, then what tells them apart."""
    (name,) = result["models"]
    system, _, variant = name.partition("-")
    model = {"recinterpreter": "RecInterpreter", "recexplainer": f"RecExplainer-{variant.upper()}"}[system]
    apart = [
        given.recipe,
        f"{given.lm} LM" if given.lm != SIZES[0] else "",
        f"trained on {given.adapter_of}" if given.adapter_of else "",
        given.label,
    ]
    model = " ".join([model, *filter(None, apart)])
    metrics = result["metrics"]
    shared = {
        "dataset": given.dataset,
        "recommender": f"{given.model}-{given.width}" if given.width else given.model,
        "seed": given.seed,
        "protocol": f"leave-one-out, users held out from every training, {metrics['asked']} of them asked",
        "machine": machine,
        "command": f"make bench NAME=alignment ARGS={shlex.quote(shlex.join(_words(given)))}",
    }
    return [{**shared, **row(model, metric, value)} for metric, value in metrics.items() if is_figure(metric)]


def _words(given: argparse.Namespace) -> list[str]:
    """The command line that is given again."""
    named = ("dataset", "system", "recipe", "model", "width", "lm", "adapter_of", "seed", "label")
    values = {name: getattr(given, name) for name in named}
    words = [word for name, value in values.items() if value not in ("", None) for word in (f"--{name}", str(value))]
    return [*words, "--golden", *(["--", *given.options] if given.options else [])]


def is_figure(metric: str) -> bool:
    """Not what tells of the training."""
    return metric.rsplit(": ", 1)[-1].split(" ")[0] in {
        *("recovery", "residual", "oracle", "order", "valid", "rouge_l"),
        *("T1", "T2", "T3", "T6"),
    }


def row(model: str, metric: str, value: float) -> dict[str, Any]:
    """A control's figure belongs to a model that has its name."""
    *control, metric = metric.split(": ")
    return {"model": ", ".join([model, *control]), "metric": metric, "value": value}


if __name__ == "__main__":
    main()
