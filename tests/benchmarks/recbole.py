"""Seconds of training until SASRec reaches NDCG@10 .10 on the validation events of MovieLens 100K, beside RecBole 1.2.1.

RecBole runs its own trainer and its own defaults in a virtual environment of its own, made below `build/` at the first
call. Both see the same histories, are asked for the same held-out events over the whole catalogue without what was seen,
by the same ranks, after every epoch; only training is on the clock, and both have the same threads. RecBole is stopped
after `--limit` times our seconds, and its figure is then a lower bound.

Figures: `seconds`, `recbole_seconds`, `share` (ours of RecBole's), `recbole_reached` (1 or 0), `recbole_value` (its NDCG@10 at
the end), and each one's epochs. With `--golden` they are rows of `tests/golden/training-speed-ml-100k.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from raypipe.pipeline.sequences import pinned_versions, read_histories
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories
from raypipe.storage.workspace import Workspace
from tests.benchmarks.recommenders import log_options, merge, run

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs/train/sasrec-ml-100k.yaml"
VENV = ROOT / "build/recbole-venv"
PACKAGES = (
    "recbole==1.2.1",
    "numpy<2",
    "pandas<2.3",
    "scipy<1.14",
    "setuptools<81",
    f"torch=={torch.__version__.split('+')[0]}",
)
GOAL = 0.10

RECBOLE = """
import json, logging, sys, time
import numpy as np, torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

folder, goal, limit, threads = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
sys.argv = sys.argv[:1]
config = Config(model="SASRec", dataset="log", config_dict={
    "data_path": folder, "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "TIME_FIELD": "order",
    "load_col": {"inter": ["user", "item", "order"]}, "train_neg_sample_args": None, "loss_type": "CE",
    "eval_args": {"split": {"LS": "valid_only"}, "order": "TO", "mode": "full", "group_by": "user"},
    "use_gpu": False, "show_progress": False, "state": "ERROR", "checkpoint_dir": folder, "seed": 0,
})
init_seed(0, True)
dataset = create_dataset(config)
train, valid, _ = data_preparation(config, dataset)
model = get_model("SASRec")(config, train._dataset)
trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
known = np.load(folder + "/log.npz")
histories = np.split(known["items"], known["ends"][:-1])
seconds, epoch, value = 0.0, 0, 0.0
while value < goal and seconds < limit:
    started = time.monotonic()
    model.train()
    trainer._train_epoch(train, epoch, show_progress=False)
    seconds += time.monotonic() - started
    epoch += 1
    model.eval()
    gains = []
    with torch.no_grad():
        for batch in valid:
            batch = batch[0]
            scores = model.full_sort_predict(batch).view(len(batch), -1)
            scores[:, 0] = -np.inf
            for row, user, target in zip(scores, batch["user"], batch["item"]):
                seen = histories[int(dataset.id2token("user", int(user)))]
                own = row[target].item()
                row[dataset.token2id("item", [str(item) for item in seen])] = -np.inf
                place = int((row > own).sum())
                gains.append(1 / np.log2(place + 2) if place < 10 else 0.0)
    value = float(np.mean(gains))
    print(f"recbole epoch {epoch}: {seconds:.0f} s, NDCG@10 {value:.4f}", file=sys.stderr, flush=True)
