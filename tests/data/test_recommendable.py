"""Which items may be recommended, against a loop over all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from raypipe.data.attributes import ATTRIBUTES
from raypipe.data.recommendable import (
    UnknownValueError,
    attributes_of,
    holders_of,
    narrowed,
    recommendable,
    unknown_denied,
)

GENRES = [["War"], ["War", "Drama"], ["Drama"], [], ["War"], None]
YEARS = ["1990", "1990", "1991", "1991", "1990", "1990"]
ITEMS = pa.table(
    {
        "item_id": [f"i{n}" for n in range(1, 7)],
        "available": [True, True, True, True, False, True],
        "attributes": pa.array(
            [[("genre", genre), ("year", [year])] for genre, year in zip(GENRES, YEARS, strict=True)], ATTRIBUTES
        ),
    }
)


@pytest.mark.parametrize("denied", [frozenset(), frozenset({"i1"}), frozenset({"i2", "i6", "i66"})], ids=sorted)
def test_what_is_left_is_available_not_denied_and_has_every_value(denied: frozenset[str]) -> None:
    holders = holders_of(attributes_of(ITEMS))
    pairs = [("genre", "War"), ("genre", "Drama"), ("year", "1990"), ("year", "1991")]
    for only in itertools.chain.from_iterable(itertools.combinations(pairs, size) for size in range(4)):
        expected = [False]
        for row in ITEMS.to_pylist():
            has = all(value in (dict(row["attributes"])[name] or ()) for name, value in only)
            expected.append(row["available"] and row["item_id"] not in denied and has)
        allowed = recommendable(ITEMS, denied)
        assert narrowed(allowed, holders, only).tolist() == expected
        # A model of fewer items than the catalogue asks for those it knows.
        assert narrowed(allowed[:4], holders, only).tolist() == expected[:4]


def test_a_value_that_no_item_has_is_told() -> None:
    with pytest.raises(UnknownValueError, match="No item has 'Poetry' in its attribute 'genre'"):
        narrowed(np.ones(7, bool), holders_of(attributes_of(ITEMS)), [("genre", "Poetry")])


def test_an_empty_catalogue_recommends_nothing() -> None:
    assert recommendable(ITEMS.slice(0, 0), {"i1"}).tolist() == [False]


def test_denied_ids_that_no_item_has_are_counted() -> None:
    assert unknown_denied(ITEMS, {"i1", "i6"}) == unknown_denied(ITEMS, ()) == ""
    told = unknown_denied(ITEMS, {"i1", "I2", "i33"})
    assert told == "2 of 3 denied ids are no item's and deny nothing, for example 'I2'"
