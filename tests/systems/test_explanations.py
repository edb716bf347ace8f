"""What a rule writes of a recommendation, and what it gives what others write."""

from __future__ import annotations

from collections import Counter

import pytest

from raypipe.metrics.text import Vocabulary
from raypipe.systems.explanations import contradicts, reference_explanation, rule_explanation_rating

KINDS = Vocabulary(["Drama", "War", "Comedy", "Horror", "Musical"])
HISTORY = Counter({"Drama": 5, "War": 4, "Comedy": 3, "Horror": 1})


@pytest.mark.parametrize(
    ("decision", "label", "text", "beside", "rating"),
    [
        ("no", "yes", "The choices are mostly Drama, and it is Musical.", False, 0),
        ("yes", "yes", "Because it is good.", False, 1),
        ("yes", "yes", "The choices are mostly Drama, and it is Musical.", True, 1),
        ("yes", "yes", "The choices are mostly Drama.", False, 2),
        ("yes", "yes", "It is Musical, with some Horror.", False, 2),
        ("yes", "yes", "The choices are mostly Drama, and it is Musical.", False, 3),
        ("no", None, "The choices are mostly Drama, and it is Musical.", False, 3),
        ("yes", "yes", "No. The choices are mostly Drama, and it is Musical.", False, 0),
        ("no", "yes", "Yes. The choices are mostly Drama, and it is Musical.", False, 0),
        ("no", None, "Yes. The choices are mostly Drama, and it is Musical.", False, 0),
        ("no", "no", "No. The choices are mostly Drama, and it is Musical.", False, 3),
    ],
)
def test_a_rating_follows_decision_ground_and_what_is_named(
    decision: str, label: str | None, text: str, beside: bool, rating: int
) -> None:
    assert rule_explanation_rating(decision, label, text, KINDS, HISTORY, ["Musical"], beside) == rating


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes. The choices are mostly Drama.", "yes"),
        ("no, it is not.", "no"),
        ("**No** — the choices are War", "no"),
        (" “Yes it would", "yes"),
        ("No\nThe choices", "no"),
        ("No", "no"),
        ("No - Horror is rare", "no"),
        ("No wonder that it fits", None),
        ("No-nonsense War films", None),
        ("No Escape is War, as they are", None),
        ("Yes Man is Comedy", None),
        ("Yesterday. No.", None),
        ("The answer is no.", None),
        ("", None),
    ],
)
def test_a_text_contradicts_a_decision_where_it_begins_with_the_other_answer(text: str, answer: str | None) -> None:
    assert contradicts("yes", text) is (answer == "no")
    assert contradicts("no", text) is (answer == "yes")


def test_a_reference_names_the_taste_and_whether_the_item_has_a_part_in_it() -> None:
    assert reference_explanation("Yes", "Heat", HISTORY, ["Drama"]) == (
        "Yes. The choices are mostly Drama, War and Comedy. Heat is Drama, as they are."
    )
    assert reference_explanation("No", "Heat", HISTORY, ["Horror", "Musical"]).endswith(
        "Horror and Musical, as they are not."
    )
    assert reference_explanation("No", "Heat", Counter(), []) == "No. The choices have nothing in common."
