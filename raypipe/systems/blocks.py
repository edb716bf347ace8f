"""Blocks of histories and the keys of what they depend on, for a whole bucket at once.

Blocks never move: with 5 items per block, block k of a user is events 5k ... 5k+4 counted from the first event ever,
and a window drops whole blocks. A block's key is a hash of its items' content and of the recipe that summarises it;
with `cumulative` it covers all blocks up to and including this one. A user's change key is a hash of the window's block
keys and of the merge's recipe. Event times are not part of the keys, because the prompts do not show them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.storage.change_keys import keys_of
from raypipe.storage.hashing import combine_lanes, prefix_lanes, sequence_lanes, to_hex

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class BucketBlocks:
    """The blocks inside the window of every user of a bucket, users in order.

    `bounds` [users + 1] delimits each user's blocks. Per block: `number` (counted from the first event ever), `start`
    and `length` (in events; `start` counts over the whole bucket), whether it is `full`, and its `key` (hex). Per user:
    `covered`, the number of full blocks in the whole history, their `covered_key`, and the `change_key`.
    """

    bounds: Integers
    number: Integers
    start: Integers
    length: Integers
    full: NDArray[np.bool_]
    key: pa.Array
    covered: Integers
    covered_key: pa.Array
    change_key: pa.Array


def cut_blocks(
    items: NDArray[np.int32],
    lengths: Integers,
    item_lanes: NDArray[np.uint64],
    *,
    block_items: int,
    window_events: int | None,
    cumulative: bool,
    block_recipe: str,
    merge_recipe: str,
) -> BucketBlocks:
    """Cut the histories of a bucket into blocks.

    `items` [events] are item indices, `lengths` [users] are events per user, `item_lanes` [items + 1, 2] are content
    hashes. If `window_events` is None, every block is in the window.
    """
    lengths = np.asarray(lengths, np.int64)
    blocks = -(-lengths // block_items)
    bounds = np.concatenate([[0], np.cumsum(blocks)])
    number = np.arange(bounds[-1]) - np.repeat(bounds[:-1], blocks)
    event_start = np.repeat(np.cumsum(lengths) - lengths, blocks)
    start = event_start + number * block_items
    length = np.minimum(block_items, np.repeat(lengths, blocks) - number * block_items)
    lanes = combine_lanes(sequence_lanes(item_lanes[items], length), block_recipe)

    covered = lengths // block_items
    full = length == block_items
    covered_key = to_hex(sequence_lanes(lanes[full], covered))
    if cumulative:
        lanes = prefix_lanes(lanes, blocks)
    first = np.zeros_like(lengths)
    if window_events is not None:
        first = -(-np.maximum(lengths - window_events, 0) // block_items)
    inside = number >= np.repeat(first, blocks)
    kept = blocks - first
    return BucketBlocks(
        np.concatenate([[0], np.cumsum(kept)]),
        number[inside],
        start[inside],
        length[inside],
        full[inside],
        to_hex(lanes[inside]),
        covered,
        covered_key,
        keys_of(sequence_lanes(lanes[inside], kept), merge_recipe),
    )
