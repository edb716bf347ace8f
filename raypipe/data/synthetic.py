"""A synthetic data set of any size, with planted structure that a good recommender and a good summary should find.

Planted: each user has one to three favourite genres and one brand. For a share of the users all genres change once, at
a known time. A user who took part 1 of a series is likely to take part 2 next. Item popularity is Zipf, and history
lengths are log-normal. `truth.parquet` holds each user's tastes.

The log is written as by a fleet of collectors that each see their own users. It consists of blocks of about a million
events. Each block is in the order of arrival (= time, except for late events), and the users of a block are
interleaved. Memory is that of one block, 450 MB at most (measured), plus about 150 bytes an item. The same config
writes the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from raypipe.config import Config, shaping
from raypipe.data.synthetic_items import (
    GENRES,
    ItemPlan,
    brand_name,
    genre_names,
    plan_items,
    write_items,
    zipf_ranks,
)
from raypipe.errors import UsageError

_BLOCK_EVENTS = 1_000_000
_BLOCK_USERS = 200_000
_MAX_EVENTS_PER_USER = 100_000
_FAVOURITES = 3
# Cumulative share of a user's taste for its first, second and third genre; the row is the number of genres less 1.
_TASTE = np.array([[1.0, 1.0, 1.0], [0.65, 1.0, 1.0], [0.5, 0.8, 1.0]], np.float32)
_BRAND_SHARE, _GENRE_SHARE = 0.2, 0.7  # the other events follow no taste
_FOLLOW = 0.6
_LENGTH_SIGMA = 1.0
_LATE_MS = 7 * 86_400_000

_LOG = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("time", pa.int64())])
_TRUTH = pa.schema(
    [
        ("user_id", pa.int64()),
        ("genres_before", pa.list_(pa.string())),
        ("genres_after", pa.list_(pa.string())),
        ("drift_time", pa.int64()),
        ("brand", pa.string()),
        ("events", pa.int64()),
    ]
)


class LaterLog(Config):
    """The next night's log: later events of some of the users, with late and repeated events."""

    user_share: float = shaping(0.05, "share of the users in it", gt=0, le=1)
    events_per_user: float = shaping(5.0, "mean of their new events", ge=1)
    hours: float = shaping(24.0, "new events happen in so many hours after the end", gt=0)
    late_share: float = shaping(0.05, "further events, from the week before the end, per new event", ge=0)
    repeat_share: float = shaping(0.05, "events of the first log once more, per new event", ge=0)


class SyntheticConfig(Config):
    """A synthetic data set. `write` creates it."""

    users: int = shaping(10_000, "number of users", ge=1)
    items: int = shaping(2_000, "number of items", ge=1)
    events: int = shaping(1_000_000, "number of events, exactly; every user has at least one")
    seed: int = shaping(0, "of everything drawn", ge=0)
    start: date = shaping(date(2024, 1, 1), "no event is before")
    end: date = shaping(date(2025, 1, 1), "every event of the first log is before")
    genres: int = shaping(12, "number of genres", ge=2 * _FAVOURITES, le=len(GENRES))
    brands: int = shaping(40, "number of brands", ge=1)
    drift_share: float = shaping(0.3, "share of users whose genres change", ge=0, le=1)
    late_share: float = shaping(0.01, "share of events that arrive up to a week after they happened", ge=0, le=1)
    log_format: Literal["parquet", "csv"] = shaping("parquet", "of the logs")
    later: LaterLog | None = shaping(None, "set: also write the next night's log")

    def write(self, folder: str | Path) -> SyntheticDataset:
        """Write the log, items.csv, truth.parquet and, if `later` is set, the later log into `folder`.

        Logs have the columns user_id, item_id and time (Unix milliseconds), all int64. Raises UsageError for sizes or
        dates that contradict each other.
        """
        self._check()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rng = _rng(self.seed, 0)
        plan = plan_items(self.items, self.genres, self.brands, rng)
        items, truth = folder / "items.csv", folder / "truth.parquet"
        write_items(items, plan, self.genres, rng)
        log, later = folder / f"log.{self.log_format}", folder / f"later.{self.log_format}"
        counts = LaterCounts(0, 0, 0, 0)
        with _open_log(log) as out, pq.ParquetWriter(truth, _TRUTH) as told:
            for block in _blocks(self, plan):
                told.write_table(_truth(block, self))
                out.write_table(_in_order_of_arrival(block, self))
        if self.later is not None:
            with _open_log(later) as out:
                for block in _blocks(self, plan):
                    rows, block_counts = _later(block, self, self.later, plan)
                    out.write_table(rows)
                    counts = LaterCounts(
                        *(a + b for a, b in zip(counts.as_tuple(), block_counts.as_tuple(), strict=True))
                    )
        return SyntheticDataset(log, items, truth, later if self.later is not None else None, counts)

    def _check(self) -> None:
        if not self.users <= self.events <= self.users * _MAX_EVENTS_PER_USER:
            raise UsageError(
                f"{self.events} events do not suit {self.users} users.",
                f"Ask for one to {_MAX_EVENTS_PER_USER:,} events a user.",
            )
        if self.start >= self.end or self.start < date(1970, 1, 1):
            raise UsageError(
                f"The data set would start on {self.start} and end on {self.end}.",
                "Set start to a day from 1970 on, and end to a later day.",
            )


