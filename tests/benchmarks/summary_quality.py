"""What the built-in LM's summaries say, measured on the night of a real log, with floors and controls beside it.

Runs `nightly` on MovieLens 100K in a fresh workspace, then counts: of the attribute values a summary names, the share
that are among the user's own top three of the summarised window (precision); of those top values, the share it names
(coverage); of the shifts it claims, the share that are real. Beside it: the exact reference answer (what counting gives),
everybody's summary swapped with another user's, and the catalogue's three most frequent values for all.

Writes `tests/golden/summaries-ml-100k.json` when `--golden` is given; figures go to stdout either way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from raypipe.cli.main import main as raypipe
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.metrics.text import (
    Vocabulary,
    attribute_coverage,
    attribute_precision,
    item_values,
    shift_precision,
    top_values,
    value_counts,
)
from raypipe.storage.workspace import Workspace

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/ml-100k"
GOLDEN = ROOT / "tests/golden/summaries-ml-100k.json"
BLOCK, WINDOW = 5, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", default=str(DATA), help="MovieLens 100K in its own layout")
    parser.add_argument("--workspace", help="evaluate this finished workspace instead of running a night")
    parser.add_argument("--golden", action="store_true", help="write the golden table")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = arguments.workspace or str(Path(scratch) / "workspace")
        if not arguments.workspace:
            code = raypipe(
                ["nightly", "--workspace", workspace, "--ingest.log.path", arguments.log, "--tracking", "off"]
            )
            if code:
                sys.exit(code)
        figures = {name: measure(*inputs) for name, inputs in variants(Workspace(workspace)).items()}
    seconds = time.monotonic() - started
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    rows = [
        {
            "dataset": "ml-100k",
            "model": model,
            "metric": metric,
            "value": value,
            "seed": 0,
            "protocol": "hierarchical, blocks of 5, last 50 events; LM trained without every user's last event",
            "machine": machine,
            "command": "make bench NAME=summary_quality ARGS=--golden",
        }
        for model, values in figures.items()
        for metric, value in values.items()
    ]
    if arguments.golden:
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
    flat = {f"{row['model']}_{row['metric']}": row["value"] for row in rows}
    print(json.dumps({"bench": "summary_quality", "figures": {**flat, "seconds": round(seconds)}, "machine": machine}))


def variants(workspace: Workspace) -> dict[str, tuple[list[str], list[list[dict[str, list[str]]]], Vocabulary]]:
    """Summaries, each user's window as its items' attributes, and the vocabulary: of the LM and of every control."""
    items = workspace.tables["items"].read(workspace.tables["items"].version()).sort_by("index")
    attributes = [dict(pairs) for pairs in items["attributes"].to_pylist()]
    vocabulary = Vocabulary(value for item in attributes for values in item.values() for value in values)
    table = workspace.tables["histories"]
    rows = table.read(table.version(), ["user_id", "items"])
    histories = dict(zip(rows["user_id"].to_pylist(), rows["items"].to_pylist(), strict=True))
    table = workspace.tables["summaries"]
    written = table.read(table.version(), ["user_id", "summary"]).sort_by("user_id")
    windows = [[attributes[i - 1] for i in _window(histories[user])] for user in written["user_id"].to_pylist()]
    summaries = written["summary"].to_pylist()
    prompts = SummaryPrompts()
    exact = [
        prompts.reference_merge([window[at : at + BLOCK] for at in range(0, len(window), BLOCK)]) for window in windows
    ]
    shuffled = np.random.default_rng(0).permutation(len(summaries))
    popular = sorted(
        value_counts(item_values(item) for window in windows for item in window).items(), key=lambda pair: -pair[1]
    )[:3]
    constant = f"Mostly chooses {', '.join(value for value, _ in popular)}."
    return {
        "built-in LM": (summaries, windows, vocabulary),
        "exact count": (exact, windows, vocabulary),
        "another user's": ([summaries[i] for i in shuffled], windows, vocabulary),
        "most frequent for all": ([constant] * len(summaries), windows, vocabulary),
    }


def measure(
    summaries: Sequence[str], windows: Sequence[Sequence[dict[str, list[str]]]], vocabulary: Vocabulary
) -> dict[str, float]:
    histories = [[item_values(item) for item in window] for window in windows]
    tops = [top_values(value_counts(values)) for values in histories]
    pairs = list(zip(map(vocabulary.named, summaries), tops, strict=True))
    recent = 3 * BLOCK
    shifts = (
        shift_precision(
            vocabulary.named_lately(summary),
            value_counts(values[:-recent]),
            value_counts(values[-recent:]),
            len(values[:-recent]),
            len(values[-recent:]),
        )
        for summary, values in zip(summaries, histories, strict=True)
    )
    return {
        "attribute_precision": _mean(attribute_precision(named, top) for named, top in pairs),
        "attribute_coverage": _mean(attribute_coverage(named, top) for named, top in pairs),
        "shift_precision": _mean(shifts),
        "users": len(summaries),
    }


def _window(items: Sequence[int]) -> Sequence[int]:
    first = max(0, -(-(len(items) - WINDOW) // BLOCK))
    return items[first * BLOCK :]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else 0.0


if __name__ == "__main__":
    main()
