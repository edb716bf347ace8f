"""Blocks of whole buckets against a plain cut of one user at a time."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.storage.hashing import combine_lanes, sequence_lanes, to_hex
from raypipe.systems.blocks import BucketBlocks, cut_blocks
from raypipe.systems.summaries import SummariesConfig

LANES = np.random.default_rng(1).integers(0, 2**64, (40, 2), np.uint64)
RECIPE, MERGE = "a" * 32, "b" * 32


def cut(
    histories: list[list[int]],
    block: int = 5,
    window: int | None = 50,
    recipe: str = RECIPE,
    merge: str = MERGE,
    *,
    cumulative: bool = False,
) -> BucketBlocks:
    items = np.array([item for history in histories for item in history], np.int32)
    lengths = np.array([len(history) for history in histories])
    return cut_blocks(
        items,
        lengths,
        LANES,
        block_items=block,
        window_events=window,
        cumulative=cumulative,
        block_recipe=recipe,
        merge_recipe=merge,
    )


def key_of(items: list[int], recipe: str = RECIPE) -> str:
    lanes = sequence_lanes(LANES[np.array(items)], np.array([len(items)]))
    return to_hex(combine_lanes(lanes, recipe)).to_pylist()[0]


def plain_cut(history: list[int], block: int, window: int) -> list[tuple[int, list[int]]]:
    """(number, items) of the blocks that begin within the last `window` events; a block is dropped whole."""
    blocks = [(at // block, history[at : at + block]) for at in range(0, len(history), block)]
    return [found for found in blocks if found[0] * block >= len(history) - window]


@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("window", [5, 7, 10, 50])
def test_blocks_equal_the_plain_cut_of_every_user(block: int, window: int) -> None:
    draw = np.random.default_rng(2)
    histories = [draw.integers(1, 40, length).tolist() for length in [*range(1, 23), 50, 51, 54, 55, 56, 200]]
    found = cut(histories, block, window)
    items = [item for history in histories for item in history]
    for user, history in enumerate(histories):
        places = range(found.bounds[user], found.bounds[user + 1])
        blocks = [(int(found.number[p]), items[found.start[p] : found.start[p] + found.length[p]]) for p in places]
        assert blocks == plain_cut(history, block, window), (user, len(history))
        assert [found.key[p].as_py() for p in places] == [key_of(b) for _, b in blocks]
        assert found.covered[user] == len(history) // block


def test_every_user_keeps_at_least_his_last_block() -> None:
    found = cut([[1], [1, 2, 3, 4, 5], [1] * 6, [1] * 10], window=5)
    assert np.diff(found.bounds).tolist() == [1, 1, 1, 1]
    assert found.number.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValidationError, match="window_events is 4, less than one block of 5 items"):
        SummariesConfig(window_events=4)


def test_new_events_leave_all_full_blocks_alone() -> None:
    history = [n % 39 + 1 for n in range(23)]
    before, after = cut([history]), cut([[*history, 7, 8, 9]])
    assert before.key.to_pylist()[:4] == after.key.to_pylist()[:4]
    assert before.key.to_pylist()[4] != after.key.to_pylist()[4]
    assert (before.covered[0], after.covered[0]) == (4, 5)
    assert before.covered_key[0] != after.covered_key[0]
    assert before.change_key[0] != after.change_key[0]


def test_a_recipes_change_is_seen_where_it_matters() -> None:
    histories = [[1, 2, 3, 4, 5, 6], [7]]
    plain, block, merge = cut(histories), cut(histories, recipe="c" * 32), cut(histories, merge="d" * 32)
    assert set(plain.key.to_pylist()).isdisjoint(block.key.to_pylist())
    assert plain.key.to_pylist() == merge.key.to_pylist()
    for other in (block, merge):
        assert set(plain.change_key.to_pylist()).isdisjoint(other.change_key.to_pylist())


def test_a_change_key_begins_with_the_recipe_that_made_it() -> None:
    assert cut([[1], [2]]).change_key.to_pylist()[0][:16] == MERGE[:16]
    assert len(cut([[1]]).change_key.to_pylist()[0]) == 48


def test_order_and_neighbours_do_not_mix() -> None:
    assert cut([[1, 2]]).change_key != cut([[2, 1]]).change_key
    alone = [cut([history]).change_key.to_pylist()[0] for history in ([1, 2, 3], [4] * 9, [5])]
    assert cut([[1, 2, 3], [4] * 9, [5]]).change_key.to_pylist() == alone


def test_an_empty_bucket_has_no_blocks() -> None:
    found = cut([])
    assert (found.bounds.tolist(), len(found.key), len(found.change_key)) == ([0], 0, 0)


def test_a_cumulative_key_is_of_everything_up_to_its_block() -> None:
    history = [n % 39 + 1 for n in range(63)]
    other = [*history[:12], 5, *history[13:]]
    found = cut([history, other, history[:40]], window=None, cumulative=True)
    one, two, three = (found.key.to_pylist()[found.bounds[u] : found.bounds[u + 1]] for u in range(3))
    assert (len(one), len(three)) == (13, 8)
    assert [a == b for a, b in zip(one, two, strict=True)] == [True, True] + [False] * 11
    assert three == one[:8]
    assert found.full.tolist() == [True] * 12 + [False] + [True] * 12 + [False] + [True] * 8
    assert found.change_key[0] != found.change_key[1]
