"""Seeds of what a recommender samples, DreamRec's oracles: one way for lists, labels, judges and explanations, so that all of them
are of what is recommended."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.recommenders.windows import Histories, stretches
from raypipe.storage.hashing import U64, digest_lanes, event_lanes, prefix_lanes, stable_hash
from raypipe.storage.workspace import Workspace


def user_seeds(users: pa.Array, history_keys: pa.Array) -> NDArray[np.int64]:
    """Of what is sampled for each user, from the user and the history alone: [users]."""
    return _seeds(stable_hash(users), digest_lanes(history_keys)[:, 0])


def read_event_seeds(workspace: Workspace, version: int, items: pa.Table) -> NDArray[np.int64]:
    """After every event of everybody, in the order of `read_histories`, the seed that `user_seeds` gives where the history ends
    there: int64 [events]. `items` are the rows of the catalogue in order of index.

    Made of what is before, so that what follows moves nothing; and of all items, those that a model never saw too.
    """
    rows = (
        workspace.tables["histories"].read(version, ["user_id", "items", "times"]).sort_by("user_id").combine_chunks()
    )
    lists = rows["items"].combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    chosen = lists.flatten().to_numpy(zero_copy_only=False)
    times = rows["times"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    lanes = np.concatenate([np.zeros((1, 2), np.uint64), digest_lanes(items["content_hash"])])
    before = prefix_lanes(event_lanes(lanes[chosen], times), lengths)[:, 0]
    return _seeds(np.repeat(stable_hash(rows["user_id"].combine_chunks()), lengths), before)


def known_seeds(seeds: NDArray[np.int64], histories: Histories, hold_out: int, items: int) -> NDArray[np.int64]:
    """Of the events of `histories` those that `without_last(hold_out).within(items)` keeps, each with the seed after the unknown
    items that follow it: a list is of the whole history, whatever of it the model knows."""
    cut = histories.without_last(hold_out)
    seeds = seeds[stretches(histories.starts, cut.lengths)]
    kept = np.flatnonzero(cut.items <= items)
    ends = cut.ends[np.repeat(np.arange(len(cut)), cut.lengths)[kept]]
    return seeds[np.minimum(np.append(kept[1:], len(cut.items))[: len(kept)], ends) - 1]


def _seeds(users: U64, histories: U64) -> NDArray[np.int64]:
    return (users ^ histories).view(np.int64)
