"""Boosted trees find what is planted, and learn each event from counts of what came before it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from raypipe.data.candidates import CandidateSets, candidate_sets
from raypipe.metrics.ranking import candidate_metrics
from raypipe.recommenders.windows import Histories
from raypipe.storage.hashing import mix
from raypipe.systems.boosted_trees import CountsAndTexts, TreesConfig
from raypipe.systems.candidate_facts import text_vectors

ITEMS, USERS, EVENTS = 40, 120, 7
TREES = TreesConfig(iterations=20, negatives=10)


def chains() -> Histories:
    """Every item is followed by the next one."""
    starts = np.random.default_rng(0).integers(0, ITEMS, USERS)
    items = (starts[:, None] + np.arange(EVENTS)) % ITEMS + 1
    return Histories(items.ravel().astype(np.int32), np.arange(1, USERS + 1) * EVENTS)


def asked() -> CandidateSets:
    whole = chains()
    seeds = mix(np.arange(USERS, dtype=np.uint64))
    targets = whole.items[whole.ends - 1]
    return candidate_sets(np.arange(USERS), seeds, targets, whole.items, whole.lengths, ITEMS, 20)[0]


def recall(scores: NDArray[np.float64]) -> float:
    return float(candidate_metrics(*asked().ranks(scores))["Recall@3"].mean())


def test_what_follows_what_is_found() -> None:
    past = chains().without_last(1)
    vectors = text_vectors([f"item {number}" for number in range(ITEMS)])
    trees = TREES.fit(past, ITEMS, lambda base: CountsAndTexts(base, vectors, 25))
    assert recall(trees.scores(past, asked().items)) > 0.95
    # Of histories that tell nothing it learns nothing.
    shuffled = Histories(np.random.default_rng(1).permutation(past.items), past.ends)
    blind = TREES.fit(shuffled, ITEMS, lambda base: CountsAndTexts(base, vectors, 25))
    assert recall(blind.scores(shuffled, asked().items)) < 0.35


class Blank:
    """Sees nothing."""

    def values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.zeros((*candidates.shape, 1), np.float32)


def test_counts_end_before_the_event_that_is_learnt_and_who_sees_nothing_is_at_chance() -> None:
    past = chains().without_last(1)
    bases: list[Histories] = []

    def blank(base: Histories) -> Blank:
        bases.append(base)
        return Blank()

    trees = TREES.fit(past, ITEMS, blank)
    assert [int(base.lengths[0]) for base in bases] == [EVENTS - 2, EVENTS - 3, EVENTS - 4, EVENTS - 1]
    assert recall(trees.scores(past, asked().items)) == pytest.approx(3 / 21)


def test_histories_of_one_event_teach_nothing() -> None:
    with pytest.raises(ValueError, match="No history has two events"):
        TREES.fit(chains().without_last(EVENTS - 1), ITEMS, lambda _: Blank())
