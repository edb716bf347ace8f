"""Titles that tell items apart."""

from raypipe.language.titles import distinct_titles


def test_items_of_one_title_are_told_apart() -> None:
    assert distinct_titles(["Hamlet", "Emma", "Hamlet", ""], ["a", "b", "c", "d"]) == [
        "Hamlet [a]",
        "Emma",
        "Hamlet [c]",
        " [d]",
    ]
