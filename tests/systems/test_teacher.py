"""A recommender's predictions as labels, against a search of the whole catalogue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from raypipe.recommenders.windows import Histories
from raypipe.systems import teacher
from raypipe.systems.source import Source
from raypipe.systems.teacher import most_similar, teach, teachable
from tests.systems.sources import ITEMS, LENGTHS, source_of


@pytest.fixture(scope="module", params=["sasrec", "mf"])
def source(request: pytest.FixtureRequest) -> Source:
    return source_of(request.param)


def unseen_scores(source: Source, row: int, events: int) -> dict[int, float]:
    """By item, what the recommender gives it, for items that the first events of a history do not hold."""
    state = torch.from_numpy(source.states(np.array([row]), np.array([events])))
    scores = source.recommender.score(state)[0].tolist()
    seen = set(source.items(row, events))
    return {item: scores[item] for item in range(1, ITEMS + 1) if item not in seen}


@pytest.mark.parametrize("at_once", [2**24, 50])
def test_labels_are_the_recommenders_own_and_of_unseen_items(
    source: Source, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_BLOCK_SCORES", at_once)
    rows = np.repeat(np.arange(len(LENGTHS)), 20)
    events = LENGTHS[rows]
    taught = teach(source, rows, events, np.random.default_rng(0))
    for at, (row, count) in enumerate(zip(rows, events, strict=True)):
        scores = unseen_scores(source, row, count)
        ranked = sorted(scores, key=lambda item: -scores[item])
        assert taught.favourites[at] == ranked[0]
        assert taught.liked[at] in ranked[: len(ranked) // 5]
        assert taught.disliked[at] in ranked[len(ranked) // 2 :]
        candidates = taught.candidates[at].tolist()
        assert len(set(candidates)) == 5
        np.testing.assert_allclose(taught.scores[at], [scores[item] for item in candidates], atol=1e-6)
        assert [candidates[place] for place in taught.orders[at]] == sorted(candidates, key=ranked.index)


def test_every_unseen_item_is_drawn_and_the_pairs_are_drawn_from_all_of_their_share(source: Source) -> None:
    rows = np.zeros(3000, np.int64)
    taught = teach(source, rows, LENGTHS[rows], np.random.default_rng(0))
    scores = unseen_scores(source, 0, int(LENGTHS[0]))
    ranked = sorted(scores, key=lambda item: -scores[item])
    counts = np.bincount(taught.candidates.ravel(), minlength=ITEMS + 1)
    assert set(np.flatnonzero(counts)) == set(ranked)
    assert counts[counts > 0].min() > 0.75 * counts[counts > 0].mean()
    assert set(taught.liked.tolist()) == set(ranked[: len(ranked) // 5])
    assert set(taught.disliked.tolist()) == set(ranked[len(ranked) // 2 :])


def test_equal_scores_are_ordered_by_item() -> None:
    source = source_of("mf")
    source.recommender.table.zero_()
    rows = np.array([1])
    taught = teach(source, rows, LENGTHS[rows], np.random.default_rng(0))
    assert taught.candidates[0][taught.orders[0]].tolist() == sorted(taught.candidates[0].tolist())


def test_the_most_similar_item_is_another_one(source: Source) -> None:
    vectors = source.item_states[1:].astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T - 2 * np.eye(ITEMS)
    assert most_similar(source).tolist() == (likeness.argmax(1) + 1).tolist()


def test_an_item_without_a_score_is_the_last_of_the_unseen_and_nobodys_most_similar() -> None:
    source = source_of("mf")
    row = 1
    lost = min(set(range(1, ITEMS + 1)) - set(source.items(row, int(LENGTHS[row]))))
    before = most_similar(source)
    taught = teach(source, np.array([row]), LENGTHS[[row]], np.random.default_rng(0))
    assert lost != taught.favourites[0]
    source.recommender.table[lost] = np.nan
    source = replace(source)  # whose item states are computed anew
    rows = np.full(400, row)
    again = teach(source, rows, LENGTHS[rows], np.random.default_rng(0))
    assert set(again.favourites.tolist()) == set(taught.favourites.tolist())
    assert lost not in again.liked
    assert lost in again.disliked
    seen = set(source.items(row, int(LENGTHS[row])))
    assert not seen & {*again.liked.tolist(), *again.disliked.tolist()}
    assert (again.candidates == lost).any()
    for candidates, order in zip(again.candidates, again.orders, strict=True):
        assert lost not in candidates[order][:-1]
    found, others = most_similar(source), np.delete(np.arange(ITEMS), lost - 1)
    assert lost not in found
    unchanged = others[before[others] != lost]
    assert found[unchanged].tolist() == before[unchanged].tolist()
    assert len(unchanged) > ITEMS / 2


def test_a_history_that_has_nearly_everything_has_nothing_to_teach() -> None:
    source = source_of()
    small = replace(source, histories=Histories(np.arange(1, 36, dtype=np.int32), np.array([35])))
    assert teachable(small, np.array([30, 31])).tolist() == [True, False]
    with pytest.raises(ValueError, match="leaves 5 of 40 items unseen: too few to ask about"):
        teach(small, np.array([0]), np.array([35]), np.random.default_rng(0))
