"""Small logs and catalogues to run jobs on, and what the histories of a log have to be."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raypipe.storage.workspace import Workspace

Event = tuple[str, str, int]
GENRES = ("Drama", "Comedy", "War", "Horror", "Musical")
DAY = 86_400_000
START = 1_700_000_000_000


def write_log(
    path: Path, events: Iterable[Sequence[Any]], header: Sequence[str] = ("user_id", "item_id", "time")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *events])
    return path


def write_catalogue(path: Path, items: dict[str, str] | int, **genres: str) -> Path:
    """`items` is id → title, or so many items i1, i2, …; `genres` overrides the genre of single ones."""
    titles = {f"i{n}": f"Title {n}" for n in range(1, items + 1)} if isinstance(items, int) else items
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [[item, title, genres.get(item, GENRES[n % 5])] for n, (item, title) in enumerate(titles.items())]
        csv.writer(file).writerows([["item_id", "title", "genre"], *rows])
    return path


CHAIN_ITEMS, CHAIN_USERS, CHAIN_LENGTH = 30, 40, 9
CHAIN_TRAINING = (
    *("--recommender.width", "16", "--recommender.hidden", "32", "--recommender.max_length", "6"),
    *("--recommender.dropout", "0", "--trainer.batch_size", "16", "--trainer.lr", "0.01"),
    *("--trainer.warmup_steps", "5", "--trainer.epochs", "10", "--trainer.device", "cpu"),
)

# Chains of three items, hybrid in its joint form: what a tiny language model learns in a minute.
EXPLAINER = (
    *("--system", "recexplainer", "--recexplainer.variant", "H", "--recexplainer.hybrid", "code"),
    *("--recexplainer.titles", "3", "--recexplainer.lora.rank", "16", "--recexplainer.lora.dropout", "0"),
    *("--held_out_share", "0.25", "--answer_tokens", "48", "--trainer.epochs", "10", "--trainer.lr", "0.004"),
    *("--trainer.schedule", "linear", "--trainer.batch_size", "16", "--trainer.device", "cpu"),
    *("--recexplainer.tasks", '["T1", "T3", "T6", "explanation"]'),
)


def chain_events(users: int = CHAIN_USERS) -> list[Event]:
    """Every item is followed by the next one of the catalogue, whose first follows its last."""
    draw = random.Random(0)
    starts = [draw.randrange(CHAIN_ITEMS) for _ in range(users)]
    return [
        (f"u{user}", f"i{(start + step) % CHAIN_ITEMS + 1}", START + step)
        for user, start in enumerate(starts)
        for step in range(CHAIN_LENGTH)
    ]


def random_events(seed: int, users: int, items: int, events: int) -> list[Event]:
    """Events with ties in time and repeats, in no order."""
    draw = random.Random(seed)
    chosen = [
        (f"u{draw.randrange(users)}", f"i{draw.randint(1, items)}", START + draw.randrange(40) * DAY)
        for _ in range(events)
    ]
    return [*chosen, *draw.sample(chosen, events // 20)]


def histories_of(uri: str) -> dict[str, list[tuple[str, int]]]:
    """Every user's history as (item id, time), from the newest version; fails where a user is there twice."""
    workspace = Workspace(uri)
    rows = newest(workspace, "histories")
    items = newest(workspace, "items").sort_by("index")["item_id"].to_pylist()
    assert len(set(rows["user_id"].to_pylist())) == rows.num_rows, "a user is there twice"
    return {
        row["user_id"]: [(items[index - 1], time) for index, time in zip(row["items"], row["times"], strict=True)]
        for row in rows.to_pylist()
    }


def newest(workspace: Workspace | str, table: str) -> pa.Table:
    found = (Workspace(workspace) if isinstance(workspace, str) else workspace).tables[table]
    return found.read(found.version())


def expected_histories(*logs: Iterable[Event]) -> dict[str, list[tuple[str, int]]]:
    """The histories of the logs by the plainest means: in order of arrival, no repeats, sorted by time."""
    kept: dict[str, dict[tuple[str, int], None]] = {}
    for log in logs:
        for user, item, time in log:
            kept.setdefault(user, {})[item, time] = None
    return {user: sorted(events, key=lambda event: event[1]) for user, events in kept.items()}


def balanced(metrics: dict[str, Any]) -> bool:
    """Nothing vanishes: rows in = events added + everything that was left out, by kind."""
    kinds = ("events_added", "rejected", "duplicate", "filtered", "forgotten")
    return metrics["rows_in"] == sum(metrics.get(kind, 0) for kind in kinds)


SMALL_ITEMS = 40
# Users u1 … u24 with 1 … 24 events, and one with 120: every length around the blocks of five and the window of fifty.
SMALL_LOG: list[Event] = [
    (user, f"i{(n * n + length) % SMALL_ITEMS + 1}", START + n * DAY)
    for user, length in [*((f"u{length}", length) for length in range(1, 25)), ("long", 120)]
    for n in range(length)
]


def blocks_in_window(events: int, window: int = 50) -> int:
    """Blocks of five that a summary of `events` events is made of."""
    return sum(start >= events - window for start in range(0, events, 5))


def full_cost(events: int, window: int = 50) -> int:
    """Engine calls of a history of which nothing is known: its blocks, and a merge where there are several."""
    blocks = blocks_in_window(events, window)
    return blocks + (blocks > 1)
