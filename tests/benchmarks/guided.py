"""Guided refinement on a real log, as a user does it: `raypipe ingest`, `lm`, `train`, `align --system guided`, `train`, `evaluate`.

One run is one base recommender, one control and one seed, which is the recommenders': scores are made once, with seed 0, and shared
by all of them. The base of the same seed, at its full width, is trained first: the item vectors of the others start from it, and
`relative NDCG@10 gain` is over it. Controls:

    tuned       reduced + the scores of the tuned language model (the system itself)
    zero-shot   reduced + the scores of the language model as it is
    shuffled    reduced + the tuned scores of another item, of another user
    random      reduced + noise
    reduced     reduced, and nothing in the columns
    again       the base's vectors at full width, trained once more: what a second training gives
    base        the base itself

With `--items trained`, `--users frozen` or `--users absent` the other sides of the switches. The workspace is kept, so that a
run that was interrupted goes on from its last checkpoint when the command is given again, and what is shared is trained once.
With `--golden` the figures take their place in `tests/golden/guided-<dataset>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.sequences import pinned_versions, read_histories
from raypipe.recommenders.ranking import sequences_of
from raypipe.recommenders.scoring import top_k
from raypipe.runtime.job import ModelCache
from raypipe.storage.workspace import Workspace
from tests.benchmarks.recommenders import ROOT, log_options, merge, run

BASES = ("sasrec", "gru4rec", "bert4rec")
CONTROLS = ("tuned", "zero-shot", "shuffled", "random", "reduced", "again", "base")
_BLOCKS = {"tuned": "scores", "zero-shot": "scores", "shuffled": "shuffled", "random": "random", "reduced": "none"}
_TIMED_USERS = 300
_GAIN = "relative NDCG@10 gain"
# Of one relevant item a hit is its recall.
_METRICS = {
    f"{kind}@{k}": f"{name}@{k}"
    for k in (5, 10, 20)
    for kind, name in (("HR", "Recall"), ("NDCG", "NDCG"), ("MRR", "MRR"))
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-industrial", choices=("ml-100k", "amazon-industrial"))
    parser.add_argument("--base", default="sasrec", choices=BASES)
    parser.add_argument("--control", default="tuned", choices=CONTROLS)
    parser.add_argument("--items", default="frozen", choices=("frozen", "trained"), help="the items' columns")
    parser.add_argument("--users", default="trained", choices=("trained", "frozen", "absent"), help="the users' blocks")
    parser.add_argument("--lm", default="small", help="size of the built-in language model, or a folder or hub name")
    parser.add_argument("--lm_steps", type=int, default=2_500, help="of the built-in one's training")
    parser.add_argument("--seed", type=int, default=0, help="of the recommenders")
    parser.add_argument("--label", default="", help="behind the model's name in the table")
    parser.add_argument("--workspace", default=str(ROOT / "build/guided"))
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    parser.add_argument("--align", default="", help="more options of `raypipe align`, as one word")
    parser.add_argument("options", nargs="*", help="more options of the guided `raypipe train`, after --")
    given = parser.parse_args(argv)
    workspace = ["--workspace", f"{given.workspace}/{given.dataset}", "--tracking", "off"]
    run("ingest", *workspace, *log_options(given.dataset))
    recipe = [
        "--config",
        str(ROOT / f"jobs/train/{given.base}-{given.dataset}.yaml"),
        "--trainer.seed",
        str(given.seed),
    ]

    def trained(*options: str) -> str:
        return f"{given.base}/{run('train', *recipe, *workspace, *options)['models'][given.base]}"

    base = trained()
    model = base
    if given.control != "base":
        options = ["--recommender.guided.base", base]
        if given.control in _BLOCKS:
            options += ["--recommender.guided.scores", scores_of(given, workspace)]
            options += ["--recommender.guided.block", _BLOCKS[given.control]]
            options += ["--recommender.guided.items", given.items, "--recommender.guided.users", given.users]
        model = trained(*options, *given.options)
    filtered = given.dataset != "amazon-industrial"  # whose users buy the same item again
    switch = [] if filtered else ["--no-filter_seen"]
    figures = {
        one: run("evaluate", *workspace, "--model", one, *switch)["metrics"] for one in dict.fromkeys((base, model))
    }
    rows = rows_of(given, figures[model], figures[base], latency(workspace[1], model, base), filtered=filtered)
    if given.golden:
        merge(ROOT / f"tests/golden/guided-{given.dataset}.json", rows)
    told = {row["metric"]: row["value"] for row in rows}
    print(json.dumps({"bench": "guided", "figures": told, "machine": rows[0]["machine"]}))


def scores_of(given: argparse.Namespace, workspace: Sequence[str]) -> str:
    """The scores, by name and content, made by a language model that is trained first where it is the workspace's own."""
    cut = ["--hold_out", "2", "--held_out_share", "0.1"]
    lm = given.lm
    if lm in ("tiny", "small", "base", "large"):
        learnt = ["--data.model.size", lm, "--data.instructions.catalogue_repeats", "20", "--trainer.workers", "1"]
        learnt += ["--trainer.steps", str(given.lm_steps)]
        if given.dataset != "ml-100k":  # whose films have no text
            learnt += ["--data.prompts.text_characters", "200"]
        lm = f"builtin/{run('lm', *workspace, *cut, *learnt)['models']['lm']}"
    config = ROOT / f"jobs/align/guided-{given.dataset}.yaml"
    words = ["--config", str(config), *workspace, *cut, "--lm", lm]
    if given.control == "zero-shot":
        words += ["--no-guided.tuned"]
    (scores,) = run("align", *words, *shlex.split(given.align))["models"].values()
    return f"guided/{scores}"