print(json.dumps({"seconds": seconds, "epochs": epoch, "value": value, "users": len(gains)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=10.0, help="RecBole stops after so many times our seconds")
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        histories, items = movielens(Path(scratch) / "workspace")
        ours = seconds_to_goal(Path(scratch) / "ours", histories, items)
        theirs = recbole(Path(scratch) / "log", histories, given.limit * ours["seconds"], given.threads)
    figures = {
        "seconds": round(ours["seconds"], 1),
        "epochs": ours["epochs"],
        "recbole_seconds": round(theirs["seconds"], 1),
        "recbole_epochs": theirs["epochs"],
        "recbole_reached": int(theirs["value"] >= GOAL),
        "recbole_value": round(theirs["value"], 4),
        "share": round(ours["seconds"] / theirs["seconds"], 3),
    }
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if given.golden:
        rows = golden_rows(figures, machine, f"--threads {given.threads} --limit {given.limit:g} --golden")
        merge(ROOT / "tests/golden/training-speed-ml-100k.json", rows)
    print(json.dumps({"bench": "recbole", "figures": figures, "machine": machine}))


def golden_rows(figures: Mapping[str, float], machine: str, arguments: str) -> list[dict[str, Any]]:
    """Each one's seconds and epochs to the goal; of RecBole those after which it was stopped, where it did not reach it."""
    common = {
        "dataset": "ml-100k",
        "seed": 0,
        "protocol": f"last but one event, whole catalogue, seen items filtered; training until NDCG@10 {GOAL:g}",
        "machine": machine,
        "command": f"make bench NAME=recbole ARGS='{arguments}'",
    }
    told = {
        "sasrec": {"seconds": figures["seconds"], "epochs": figures["epochs"], "share": figures["share"]},
        "RecBole 1.2.1 SASRec": {
            name: figures[f"recbole_{key}"]
            for name, key in (
                ("seconds", "seconds"),
                ("epochs", "epochs"),
                ("NDCG@10", "value"),
                ("reached", "reached"),
            )
        },
    }
    return [
        {**common, "model": model, "metric": metric, "value": value}
        for model, metrics in told.items()
        for metric, value in metrics.items()
    ]


def movielens(workspace: Path) -> tuple[Histories, int]:
    """The histories without the last event, which is nobody's here; and the number of items."""
    run("ingest", "--workspace", str(workspace), "--tracking", "off", *log_options("ml-100k"))
    opened = Workspace(str(workspace))
    versions = pinned_versions(opened)
    _, histories = read_histories(opened, versions["histories"])
    return histories.without_last(1), opened.tables["items"].rows(versions["items"])


def seconds_to_goal(folder: Path, histories: Histories, items: int) -> dict[str, float]:
    """Training seconds until the recipe's model reaches the goal."""
    recipe = yaml.safe_load(RECIPE.read_text())
    config = RecommenderConfig.model_validate(recipe["recommender"])
    held = histories.items[histories.ends - 1]
    prepare_training(folder, histories.without_last(1), held, {"items": items, "hash": ""}, config, 0)
    task, size = RecommenderTask(folder), recipe["trainer"]["batch_size"]
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["trainer"]["lr"], weight_decay=0.0, fused=True)
    seconds, epochs, value = 0.0, 0, 0.0
    steps = task.steps_per_epoch(size)
    while value < GOAL:
        started = time.monotonic()
        for step in range(epochs * steps, (epochs + 1) * steps):
            loss = model(task.batch(step, 0, 0, 1, size))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        seconds += time.monotonic() - started
        epochs += 1
        total, count = task.validate(model, 0, 1)
        value = total / count
        print(f"raypipe epoch {epochs}: {seconds:.0f} s, NDCG@10 {value:.4f}", file=sys.stderr, flush=True)
    return {"seconds": seconds, "epochs": epochs}


def recbole(folder: Path, histories: Histories, limit: float, threads: int) -> dict[str, float]:
    """The same of RecBole, in its own environment."""
    if not (VENV / "bin/recbole-ready").exists():
        subprocess.run(["python3", "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (VENV / "bin/recbole-ready").touch()
    (folder / "log").mkdir(parents=True)
    users = np.repeat(np.arange(len(histories)), histories.lengths)
    lines = (
        f"{user}\t{item}\t{order}\n" for order, (user, item) in enumerate(zip(users, histories.items, strict=True))
    )
    (folder / "log/log.inter").write_text("user:token\titem:token\torder:float\n" + "".join(lines))
    seen = histories.without_last(1)
    np.savez(folder / "log.npz", items=seen.items, ends=seen.ends)
    command = [str(VENV / "bin/python"), "-c", RECBOLE, str(folder), str(GOAL), str(limit), str(threads)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
