"""The shares of many users at once are those of each user by itself."""

import random

import numpy as np
import pytest

from raypipe.metrics.named_values import ItemValues, named_shares
from raypipe.metrics.text import attribute_coverage, attribute_precision, top_values, value_counts

VALUES = [f"v{n}" for n in range(9)]


def shares_one_by_one(named: list[list[str]], histories: list[list[int]], of_items: list[list[str]]) -> np.ndarray:
    found = []
    for mine, history in zip(named, histories, strict=True):
        counts = value_counts(of_items[item] for item in history)
        top = top_values(counts)
        untouched = sum(not counts.get(value) for value in mine) / len(mine) if mine else None
        found.append((attribute_precision(mine, top), attribute_coverage(mine, top), untouched))
    return np.array(found, np.float64).T


@pytest.mark.parametrize("seed", range(5))
def test_many_users_score_as_each_alone(seed: int):
    rng = random.Random(seed)
    of_items = [[], *(rng.sample(VALUES, rng.randint(0, 4)) for _ in range(40))]
    histories = [[rng.randint(1, 40) for _ in range(rng.choice([1, 2, 5, 30]))] for _ in range(200)]
    known = sorted({value for mine in of_items for value in mine})
    named = [rng.sample(known, rng.randint(0, 4)) for _ in histories]
    lengths = np.array([len(history) for history in histories])
    found = named_shares(named, np.concatenate(histories).astype(np.int32), lengths, ItemValues(of_items))
    expected = shares_one_by_one(named, histories, of_items)
    assert np.isnan(expected).any(axis=1).tolist() == [True, True, True]
    assert len(np.unique(expected[1])) > 5
    np.testing.assert_array_equal([found.precision, found.coverage, found.untouched], expected)


def test_users_without_values_and_no_users_at_all_have_no_shares():
    values = ItemValues([[], ["a"], []])
    found = named_shares([["a"], []], np.array([2, 2], np.int32), np.array([1, 1]), values)
    assert np.isnan(found.precision).all()
    assert np.isnan(found.coverage).all()
    np.testing.assert_array_equal(found.untouched, [1.0, np.nan])
    assert len(named_shares([], np.zeros(0, np.int32), np.zeros(0, np.int64), values).precision) == 0
    assert np.isnan(named_shares([[]], np.array([1], np.int32), np.array([1]), ItemValues([[], []])).precision).all()
