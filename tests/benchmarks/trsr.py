"""LLM-TRSR on a real log, as a user does it: `raypipe ingest`, `lm`, `train`, `summarize`, `align --system trsr`.

Every user with three events or more is asked for the last one among 21 candidates, which nothing that is trained or counted has
seen: SASRec learns all events before it, as everything beside it does, for as many epochs as validate best where one event more is
left out. The workspace is kept, so that a run that was interrupted goes on where it stopped when the command is given again, and
what is shared is made once. With `--golden` the figures take their place in `tests/golden/trsr-<dataset>.json`: the system's, of
its controls and of what ranks the same candidates without a language model. `LLM-TRSR` shows recurrent summaries of all before;
what else is shown or learnt is in the model's name, so that all who rank the same stand in one table. Every row of a sweep is one
such command:

    no summary              --summaries none
    hierarchical            --summaries hierarchical
    recent items            --label 'recent 1' -- --trsr.recent 1
    last 25 events shown    --label 'recent 25' -- --trsr.recent null
    as the paper, no facts  --label 'no facts' -- --no-trsr.facts
    all weights             --label full -- --trsr.full --trsr.lora null
    blocks of ten           --block_items 10
    disturbed summaries     --label 'half missing' -- --trsr.missing .5
    disturbed histories     --label 'half of the events missing' -- --trsr.history_missing .5
    last 100 events known   --label 'history 100' -- --trsr.history 100
    and shown               --label 'recent 100' --lm_context 4096 -- --trsr.history 100 --trsr.recent null
    1,000 candidates        -- --trsr.candidates.negatives 999
    a lesser SASRec beside  --dataset ml-1m --sasrec short
    and with an event less  --sasrec_hold_out 2

How many titles a prompt shows is `--trsr.recent`, of the last `--trsr.history` events at most, which facts and floors count too.
A sweep over lengths gives both, and one `--lm_context` that holds the longest at every length; `items_shown` tells how many there
were on average, and `items_cut` the share of the prompts that had no room for all.

`above its own without summaries` is of the same model, asked without them. With `--paired` one is trained without summaries first,
and `above one trained without summaries` is how far the one that has them ranks better than that: what two trainings do
by chance is in it too, so that it takes several seeds.
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
from raypipe.pipeline.trsr import cuts_of
from raypipe.storage.models import Models, find_model
from raypipe.storage.workspace import Workspace
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
    parser.add_argument("--lm_context", type=int, default=1_024, help="most tokens that it reads")
    parser.add_argument(
        "--sasrec", default="", help="recipe of the one beside it: jobs/train/sasrec-DATASET-RECIPE.yaml"
    )
    parser.add_argument(
        "--sasrec_hold_out", type=int, default=1, choices=(1, 2), help="last events of every user that it never sees"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="behind the system's name in the table")
    parser.add_argument("--paired", action="store_true", help="compare with the same without summaries, user by user")
    parser.add_argument("--workspace", default=str(ROOT / "build/trsr"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("options", nargs="*", help="more options of `raypipe align`, after --")
    given = parser.parse_args(argv)
    uri = f"{given.workspace}/{given.dataset}"
    workspace = ["--workspace", uri, "--tracking", "off"]
    config = asked_by(given)  # what `align` refuses is told before hours of work
    run("ingest", *workspace, *log_options(given.dataset))
    learnt = ["--data.model.size", given.lm, "--data.model.context", str(given.lm_context), "--trainer.workers", "1"]
    learnt += ["--data.instructions.catalogue_repeats", "20", "--trainer.steps", str(given.lm_steps)]
    lm = f"builtin/{run('lm', *workspace, *learnt)['models']['lm']}"
    words = [*recipe_of(given), *workspace, "--lm", lm, "--model", f"sasrec/{recommender(given, uri)}"]
    if config.summaries is not None:
        summarised(config, lm, workspace)
    against = []
    if given.paired:
        none = run("align", *words, *given.options, "--summaries", "null")["models"]["trsr"]
        against = ["--trsr.against", f"trsr/{none}"]
    result = run("align", *words, *shown(given), *against, *given.options)
    rows = rows_of(result, given, config, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    if given.golden:
        merge(ROOT / f"tests/golden/trsr-{given.dataset}.json", rows)
    figures = {f"{row['model']} {row['metric']}": row["value"] for row in rows}
    print(json.dumps({"bench": "trsr", "models": result["models"], "figures": figures, "machine": rows[0]["machine"]}))


def recipe_of(given: argparse.Namespace) -> list[str]:
    return ["--config", str(ROOT / f"jobs/align/trsr-{given.dataset}.yaml"), "--trainer.seed", str(given.seed)]


def shown(given: argparse.Namespace) -> list[str]:
    """The words that name the summaries of prompts."""
    if given.summaries == "none":
        return ["--summaries", "null"]
    return ["--summaries", given.summaries, "--trsr.block_items", str(given.block_items)]


def asked_by(given: argparse.Namespace) -> AlignConfig:
    """What `align` takes from the recipe and from all that is given over it."""
    return parse_config("align", AlignConfig, [*recipe_of(given), *shown(given), *given.options])


def recommender(given: argparse.Namespace, uri: str) -> str:
    """The hash of the SASRec beside it. Where it is to know all but the last event, nothing is left to validate, so that another
    that knows one event less tells how many epochs are best."""
    recipe = "-".join(filter(None, ("sasrec", given.dataset, given.sasrec)))
    words = ["--config", str(ROOT / f"jobs/train/{recipe}.yaml"), "--workspace", uri, "--tracking", "off"]
    words += ["--trainer.seed", str(given.seed)]
    validated = run("train", *words)["models"]["sasrec"]
    if given.sasrec_hold_out == 2:
        return str(validated)
    words += ["--hold_out", "1", "--trainer.validate_every", "null", "--trainer.epochs", best_epochs(uri, validated)]
    return str(run("train", *words)["models"]["sasrec"])


def best_epochs(uri: str, sasrec: str) -> str:
    """How many a stored one had learnt from when it validated best."""
    lineage = find_model(Models(Workspace(uri).store), f"sasrec/{sasrec}").lineage
    validations = lineage["training"]["validations"]
    step = max(validations, key=lambda told: (told[1], -told[0]))[0]
    return f"{step * lineage['config']['trainer']['validate_every'] / validations[0][0]:g}"


def summarised(config: AlignConfig, lm: str, workspace: Sequence[str]) -> None:
    """Writes the summaries that are shown by the language model that is to read them: of what is asked about and of each event
    that is learnt, since no block tells what a history shorter than a block is."""
    blocks = ["--summaries.paradigm", str(config.summaries), "--summaries.block_items", str(config.trsr.block_items)]
    for cut in cuts_of(config):
        run("summarize", *workspace, "--engine.lm", lm, *blocks, "--summaries.hold_out", str(cut))


def rows_of(
    result: Mapping[str, Any], given: argparse.Namespace, config: AlignConfig, machine: str
) -> list[dict[str, Any]]:
    """The golden table's rows: `LLM-TRSR` where it is the system itself, its switches and controls behind it, and others under
    their own names."""
    metrics = result["metrics"]
    paradigm, blocks = config.summaries or "no summary", config.trsr.block_items
    apart = [
        paradigm if paradigm != "recurrent" else "",
        f"blocks of {blocks}" if blocks != 5 and config.summaries is not None else "",
        f"{given.lm} LM" if given.lm != "small" else "",
        f"context {given.lm_context}" if given.lm_context != 1_024 else "",
        given.label,
    ]
    model = " ".join([SYSTEM, *filter(None, apart)])
    beside = [given.sasrec, "without the last 2 events" if given.sasrec_hold_out == 2 else ""]
    sasrec = "-".join(filter(None, ("sasrec", " ".join(filter(None, beside)))))
    candidates = f"{config.trsr.candidates.negatives + 1} candidates"
    shared = {
        "dataset": given.dataset,
        "seed": given.seed,
        "protocol": f"leave-one-out, {candidates}, last {config.trsr.history} events shown, {metrics['asked']} users",
        "machine": machine,
        "command": f"make bench NAME=trsr ARGS={shlex.quote(shlex.join(_words(given)))}",
    }
    rows = [{**shared, **row(model, metric, value)} for metric, value in metrics.items() if is_figure(metric)]
    for told in rows:
        told["model"] = sasrec if told["model"] == "sasrec" else told["model"]
    return rows


def row(model: str, metric: str, value: float) -> dict[str, Any]:
    """What a control tells belongs to a model that has its name, and of what ranks without a language model to its own."""
    name, _, figure = metric.rpartition(": ")
    if name.startswith("above its own "):
        return {"model": model, "metric": metric, "value": value}
    if name.startswith("above "):
        return {"model": model, "metric": f"above one trained without summaries: {figure}", "value": value}
    if "summaries" in name:
        return {"model": f"{model}, {name}", "metric": figure, "value": value}
    return {"model": name or model, "metric": figure, "value": value}


def is_figure(metric: str) -> bool:
    """Not what tells of the training alone."""
    figure = metric.rpartition(": ")[2].split(" ")[0]
    ranks = {f"{name}@{k}" for name in ("Recall", "MRR") for k in _PUBLISHED_AT}
    costs = {"seconds", "calls", "tokens_asked", "train_seconds", "tokens"}
    return figure in ranks | costs | {"refused", "items_shown", "items_cut"} or metric.startswith("summary_")


def _words(given: argparse.Namespace) -> list[str]:
    """The command line that is given again."""
    named = ("dataset", "summaries", "block_items", "lm", "lm_steps", "lm_context", "sasrec", "sasrec_hold_out", "seed")
    values = {name: getattr(given, name) for name in (*named, "label")}
    words = [word for name, value in values.items() if value != "" for word in (f"--{name}", str(value))]
    words += ["--paired"] if given.paired else []
    return [*words, "--golden", *(["--", *given.options] if given.options else [])]


if __name__ == "__main__":
    main()
