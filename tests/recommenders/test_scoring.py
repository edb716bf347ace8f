"""Top-k and ranks against sorting everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raypipe.metrics.ranking import ndcg
from raypipe.recommenders import scoring
from raypipe.recommenders.scoring import UNRANKED, Filters, most_popular, ranks, top_k
from raypipe.recommenders.sequences import Sequences

BATCH, ITEMS, WIDTH = 9, 53, 4


@pytest.fixture(params=[1, 100, 10**6], ids=lambda size: f"blocks of {size}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BLOCK_SCORES", request.param)


def small_integers(rows: int, seed: int) -> Tensor:
    """Vectors whose inner products are exact and tie often."""
    return torch.randint(-1, 2, (rows, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


def filters() -> Filters:
    allowed = torch.ones(ITEMS + 1, dtype=torch.bool)
    allowed[[4, 40]] = False
    lists = [list(range(1, 1 + n)) for n in range(BATCH)]
    flat = torch.tensor([item for items in lists for item in items])
    return Filters(allowed, Sequences(flat, torch.tensor([len(items) for items in lists])))


def brute_force(queries: Tensor, table: Tensor, chosen: Filters) -> Tensor:
    scores = queries @ table.T
    scores[:, 0] = -math.inf
    if chosen.allowed is not None:
        scores[:, ~chosen.allowed] = -math.inf
    if chosen.excluded is not None:
        scores[chosen.excluded.rows, chosen.excluded.items] = -math.inf
    return scores


@pytest.mark.parametrize("chosen", [Filters(), filters()], ids=["all", "filtered"])
def test_the_best_k_are_exact_and_ties_go_by_index(block: None, chosen: Filters) -> None:
    queries, table = small_integers(BATCH, 1), small_integers(ITEMS + 1, 2)
    items, scores = top_k(queries, table, 12, chosen)
    full = brute_force(queries, table, chosen)
    order = sorted(range(1, ITEMS + 1), key=lambda item: (-full[3, item].item(), item))[:12]
    assert items[3].tolist() == order
    for row in range(BATCH):
        expected = sorted(range(1, ITEMS + 1), key=lambda item, row=row: (-full[row, item].item(), item))[:12]
        assert items[row].tolist() == expected
        assert scores[row].tolist() == full[row, expected].tolist()


def test_what_may_not_be_recommended_never_fills_a_list(block: None) -> None:
    allowed = torch.zeros(ITEMS + 1, dtype=torch.bool)
    allowed[[7, 9]] = True
    items, scores = top_k(small_integers(2, 1), small_integers(ITEMS + 1, 2), 5, Filters(allowed))
    assert [sorted(row) for row in items.tolist()] == [[0, 0, 0, 7, 9]] * 2
    assert (scores[:, 2:] == -math.inf).all()


def test_a_list_longer_than_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="A list of 60 items was asked for and the catalogue has 53"):
        top_k(small_integers(1, 1), small_integers(ITEMS + 1, 2), 60)


@pytest.mark.parametrize("chosen", [Filters(), filters()], ids=["all", "filtered"])
def test_ranks_count_what_is_above_and_what_is_equal(block: None, chosen: Filters) -> None:
    queries, table = small_integers(BATCH, 1), small_integers(ITEMS + 1, 2)
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7, 40, 53])
    above, same = ranks(queries, table, targets, chosen)
    full = brute_force(queries, table, chosen)
    for row, target in enumerate(targets.tolist()):
        own = (queries[row] @ table[target]).item()
        others = [full[row, item].item() for item in range(1, ITEMS + 1) if item != target]
        assert above[row] == sum(score > own for score in others)
        assert same[row] == 1 + sum(score == own for score in others)


def test_a_score_that_is_no_number_is_the_worst(block: None) -> None:
    queries, table = small_integers(BATCH, 1), small_integers(ITEMS + 1, 2)
    targets = torch.arange(1, BATCH + 1)
    expected = [values.clone() for values in ranks(queries, table, targets)]
    queries[4] = math.nan
    expected[0][4], expected[1][4] = UNRANKED, 1
    above, same = ranks(queries, table, targets)
    assert (above.tolist(), same.tolist()) == (expected[0].tolist(), expected[1].tolist())
    assert ndcg(above.numpy()[[4]], same.numpy()[[4]], 10).tolist() == [0.0]
    lost = table.clone()
    lost[50] = math.nan
    without = torch.ones(ITEMS + 1, dtype=torch.bool)
    without[50] = False
    for found, known in zip(
        ranks(queries, lost, targets), ranks(queries, table, targets, Filters(without)), strict=True
    ):
        assert found.tolist() == known.tolist()


@pytest.mark.parametrize("chosen", [Filters(), filters()], ids=["all", "filtered"])
def test_what_has_no_score_is_never_listed(block: None, chosen: Filters) -> None:
    queries, table = small_integers(BATCH, 1), small_integers(ITEMS + 1, 2)
    table[[0, 2, 5, 40, 53]] = math.nan  # item 2 is also seen by some, item 40 not allowed
    table[7, 1] = -math.nan  # with a sign
    queries[6] = math.nan
    full = brute_force(queries, table, chosen)
    for k in (12, ITEMS):
        items, scores = top_k(queries, table, k, chosen)
        for row in range(BATCH):
            known = [item for item in range(1, ITEMS + 1) if full[row, item] > -math.inf]
            expected = sorted(known, key=lambda item, row=row: (-full[row, item].item(), item))[:k]
            rest = k - len(expected)
            assert items[row].tolist() == expected + [0] * rest
            assert scores[row].tolist() == full[row, expected].tolist() + [-math.inf] * rest
        assert items[6].tolist() == [0] * k


def test_whom_nothing_is_known_of_is_told_what_is_popular_and_then_the_rest() -> None:
    allowed = np.array([True, True, False, True, True, True, True])
    assert most_popular([4, 2, 1], allowed, 2).tolist() == [4, 1]
    assert most_popular([4, 2, 1], allowed, 4).tolist() == [4, 1, 3, 5]
    # Item 9 came after the model.
    assert most_popular([4, 2, 1], allowed, 9, excluded={4, 5, 9}).tolist() == [1, 3, 6]
    assert most_popular([2], allowed & ~allowed, 3).tolist() == []


def test_minus_zero_is_zero() -> None:
    items, _ = top_k(torch.tensor([[1.0]]), torch.tensor([[0.0], [-0.0], [0.0], [-0.0]]), 3)
    assert items.tolist() == [[1, 2, 3]]
