"""Which published rows are published again."""

from __future__ import annotations

import pyarrow as pa

from raypipe.pipeline.user_rows import CarriedOver, carry_over

SAME, OTHER = "a" * 16, "b" * 16


def rows(*pairs: tuple[str, str]) -> pa.Table:
    users, keys = zip(*pairs, strict=True)
    return pa.table({"user_id": users, "change_key": keys})


def carried(before: pa.Table, made: list[str]) -> CarriedOver:
    """Of a bucket of the users a, b and c."""
    keys = pa.array([f"{SAME}now", f"{SAME}now", f"{SAME}now"])
    return carry_over(before, before["user_id"], pa.array(["a", "b", "c"]), keys, pa.array(made, pa.string()))


def test_who_has_no_new_row_keeps_the_older_one_with_its_key() -> None:
    before = rows(("a", f"{SAME}now"), ("b", f"{SAME}old"), ("c", f"{SAME}old"))
    found = carried(before, made=["c"])
    assert found.rows.to_pylist() == before.to_pylist()[:2]
    assert found.stale == 1
    assert carried(before, made=["b", "c"]).rows.to_pylist() == before.to_pylist()[:1]


def test_older_rows_of_another_recipe_and_of_who_is_gone_are_left_behind() -> None:
    before = rows(("a", f"{OTHER}now"), ("gone", f"{SAME}now"), ("b", f"{SAME}old"))
    found = carried(before, made=[])
    assert (found.rows["user_id"].to_pylist(), found.stale) == (["b"], 1)


def test_of_several_rows_of_a_user_all_stay_or_none() -> None:
    before = rows(("a", f"{SAME}old"), ("a", f"{SAME}old"), ("b", f"{SAME}old"), ("b", f"{SAME}old"))
    found = carried(before, made=["b"])
    assert (found.rows["user_id"].to_pylist(), found.stale) == (["a", "a"], 1)


def test_a_first_night_carries_nothing_over() -> None:
    found = carried(rows(("a", f"{SAME}now")).slice(0, 0), made=["a", "b", "c"])
    assert (found.rows.num_rows, found.stale) == (0, 0)
