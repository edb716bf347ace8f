"""The catalogue over time: indices only grow, titles are unique, content has a hash."""

from __future__ import annotations

import pyarrow as pa

from raypipe.data.catalogue import ITEM_COLUMNS
from raypipe.data.items import merge_items
from raypipe.storage.schemas import ITEMS

EMPTY = ITEMS.schema.empty_table()


def catalogue(*items: tuple) -> pa.Table:
    """Items as (id, title), (id, title, text), (id, title, text, genres) or (…, year)."""
    filled = [(*item, *("", ("Drama",), None)[len(item) - 2 :]) for item in items]
    rows = [
        {"item_id": id_, "title": title, "text": text, "attributes": [("genre", list(genres))], "year": year}
        for id_, title, text, genres, year in filled
    ]
    return pa.Table.from_pylist(rows, ITEM_COLUMNS)


def merged(old: pa.Table, *items: tuple, partial: bool = False):
    return merge_items(old, catalogue(*items), partial=partial)


def column(rows: pa.Table, name: str) -> list:
    return rows.sort_by("index")[name].to_pylist()


def test_the_first_catalogue_is_numbered_from_one_in_its_own_order() -> None:
    result = merged(EMPTY, ("b", "Beta"), ("a", "Alpha"))
    assert column(result.rows, "item_id") == ["b", "a"]
    assert column(result.rows, "index") == [1, 2]
    assert (result.added, result.changed, result.unavailable) == (2, 0, 0)


def test_indices_are_append_only_whatever_the_later_catalogue_looks_like() -> None:
    first = merged(EMPTY, ("b", "Beta"), ("a", "Alpha")).rows
    second = merged(first, ("z", "Zeta"), ("a", "Alpha"), ("c", "Gamma"), ("b", "Beta"))
    assert column(second.rows, "item_id") == ["b", "a", "z", "c"]
    assert column(second.rows, "index") == [1, 2, 3, 4]
    assert (second.added, second.changed) == (2, 0)


def test_the_same_catalogue_makes_no_difference() -> None:
    items = [("b", "Same", "", ("Drama",), 1990), ("a", "Same", "", ("War",), 1995), ("c", "Same")]
    first = merged(EMPTY, *items)
    again = merged(first.rows, *items)
    assert first.differs_from(EMPTY)
    assert not again.differs_from(first.rows)
    assert (again.added, again.changed) == (0, 0)


def test_changed_text_title_or_attributes_change_the_content_hash_of_that_item_only() -> None:
    items = [("a", "Alpha", "old"), ("b", "Beta"), ("c", "Gamma"), ("d", "Delta")]
    first = merged(EMPTY, *items)
    changed = [("a", "Alpha", "new"), ("b", "Beta", "", ("War",)), ("c", "Gamma 2"), ("d", "Delta")]
    second = merged(first.rows, *changed)
    same = [
        x == y for x, y in zip(column(first.rows, "content_hash"), column(second.rows, "content_hash"), strict=True)
    ]
    assert same == [False, False, False, True]
    assert (second.added, second.changed) == (0, 3)
    assert column(second.rows, "title")[2] == "Gamma 2"


def test_values_cut_differently_are_different_content() -> None:
    one = merged(EMPTY, ("a", "T", "", ("ab", "c"))).rows
    two = merged(EMPTY, ("a", "T", "", ("a", "bc"))).rows
    assert column(one, "content_hash") != column(two, "content_hash")


def test_an_item_that_left_the_catalogue_keeps_its_row_and_becomes_unavailable() -> None:
    first = merged(EMPTY, ("a", "Alpha", "its text"), ("b", "Beta"))
    second = merged(first.rows, ("b", "Beta"))
    assert column(second.rows, "available") == [False, True]
    assert column(second.rows, "text") == ["its text", ""]
    assert column(second.rows, "content_hash") == column(first.rows, "content_hash")
    assert (second.changed, second.unavailable) == (0, 1)
    assert second.differs_from(first.rows)
    back = merged(second.rows, ("a", "Alpha", "its text"), ("b", "Beta"))
    assert column(back.rows, "available") == [True, True]
    assert not back.differs_from(first.rows)


def test_a_partial_catalogue_takes_nothing_away() -> None:
    first = merged(EMPTY, ("a", "Alpha"), ("b", "Beta"), ("c", "Gamma"))
    without_b = merged(first.rows, ("a", "Alpha"), ("c", "Gamma"))
    second = merged(without_b.rows, ("c", "Gamma 2"), ("d", "Delta"), partial=True)
    assert column(second.rows, "available") == [True, False, True, True]
    assert (second.added, second.changed, second.unavailable) == (1, 1, 1)


def test_titles_are_unique_and_the_first_holder_keeps_his() -> None:
    first = merged(EMPTY, ("a", "Hamlet", "", (), 1948), ("b", "Hamlet", "", (), 1990), ("c", "Hamlet"))
    assert column(first.rows, "title") == ["Hamlet", "Hamlet (1990)", "Hamlet [c]"]
    second = merged(first.rows, ("d", "Hamlet", "", (), 1996), partial=True)
    assert column(second.rows, "title") == ["Hamlet", "Hamlet (1990)", "Hamlet [c]", "Hamlet (1996)"]
    assert second.changed == 0
