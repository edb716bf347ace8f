"""Cast raw rows of a log to events and rejects. Every row becomes one of them or is filtered, and all are counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.casting import Checked, flat, is_text, is_time, to_ids, to_milliseconds, to_numbers, to_order, to_text
from raypipe.data.lines import RawRows
from raypipe.data.rejects import MAX_ID_BYTES, Reject, reject_table, row_json

EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class EventRules:
    """Which columns make up an event and what they mean. Exactly one of `time` and `order` is set."""

    user: str
    item: str
    time: str | None
    order: str | None
    rating: str | None
    event: str | None
    time_unit: str | None
    event_weights: dict[str, float]
    min_rating: float | None

    @property
    def columns(self) -> list[str]:
        """The columns that a reader must deliver, each once."""
        named = (self.user, self.item, self.time, self.order, self.rating, self.event)
        return list(dict.fromkeys(name for name in named if name is not None))


@dataclass(frozen=True)
class LogChunk:
    """A checked part of a split. `rows_in` always equals rows of `events` + rows of `rejects` + `filtered`.

    `events` has the columns of EVENTS: `time` is in Unix milliseconds (or the order value in an order log), and `seq`
    is the position in the whole log. `rejects` has the columns of `raypipe.data.rejects.REJECTS`. `reject_users` are
    the user ids of the rejected rows: "" if the row names no user, null if the line never became columns.
    """

    events: pa.Table
    rejects: pa.Table
    reject_users: pa.Array
    rows_in: int
    filtered: int


class _Verdicts:
    """The first problem of each row."""

    def __init__(self, rows: int) -> None:
        self._found: list[tuple[str, str]] = []
        self._codes = np.zeros(rows, np.int8)

    def mark(self, wrong: np.ndarray, reason: str, message: str) -> None:
        if wrong.any():
            self._found.append((reason, message))
            self._codes[wrong & (self._codes == 0)] = len(self._found)

    @property
    def good(self) -> np.ndarray:
        return self._codes == 0

    def rejects(self, raw: RawRows, users: pa.Array) -> list[Reject]:
        """The rejects of `raw`. `users` [rows] are the user ids, null where there is none."""
        rows = np.flatnonzero(self._codes)
        if not rows.size:
            return []
        columns = {name: _shown(raw.table.column(name), rows) for name in raw.table.column_names}
        found = []
        whose = users.take(pa.array(rows)).fill_null("").to_pylist()
        for place, row in enumerate(rows.tolist()):
            reason, message = self._found[self._codes[row] - 1]
            values = {name: column[place] for name, column in columns.items()}
            found.append(Reject(int(raw.positions[row]), reason, message, row_json(values), whose[place]))
        return found


def cast_events(raw: RawRows, rules: EventRules, seq: int, file_name: str) -> LogChunk:
    """Check `raw` and cast it to events. `seq` is the position of the file's first byte or row in the whole log."""
    rows = raw.table.num_rows
    verdicts = _Verdicts(rows)
    users = _check_ids(raw.table, rules.user, "user", verdicts)
    items = _check_ids(raw.table, rules.item, "item", verdicts)
    times = _check_times(raw.table, rules, verdicts)
    weights = _check_events(raw.table, rules, verdicts)
    ratings = _check_ratings(raw.table, rules, verdicts)

    good = verdicts.good
    keep = good & (weights > 0)
    if rules.min_rating is not None:
        keep &= ratings >= rules.min_rating
    columns = [users.values, items.values, times, raw.positions + seq, weights.astype(np.float32)]
    if keep.all():
        events = pa.table([_nonnull(column) for column in columns], schema=EVENTS)
    else:
        mask = pa.array(keep)
        kept = [column.filter(mask) if isinstance(column, pa.Array) else column[keep] for column in columns]
        events = pa.table([_nonnull(column) for column in kept], schema=EVENTS)
    rejects = sorted([*raw.rejects, *verdicts.rejects(raw, users.values)], key=lambda reject: reject.position)
    return LogChunk(
        events,
        reject_table(rejects, file_name),
        pa.array([reject.user for reject in rejects], pa.string()),
        rows + len(raw.rejects),
        int((good & ~keep).sum()),
    )


def _check_ids(table: pa.Table, column: str, role: str, verdicts: _Verdicts) -> Checked:
    ids = to_ids(flat(table.column(column)))
    verdicts.mark(ids.bad_text, "bad_text", f"{column} is not valid UTF-8")
    verdicts.mark(ids.missing, f"null_{role}", f"{column} is empty")
    lengths = pc.fill_null(pc.binary_length(ids.values), 0).to_numpy(zero_copy_only=False)
    verdicts.mark(lengths > MAX_ID_BYTES, "id_too_long", f"{column} is longer than {MAX_ID_BYTES} bytes")
    return ids


def _check_times(table: pa.Table, rules: EventRules, verdicts: _Verdicts) -> np.ndarray:
    """Times or order values # [rows] int64."""
    if rules.time is None:
        assert rules.order is not None
        values, bad = to_order(flat(table.column(rules.order)))
        verdicts.mark(bad, "bad_order", f"{rules.order} is not a whole number")
        return values
    assert rules.time_unit is not None
    values, bad, impossible = to_milliseconds(flat(table.column(rules.time)), rules.time_unit)
    verdicts.mark(bad, "bad_time", f"{rules.time} is not a time in {rules.time_unit}")
    verdicts.mark(impossible, "impossible_time", f"{rules.time} is before 1970-01-01 or after 2100-01-01")
    return values


def _check_events(table: pa.Table, rules: EventRules, verdicts: _Verdicts) -> np.ndarray:
    """Weights # [rows] float64; 0 filters the row."""
    if rules.event is None:
        return np.ones(table.num_rows)
    types, bad_text = to_text(flat(table.column(rules.event)))
    verdicts.mark(bad_text, "bad_text", f"{rules.event} is not valid UTF-8")
    places = pc.index_in(types, pa.array(list(rules.event_weights), pa.string())).fill_null(-1)
    places = places.to_numpy(zero_copy_only=False)
    verdicts.mark(places < 0, "unknown_event", f"{rules.event} is not among the event types of log.event_weights")
    return np.array([*rules.event_weights.values(), 0.0])[places]


def _check_ratings(table: pa.Table, rules: EventRules, verdicts: _Verdicts) -> np.ndarray:
    """Ratings # [rows] float64; 0 where the log has none."""
    if rules.rating is None:
        return np.zeros(table.num_rows)
    numbers = to_numbers(flat(table.column(rules.rating)))
    verdicts.mark(numbers.missing, "bad_rating", f"{rules.rating} is not a number")
    return numbers.as_floats()


def _nonnull(column: pa.Array | np.ndarray) -> pa.Array:
    array = column if isinstance(column, pa.Array) else pa.array(column)
    assert array.null_count == 0
    return array


def _shown(column: pa.ChunkedArray, rows: np.ndarray) -> list[object]:
    """The values of `rows` in readable form. Text stays bytes, because it may not be UTF-8 even if the file says so."""
    values = flat(column).take(pa.array(rows))
    if is_text(values.type):
        return values.cast(pa.binary()).to_pylist()
    # Arrow can format times that Python's datetime cannot hold.
    return (values.cast(pa.string()) if is_time(values.type) else values).to_pylist()
