"""Merge new events into histories, one user bucket at a time: sorted, without duplicates, and with a key each.

A history is ordered by time, then by arrival: earlier logs first, then the order within the log. In a workspace of
order kind, the events of a later log follow the existing ones, and times are positions 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.data.spills import ROW_SCHEMA, stable_order
from raypipe.storage.hashing import event_lanes, sequence_lanes, to_hex
from raypipe.storage.schemas import HISTORIES


@dataclass(frozen=True)
class MergedHistories:
    """The histories of one bucket after a merge, and counts of what became of the new events."""

    rows: pa.Table
    events_in: int
    duplicates: int
    changed: int

    @property
    def kept(self) -> int:
        return self.events_in - self.duplicates


def merge_histories(
    old: pa.Table, new: Sequence[pa.Table], item_lanes: NDArray[np.uint64], *, order_kind: bool
) -> MergedHistories:
    """Merge spill rows (in log order) into the old histories of a bucket.

    `item_lanes` [items + 1, 2] are the content hashes of the catalogue. An event with the user, item and time of an
    earlier event is a duplicate. `changed` counts the users whose `history_key` is new.
    """
    old_rows = old.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
    rows = pa.concat_tables([old_rows, *new]).combine_chunks()
    encoded = rows["user_id"].combine_chunks().dictionary_encode()
    by_name = pc.sort_indices(encoded.dictionary)
    names = encoded.dictionary.take(by_name)
    rank = np.empty(len(names), np.int64)
    rank[by_name.to_numpy()] = np.arange(len(names))
    row_user = rank[encoded.indices.to_numpy()]
    # Sort whole rows first, because there are far fewer of them than events. The sort is stable, so a user's rows keep
    # their order of arrival.
    row_order = stable_order(row_user)
    rows, row_user = rows.take(pa.array(row_order)), row_user[row_order]

    lengths = pc.list_value_length(rows["items"]).to_numpy().astype(np.int64)
    user = np.repeat(row_user, lengths)
    items = _flat(rows["items"])
    times = _flat(rows["times"])
    weights = _flat(rows["weights"])
    is_new = np.repeat(row_order >= old_rows.num_rows, lengths)

    # A log in time order arrives sorted; lexsort is stable, so equal (user, time) keep their order of arrival.
    same_run = (np.diff(user) == 0) & ((np.diff(is_new.view(np.int8)) == 0) if order_kind else True)
    if np.any(np.diff(times)[same_run] < 0):
        order = np.lexsort((times, is_new, user) if order_kind else (times, user))
        user, items, times, weights, is_new = (column[order] for column in (user, items, times, weights, is_new))
    keep = ~_repeats(user, times, items, is_new if order_kind else None)
    duplicates = int(np.count_nonzero(~keep))
    if duplicates:
        user, items, times, weights = (column[keep] for column in (user, items, times, weights))

    lengths = np.bincount(user, minlength=len(names))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(len(user)) - np.repeat(offsets[:-1], lengths)
    if order_kind:
        times = position.astype(np.int64)
    keys = to_hex(sequence_lanes(event_lanes(item_lanes[items], times), lengths))
    lists = offsets.astype(np.int32)
    merged = pa.table(
        [
            names,
            pa.ListArray.from_arrays(lists, pa.array(items)),
            pa.ListArray.from_arrays(lists, pa.array(times)),
            pa.ListArray.from_arrays(lists, pa.array(_place_among_ties(user, times))),
            pa.ListArray.from_arrays(lists, pa.array(weights)),
            keys,
        ],
        schema=HISTORIES.columns,
    )
    # Compared user by user, because two users may have the same history and so the same key.
    before = old["history_key"].combine_chunks().take(pc.index_in(names, value_set=old["user_id"].combine_chunks()))
    unchanged = pc.sum(pc.equal(keys, before)).as_py() or 0
    return MergedHistories(merged, int(is_new.sum()), duplicates, len(names) - unchanged)


def _flat(column: pa.ChunkedArray) -> NDArray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _repeats(
    user: NDArray[np.int64], times: NDArray[np.int64], items: NDArray[np.int32], is_new: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which of the sorted events have the user, time and item of an earlier event: bool [events].

    If `is_new` is given, old and new events do not repeat each other.
    """
    repeated = np.zeros(len(user), bool)
    if len(user) < 2:
        return repeated
    same = (user[1:] == user[:-1]) & (times[1:] == times[:-1])
    if is_new is not None:
        same &= is_new[1:] == is_new[:-1]
    # Only events with the same time as a neighbour can be repeats, so only they are sorted again.
    tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
    if len(tied) == 0:
        return repeated
    group = np.cumsum(~np.concatenate([[False], same]))[tied]
    order = np.lexsort((items[tied], group))
    again = (np.diff(group[order]) == 0) & (np.diff(items[tied][order]) == 0)
    repeated[tied[order[1:][again]]] = True
    return repeated


def _place_among_ties(user: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int32]:
    """The place of each event among its user's events at the same time, from 0: [events]."""
    if len(user) == 0:
        return np.empty(0, np.int32)
    starts = np.concatenate([[True], (user[1:] != user[:-1]) | (times[1:] != times[:-1])])
    index = np.arange(len(user))
    return (index - np.maximum.accumulate(np.where(starts, index, 0))).astype(np.int32)