@dataclass(frozen=True)
class LaterCounts:
    """Counts of the later log: its users, and its new, late and repeated events."""

    users: int
    new: int
    late: int
    repeated: int

    def as_tuple(self) -> tuple[int, int, int, int]:
        return self.users, self.new, self.late, self.repeated


@dataclass(frozen=True)
class SyntheticDataset:
    """The files that were written, and the counts of the later log."""

    log: Path
    items: Path
    truth: Path
    later_log: Path | None
    later: LaterCounts


@dataclass(frozen=True)
class _Tastes:
    """What users like; arrays # [users of the block].

    `genres` # [users, 6] are three genres before and three after the drift.
    """

    genres: np.ndarray
    count: np.ndarray
    brand: np.ndarray
    drift_at: np.ndarray  # share of the user's span; above 1: the genres never change
    begins: np.ndarray  # the user's first moment, as a share of the data set's span


@dataclass(frozen=True)
class _Block:
    """Consecutive users from `first_user`, their tastes, and their events sorted by user and time.

    `user` # [events] counts users within the block.
    """

    number: int
    first_user: int
    tastes: _Tastes
    lengths: np.ndarray
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray


class _Rows(Protocol):
    def write_table(self, table: pa.Table) -> None: ...
    def __enter__(self) -> _Rows: ...
    def __exit__(self, *error: object) -> None: ...


def _rng(seed: int, *place: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *place])))


def _open_log(path: Path) -> _Rows:
    if path.suffix == ".csv":
        return arrow_csv.CSVWriter(path, _LOG)
    return pq.ParquetWriter(path, _LOG, use_dictionary=["user_id", "item_id"], write_statistics=False)


