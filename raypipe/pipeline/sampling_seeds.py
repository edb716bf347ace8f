"""Seeds of what a recommender samples, as DreamRec does its oracles.

Lists, labels, judges and explanations take their seeds in one way, so that all of them are of what is recommended.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.recommenders.windows import Histories, stretches
from raypipe.storage.hashing import U64, digest_lanes, event_lanes, prefix_lanes, stable_hash
from raypipe.storage.workspace import Workspace


def user_seeds(users: pa.Array, history_keys: pa.Array) -> NDArray[np.int64]:
    """The seeds of what is sampled for each user, from the user and the history alone: [users]."""
    return _seeds(stable_hash(users), digest_lanes(history_keys)[:, 0])


def read_event_seeds(workspace: Workspace, version: int, items: pa.Table) -> NDArray[np.int64]:
    """A seed after every event of everybody, in the order of `read_histories`: int64 [events].

    It is the one that `user_seeds` gives if the history ends there. `items` are the rows of the catalogue in order of
    index. A seed is made of the events up to its own, so that what follows changes nothing. It is made of all items,
    including those that a model never saw.
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
    """The seeds of those events of `histories` that `without_last(hold_out).within(items)` keeps.

    Each is the seed after the unknown items that follow the event, as a list is of the whole history, whatever of it
    the model knows.
    """
    cut = histories.without_last(hold_out)
    seeds = seeds[stretches(histories.starts, cut.lengths)]
    kept = np.flatnonzero(cut.items <= items)
    ends = cut.ends[np.repeat(np.arange(len(cut)), cut.lengths)[kept]]
    return seeds[np.minimum(np.append(kept[1:], len(cut.items))[: len(kept)], ends) - 1]


def _seeds(users: U64, histories: U64) -> NDArray[np.int64]:
    return (users ^ histories).view(np.int64)
