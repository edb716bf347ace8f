"""What an answer names of a history, by exact titles."""

from __future__ import annotations

import itertools
import random

import pytest

from raypipe.metrics.recovery import recovered, recovered_places, rouge_l, titles_in, valid_ratio

KNOWN = {"Alien", "Aliens", "Face; Off", "One; Two; Three", "M*A*S*H", "Mr. Jr.", "Vol.; I.", "Dune", "Dune."}


@pytest.mark.parametrize(
    ("answer", "titles"),
    [
        ("Alien; Aliens.", ["Alien", "Aliens"]),
        (" Face; Off; Alien", ["Face; Off", "Alien"]),
        ("One; Two; Three; Face", ["One; Two; Three", "Face"]),
        ("One; Two", ["One", "Two"]),
        ("M*A*S*H; ; Alien", ["M*A*S*H", "Alien"]),
        ("Alien; Mr. Jr.", ["Alien", "Mr. Jr."]),
        ("Mr. Jr.; Alien.", ["Mr. Jr.", "Alien"]),
        ("Alien; Mr. Jr..", ["Alien", "Mr. Jr."]),
        ("Alien; Vol.; I.", ["Alien", "Vol.; I."]),
        ("Face; Off.", ["Face; Off"]),
        ("Dune; Dune.", ["Dune", "Dune."]),
        ("Alien; unheard of.", ["Alien", "unheard of"]),
        ("Alien; .", ["Alien"]),
        ("", []),
    ],
)
def test_pieces_of_an_answer_are_whole_titles(answer: str, titles: list[str]) -> None:
    assert titles_in(answer, KNOWN) == titles


def test_a_title_within_another_is_not_recovered_by_it() -> None:
    assert recovered(["Aliens"], ["Alien"]) == 0
    assert recovered(["Aliens", "M*A*S*H"], ["M*A*S*H", "Alien"]) == 0.5
    assert recovered_places(["b"], ["a", "b", "b"]) == [False, True, True]


def test_a_title_counts_once_however_often_it_stands_there() -> None:
    assert recovered(["a", "a", "a"], ["a", "b"]) == 0.5
    assert recovered(["a"], ["a", "a", "b"]) == 0.5
    assert recovered(["a"], []) == 0


def test_naming_more_titles_than_a_history_has_is_no_better_guess() -> None:
    assert recovered(["x", "x", "y", "a", "b"], ["a", "b"]) == 0
    assert recovered(["x", "x", "a", "b"], ["b", "a"]) == 0.5
    assert recovered_places(["x", "x", "a", "b"], ["b", "a"]) == [False, True]


def test_valid_pieces_are_titles_of_the_catalogue() -> None:
    assert valid_ratio(["Alien", "Predator"], KNOWN) == 0.5
    assert valid_ratio([], KNOWN) == 0


def test_rouge_l_is_the_longest_common_subsequence_by_brute_force() -> None:
    def longest(one: list[str], other: list[str]) -> int:
        subsequences = (
            [one[i] for i in chosen]
            for size in range(len(one), -1, -1)
            for chosen in itertools.combinations(range(len(one)), size)
        )
        return next(
            len(words)
            for words in subsequences
            if all(any(w == o for o in rest) for rest in [iter(other)] for w in words)
        )

    draw = random.Random(0)
    for _ in range(50):
        one, other = (draw.choices("abc", k=draw.randint(1, 7)) for _ in range(2))
        expected = 2 * longest(one, other) / (len(one) + len(other))
        assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)
    assert rouge_l("a b", "a b") == 1
    assert rouge_l("", "a") == 0