@torch.no_grad()
def latency(uri: str, model: str, base: str) -> float:
    """The median time of one user's list, alternating, as a share of the base's."""
    workspace = Workspace(uri)
    _, histories = read_histories(workspace, pinned_versions(workspace)["histories"])
    rows = np.flatnonzero(histories.lengths)[:_TIMED_USERS]
    models = [Loaded.of(ModelCache(), workspace, named).recommender for named in (model, base)]
    tables = [one.item_states() for one in models]
    seconds: list[list[float]] = [[], []]
    for row in np.repeat(rows, 2):
        for mine, one, table in zip(seconds, models, tables, strict=True):
            started = time.perf_counter()
            states = one.encode(sequences_of(histories, np.array([row]), one.max_length))
            top_k(one.queries(states), table, 10)
            mine.append(time.perf_counter() - started)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def rows_of(
    given: argparse.Namespace,
    metrics: Mapping[str, float],
    base: Mapping[str, float],
    serving: float,
    *,
    filtered: bool,
) -> list[dict[str, Any]]:
    """The golden table's rows: `Guided` where it is the system itself, controls as models of their own."""
    sides = {"items trained": given.items == "trained", f"users {given.users}": given.users != "trained"}
    apart = ["" if given.control == "tuned" else given.control]
    if given.control in _BLOCKS:
        apart += [name for name, told in sides.items() if told]
    apart += [given.label]
    model = " ".join(["Guided", ", ".join(filter(None, apart))]).strip()
    prefix = f"{given.base}."
    found = {name: metrics[prefix + metric] for metric, name in _METRICS.items() if prefix + metric in metrics}
    found["latency, share of the base's"] = round(serving, 3)
    found[_GAIN] = round(metrics[f"{prefix}NDCG@10"] / base[f"{prefix}NDCG@10"] - 1, 4)
    shared = {
        "dataset": given.dataset,
        "model": model,
        "recommender": given.base,
        "seed": given.seed,
        "protocol": f"leave-one-out, whole catalogue, seen items {'filtered' if filtered else 'kept'}, best validation, "
        "one width for all",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "command": f"make bench NAME=guided ARGS={shlex.quote(shlex.join(_words(given)))}",
    }
    return [{**shared, "metric": name, "value": value} for name, value in found.items()]


def _words(given: argparse.Namespace) -> list[str]:
    """The command line that is given again."""
    named = ("dataset", "base", "control", "items", "users", "lm", "lm_steps", "seed", "label", "align")
    words = [word for name in named if getattr(given, name) != "" for word in (f"--{name}", str(getattr(given, name)))]
    return [*words, "--golden", *(["--", *given.options] if given.options else [])]


if __name__ == "__main__":
    main()
