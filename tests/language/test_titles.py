"""Titles that tell items apart."""

import pytest

from raypipe.language.titles import distinct_titles


def test_items_of_one_title_are_told_apart() -> None:
    assert distinct_titles(["Hamlet", "Emma", "Hamlet", ""], ["a", "b", "c", "d"]) == [
        "Hamlet [a]",
        "Emma",
        "Hamlet [c]",
        " [d]",
    ]


@pytest.mark.parametrize(
    ("titles", "ids", "apart"),
    [
        (["A", "A", "A [1]"], ["1", "2", "3"], ["A [1] [1]", "A [2]", "A [1] [3]"]),
        (["Big  Box", "Big Box", "Box"], ["a", "b", "c"], ["Big  Box [a]", "Big Box [b]", "Box"]),
        (["A", "A"], ["1 1", "1  1"], ["A [1 1] [1]", "A [1  1] [2]"]),
        ([" ", "A"], ["1", "2"], ["  [1]", "A"]),
        ([], [], []),
    ],
)
def test_titles_stay_apart_whatever_they_and_ids_read_like(titles: list[str], ids: list[str], apart: list[str]) -> None:
    assert distinct_titles(titles, ids) == apart
    assert len({" ".join(title.split()) for title in apart}) == len(apart)
