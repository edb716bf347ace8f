"""Training speed of SASRec at the shapes of MovieLens 1M, beside a textbook loop, alternating in one run.

The textbook: `nn.TransformerEncoder` over padded batches in random order and one [batch × length × catalogue] logits
tensor. Ours: packed windows, a loss in blocks, full or sampled. Every variant runs in a process of its own, so that its
peak memory is its own; all take the same windows, width, layers and batch size. The runtime's cost is the same model's
seconds per step under Ray Train and DeepSpeed against a bare loop.

Figures: `full_softmax_vs_textbook`, `sampled_softmax_vs_textbook` (median of the rounds' ratios of positions/s),
`runtime_overhead` (share of a step's time beyond the bare loop's), positions/s and peak memory of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories
from raypipe.runtime.trainer import TrainerConfig, fit

USERS, ITEMS, LENGTH, WIDTH, BATCH = 6_040, 3_706, 200, 64, 128
VARIANTS = ("textbook", "full", "sampled")
NEGATIVES = 256


def histories() -> Histories:
    """Lengths like MovieLens 1M's (at least 20, median 96, mean 165), items by a power law."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(96), 1.05, USERS), 20, 2_300).astype(np.int64)
    shares = np.arange(1, ITEMS + 1) ** -0.8
    items = rng.choice(ITEMS, int(lengths.sum()), p=shares / shares.sum()) + 1
    return Histories(items.astype(np.int32), lengths.cumsum())


def prepared(folder: Path, loss: str) -> RecommenderTask:
    config = RecommenderConfig.model_validate(
        {
            "width": WIDTH,
            "max_length": LENGTH,
            "hidden": 4 * WIDTH,
            "loss": {"kind": loss, "negatives": NEGATIVES},
        }
    )
    prepare_training(folder, histories(), np.zeros(USERS, np.int32), {"items": ITEMS, "hash": ""}, config, 0)
    return RecommenderTask(folder)


class Textbook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 1, 4 * WIDTH, 0.2, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, items: Tensor, targets: Tensor) -> Tensor:
        length = items.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        vectors = self.items(items) + self.places(torch.arange(length))
        padding = torch.zeros_like(items, dtype=torch.float32).masked_fill(items == 0, float("-inf"))
        states = self.encoder(vectors, mask=mask, src_key_padding_mask=padding, is_causal=True)
        logits = states @ self.items.weight.T
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def textbook_steps(folder: Path) -> Callable[[int], int]:
    model, data = Textbook(), prepared(folder, "softmax")._windows
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = np.random.default_rng(0).permutation(len(data))

    def step(number: int) -> int:
        chosen = order[number * BATCH % (len(order) - BATCH) :][:BATCH]
        items = np.zeros((BATCH, int(data.lengths[chosen].max())), np.int64)
        targets = np.zeros_like(items)
        for row, (start, length) in enumerate(zip(data.starts[chosen], data.lengths[chosen], strict=True)):
            items[row, :length] = data.histories.items[start : start + length]
            targets[row, :length] = data.histories.items[start + 1 : start + 1 + length]
        loss = model(torch.from_numpy(items), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return int(data.lengths[chosen].sum())

    return step


def our_steps(folder: Path, loss: str) -> Callable[[int], int]:
    task = prepared(folder, loss)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> int:
        batch = task.batch(number, 0, 0, 1, BATCH)
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return len(batch["items"])

    return step


def timed(variant: str, seconds: float, threads: int) -> dict[str, float]:
    """Positions/s, seconds/step and peak memory of one variant, in this process, after two steps of warming up."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        kind = "sampled_softmax" if variant == "sampled" else "softmax"
        step = textbook_steps(Path(scratch)) if variant == "textbook" else our_steps(Path(scratch), kind)
        for number in range(2):
            step(number)
        positions, number, started = 0, 2, time.monotonic()
        while time.monotonic() - started < seconds:
            positions += step(number)
            number += 1
        elapsed = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"positions_per_s": positions / elapsed, "step_s": elapsed / (number - 2), "peak_mb": peak}


def under_the_runtime(steps: int, threads: int) -> float:
    """Seconds per step under Ray Train and DeepSpeed, one worker."""
    with tempfile.TemporaryDirectory() as scratch:
        task = prepared(Path(scratch) / "data", "softmax")
        config = TrainerConfig(
            steps=steps,
            batch_size=BATCH,
            lr=1e-3,
            weight_decay=0.01,
            warmup_steps=0,
            checkpoint_every=10**6,
            cpus_per_worker=threads,
            device="cpu",
        )
        return fit(task, config, "bench", Path(scratch) / "out").seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="of each variant in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--variant", choices=VARIANTS, help="time this one alone, here")
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(timed(given.variant, given.seconds, given.threads)))
        return
    ray.init(num_cpus=given.threads, include_dashboard=False, log_to_driver=False)
    rounds: list[dict[str, dict[str, float]]] = []
    overheads: list[float] = []
    for number in range(given.rounds):
        found = {}
        for variant in VARIANTS:
            words = ["--variant", variant, "--seconds", str(given.seconds), "--threads", str(given.threads)]
            command = [sys.executable, "-m", "tests.benchmarks.train", *words]
            found[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rounds.append(found)
        bare = found["full"]["step_s"]
        overheads.append(under_the_runtime(max(10, round(given.seconds / bare)), given.threads) / bare - 1)
        shown = ", ".join(f"{name} {value['positions_per_s']:,.0f} positions/s" for name, value in found.items())
        print(f"round {number + 1}: {shown}; runtime {overheads[-1]:+.1%}", file=sys.stderr)

    def median(value: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return round(statistics.median(value(found) for found in rounds), 3)

    figures = {
        f"{name}_softmax_vs_textbook": median(
            lambda found, name=name: found[name]["positions_per_s"] / found["textbook"]["positions_per_s"]  # type: ignore[misc]
        )
        for name in ("full", "sampled")
    }
    figures["runtime_overhead"] = round(statistics.median(overheads), 3)
    for name in VARIANTS:
        figures[f"{name}_positions_per_s"] = median(lambda found, name=name: found[name]["positions_per_s"])  # type: ignore[misc]
        figures[f"{name}_peak_mb"] = median(lambda found, name=name: found[name]["peak_mb"])  # type: ignore[misc]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {given.threads} threads"
    print(json.dumps({"bench": "train", "figures": figures, "machine": machine}))


if __name__ == "__main__":
    main()
