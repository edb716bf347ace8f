"""Candidates of one user scored with what their prompts begin with read once, beside every prompt read whole, alternating.

A prompt is P tokens of the user's own and c of the candidate; a user has 21. Whole is what one would write at once: the
prompts of a length, as they come, through the model, and the logits of yes and no at the last place. The ideal speed-up counts
tokens alone, 21(P + c)/(P + 21c); attention, which costs whole prompts more than their share, can bring more.

Figures, of P 300 c 30 and of P 500 c 140: `speedup` (median of the rounds' ratios) and `share_of_ideal`; over both the lower
share as `share_of_ideal`, and `max_score_difference`, of the probability of yes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from raypipe.engines.scoring import score
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer

SHAPES = ((300, 30), (500, 140))
BATCH_TOKENS = 32_768
YES, NO = 5, 6  # any two tokens: what they mean does not matter to their price


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--size", default="base", choices=("tiny", "small", "base", "large"), help="of the untrained LM"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures: dict[str, float] = {}
    shares, differences = [], []
    with tempfile.TemporaryDirectory() as folder:
        backbone = untrained(Path(folder), given.size)
        for prefix, candidate in SHAPES:
            prompts = made_up(given.users, given.candidates, prefix, candidate, len(backbone.tokenizer))
            ratios = []
            for number in range(given.rounds):
                shared_s, ours = timed(by_engine, backbone, prompts)
                whole_s, bare = timed(by_whole_prompts, backbone, prompts)
                ratios.append(whole_s / shared_s)
                differences.append(float(np.abs(ours - bare).max()))
                print(
                    f"P {prefix} c {candidate}, round {number}: shared {shared_s:.2f} s, whole {whole_s:.2f} s",
                    file=sys.stderr,
                )
            count = given.candidates
            ideal = count * (prefix + candidate) / (prefix + count * candidate)
            figures[f"speedup P {prefix} c {candidate}"] = round(statistics.median(ratios), 2)
            shares.append(statistics.median(ratios) / ideal)
            figures[f"share_of_ideal P {prefix} c {candidate}"] = round(shares[-1], 3)
    figures["share_of_ideal"] = round(min(shares), 3)
    figures["max_score_difference"] = max(differences)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {given.threads} threads, {backbone.device.type}"
    print(json.dumps({"bench": "score", "figures": figures, "machine": machine}))


def untrained(folder: Path, size: str) -> Backbone:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(4_000)]
    tokenizer = train_tokenizer([" ".join(words)] * 3, [], [], 4_096)
    save_untrained(folder, BuiltinLmConfig.model_validate({"size": size, "context": 1024}), tokenizer)
    return load_backbone(str(folder))


def made_up(users: int, candidates: int, prefix: int, candidate: int, vocabulary: int) -> list[list[int]]:
    """Token ids from 10, so that no two users, and no two candidates, begin alike for long."""
    rng = np.random.default_rng(prefix)
    found = []
    for _ in range(users):
        shared = rng.integers(10, vocabulary, prefix).tolist()
        found += [shared + rng.integers(10, vocabulary, candidate).tolist() for _ in range(candidates)]
    return found


def timed(read: object, backbone: Backbone, prompts: Sequence[list[int]]) -> tuple[float, np.ndarray]:
    """Seconds, on a CPU those of this process alone, and the probability of yes of each prompt."""
    clock = time.process_time if backbone.device.type == "cpu" else time.perf_counter
    started = clock()
    found = read(backbone, prompts)  # type: ignore[operator]
    return clock() - started, 1 / (1 + np.exp(found[:, 1] - found[:, 0]))


def by_engine(backbone: Backbone, prompts: Sequence[list[int]]) -> np.ndarray:
    found = np.zeros((len(prompts), 2))
    for number, logprobs in score(backbone, prompts, [[[YES], [NO]]] * len(prompts), BATCH_TOKENS):
        found[number] = logprobs
    return found


@torch.inference_mode()
def by_whole_prompts(backbone: Backbone, prompts: Sequence[list[int]]) -> np.ndarray:
    """In the pieces that suit the machine: as many tokens at a time as the engine reads."""
    rows = max(1, (3_000 if backbone.device.type == "cpu" else BATCH_TOKENS) // len(prompts[0]))
    found = []
    for start in range(0, len(prompts), rows):
        ids = torch.tensor(prompts[start : start + rows], device=backbone.device)
        logits = backbone.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        found.append(logits[:, [YES, NO]].float().cpu().numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
