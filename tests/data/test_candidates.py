"""Candidate sets: the same for everybody who asks, without anything the user chose, and without a favourite place."""

from __future__ import annotations

import numpy as np

from raypipe.data.candidates import CandidateSets, candidate_sets, draw_unseen, history_seeds, ranks_at
from raypipe.storage.hashing import mix

ITEMS, USERS = 60, 400


def drawn(rows: np.ndarray, seed: int = 0, negatives: int = 20) -> CandidateSets:
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, ITEMS + 1, rng.integers(3, 30)) for _ in range(USERS)]
    mine = [histories[row] for row in rows]
    lanes = mix(np.arange(2 * USERS, dtype=np.uint64)).reshape(USERS, 2)
    seeds = history_seeds(mix(rows.astype(np.uint64)), lanes[rows], seed)
    lengths = np.array([len(history) for history in mine])
    seen = np.concatenate(mine).astype(np.int32)
    sets, filled = candidate_sets(rows, seeds, seen[lengths.cumsum() - 1], seen, lengths, ITEMS, negatives)
    assert filled.all()
    for history, items, target in zip(mine, sets.items, sets.targets, strict=True):
        assert target == history[-1]
        assert set(items.tolist()) & set(history.tolist()) == {target}
        assert len(set(items.tolist())) == negatives + 1
    return sets


def test_a_users_set_follows_from_seed_id_and_history_and_not_from_who_else_is_asked() -> None:
    everybody = drawn(np.arange(USERS))
    some = drawn(np.array([7, 3, 399]))
    np.testing.assert_array_equal(some.items, everybody.items[[7, 3, 399]])
    np.testing.assert_array_equal(some.places, everybody.places[[7, 3, 399]])
    other = drawn(np.arange(USERS), seed=1)
    assert (other.items != everybody.items).any(1).all()


def test_another_history_is_another_draw() -> None:
    user, lanes = np.array([5], np.uint64), np.array([[1, 2], [1, 3], [2, 1]], np.uint64)
    assert len({int(history_seeds(user, lane[None], 0)[0]) for lane in lanes}) == 3


def test_the_chosen_item_stands_everywhere_alike_often_and_no_item_is_drawn_more_than_others() -> None:
    sets = drawn(np.arange(USERS))
    places = np.bincount(sets.places, minlength=21)
    assert places.min() > 5
    assert places.max() < 40
    seeds = mix(np.arange(6_000, dtype=np.uint64))
    items, _ = draw_unseen(seeds, np.zeros(0, np.int32), np.zeros(len(seeds), np.int64), 30, 5)
    counts = np.bincount(items.ravel(), minlength=31)[1:]
    assert abs(counts - 1_000).max() < 150


def test_a_constant_scorer_ranks_the_chosen_item_beside_all_others() -> None:
    sets = drawn(np.arange(USERS))
    above, same = sets.ranks(np.zeros(sets.items.shape))
    assert (above == 0).all()
    assert (same == 21).all()
    above, same = sets.ranks(-np.abs(sets.items - sets.targets[:, None]))
    assert (above == 0).all()
    assert (same == 1).all()


def test_who_left_too_few_items_unseen_has_no_set() -> None:
    seen, lengths = np.array([1, 2, 3, 4, 4, 4, 1], np.int32), np.array([4, 3])
    items, filled = draw_unseen(np.array([3, 4], np.uint64), seen, lengths, 6, 3)
    assert filled.tolist() == [False, True]
    assert set(items[1].tolist()) <= {2, 3, 5, 6}
    sets, _ = candidate_sets(np.arange(2), np.array([3, 4], np.uint64), seen[[3, 6]], seen, lengths, 6, 3)
    assert sets.keys.tolist() == [1]


def test_what_is_no_number_is_below_all_that_are() -> None:
    nan, places = np.nan, np.array([0, 1, 1, 0])
    scores = np.array([[nan, 0.1, -np.inf], [nan, 0.1, nan], [nan, nan, nan], [0.3, 0.3, nan]])
    above, same = ranks_at(scores, places)
    assert above.tolist() == [1, 0, 0, 0]
    assert same.tolist() == [2, 1, 3, 2]