def _blocks(config: SyntheticConfig, plan: ItemPlan) -> Iterator[_Block]:
    users_per_block = min(max(1, config.users * _BLOCK_EVENTS // config.events), _BLOCK_USERS)
    for number, first in enumerate(range(0, config.users, users_per_block)):
        last = min(first + users_per_block, config.users)
        events = config.events * last // config.users - config.events * first // config.users
        yield _draw_block(config, plan, number, first, last - first, events)


def _draw_block(
    config: SyntheticConfig, plan: ItemPlan, number: int, first_user: int, users: int, events: int
) -> _Block:
    rng = _rng(config.seed, 1, number)
    tastes = _draw_tastes(config, users, rng)
    lengths = _draw_lengths(users, events, rng)
    user = np.repeat(np.arange(users), lengths)
    # Sorting user + share of the span sorts by user and then by time at once.
    share = np.sort(user + rng.random(events)) - user
    begins = tastes.begins[user]
    start, end = _milliseconds(config.start), _milliseconds(config.end)
    time = start + ((begins + share * (1 - begins)) * (end - start)).astype(np.int64)
    item = _draw_items(plan, tastes, config, user, share >= tastes.drift_at[user], rng)
    return _Block(number, first_user, tastes, lengths, user, item, np.minimum(time, end - 1))


def _draw_tastes(config: SyntheticConfig, users: int, rng: np.random.Generator) -> _Tastes:
    genres = np.argsort(rng.random((users, config.genres), np.float32), axis=1)[:, : 2 * _FAVOURITES]
    drifts = rng.random(users) < config.drift_share
    return _Tastes(
        genres,
        rng.integers(1, _FAVOURITES + 1, users),
        zipf_ranks(rng.random(users), np.full(users, config.brands)),
        np.where(drifts, rng.uniform(0.3, 0.7, users), 2.0),
        rng.uniform(0, 0.8, users),
    )


def _draw_lengths(users: int, events: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal lengths of at least 1 whose sum is `events`: [users]."""
    weights = rng.lognormal(0, _LENGTH_SIGMA, users)
    exact = weights / weights.sum() * (events - users)
    lengths = np.floor(exact).astype(np.int64)
    rest = events - users - int(lengths.sum())
    lengths[np.argsort(lengths - exact, kind="stable")[:rest]] += 1
    return lengths + 1


def _draw_items(
    plan: ItemPlan,
    tastes: _Tastes,
    config: SyntheticConfig,
    user: np.ndarray,
    drifted: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Items (from 0) # [events] for events sorted by user and time."""
    events = len(user)
    share = _TASTE[tastes.count - 1][user]
    pick = rng.random(events, np.float32)
    favourite = (pick >= share[:, 0]).astype(np.int64) + (pick >= share[:, 1]) + _FAVOURITES * drifted
    mode = rng.random(events, np.float32)
    pool = np.where(mode < _GENRE_SHARE, tastes.genres[user, favourite], config.genres + tastes.brand[user])
    pool[mode >= _GENRE_SHARE + _BRAND_SHARE] = config.genres + config.brands
    item = plan.pooled[plan.pool_start[pool] + zipf_ranks(rng.random(events), plan.pool_size[pool])]

    # A run of following events continues a series, part by part, from the event before the run. If the series ends, the
    # run starts anew there. What is left after eight passes, one run in sixty, gets no sequel.
    follows = rng.random(events, np.float32) < _FOLLOW
    follows[np.flatnonzero(np.diff(user, prepend=-1))] = False
    place = np.arange(events)
    for _ in range(8):
        origin = np.maximum.accumulate(np.where(follows, 0, place))
        step, begun = place - origin, item[origin]
        beyond = step - plan.parts_left[begun]
        follows[beyond == 1] = False
    return np.where(beyond <= 0, begun + step, item)


def _in_order_of_arrival(block: _Block, config: SyntheticConfig) -> pa.Table:
    rng = _rng(config.seed, 2, block.number)
    late = rng.random(len(block.time)) < config.late_share
    arrival = block.time + np.where(late, rng.integers(0, _LATE_MS, len(late)), 0)
    return _rows(block.first_user + block.user, block.item, block.time, np.argsort(arrival, kind="stable"))


def _rows(user: np.ndarray, item: np.ndarray, time: np.ndarray, order: np.ndarray) -> pa.Table:
    return pa.table([user[order] + 1, item[order].astype(np.int64) + 1, time[order]], schema=_LOG)


def _later(block: _Block, config: SyntheticConfig, later: LaterLog, plan: ItemPlan) -> tuple[pa.Table, LaterCounts]:
    """New, late and repeated events of a share of the block's users, sorted by time, and their counts."""
    rng = _rng(config.seed, 3, block.number)
    chosen = np.flatnonzero(rng.random(len(block.lengths)) < later.user_share)
    lengths = 1 + rng.poisson(later.events_per_user - 1, len(chosen))
    user = np.repeat(chosen, lengths)
    share = np.sort(np.repeat(np.arange(len(chosen)), lengths) + rng.random(len(user))) % 1
    end = _milliseconds(config.end)
    time = end + (share * later.hours * 3_600_000).astype(np.int64)
    item = _draw_items(plan, block.tastes, config, user, block.tastes.drift_at[user] <= 1, rng)

    late = np.sort(rng.choice(chosen, round(later.late_share * len(user)))) if len(chosen) else chosen
    late_item = _draw_items(plan, block.tastes, config, late, block.tastes.drift_at[late] <= 1, rng)
    late_time = end - 1 - rng.integers(0, _LATE_MS, len(late))

    theirs = np.flatnonzero(np.isin(block.user, chosen))
    again = rng.choice(theirs, min(round(later.repeat_share * len(user)), len(theirs)), replace=False)
    rows = [
        np.concatenate(columns)
        for columns in (
            (user, late, block.user[again]),
            (item, late_item, block.item[again]),
            (time, late_time, block.time[again]),
        )
    ]
    counts = LaterCounts(len(chosen), len(user), len(late), len(again))
    return _rows(rows[0] + block.first_user, rows[1], rows[2], np.argsort(rows[2], kind="stable")), counts


def _truth(block: _Block, config: SyntheticConfig) -> pa.Table:
    tastes, users = block.tastes, len(block.lengths)
    drifts = tastes.drift_at <= 1
    start, end = _milliseconds(config.start), _milliseconds(config.end)
    drift = start + ((tastes.begins + tastes.drift_at * (1 - tastes.begins)) * (end - start)).astype(np.int64)
    after = np.where(drifts[:, None], tastes.genres[:, _FAVOURITES:], tastes.genres[:, :_FAVOURITES])
    brands, brand = np.unique(tastes.brand, return_inverse=True)
    return pa.table(
        [
            np.arange(users) + block.first_user + 1,
            _genre_lists(tastes.genres[:, :_FAVOURITES], tastes.count, config.genres),
            _genre_lists(after, tastes.count, config.genres),
            pa.array(drift, mask=~drifts),
            pa.array([brand_name(number) for number in brands.tolist()]).take(pa.array(brand)),
            block.lengths,
        ],
        schema=_TRUTH,
    )


def _genre_lists(genres: np.ndarray, count: np.ndarray, known: int) -> pa.ListArray:
    """The names of the first `count` of each user's `genres` # [users, 3]."""
    kept = genres[np.arange(_FAVOURITES) < count[:, None]]
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(genre_names(known)).take(pa.array(kept)))


def _milliseconds(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000
