"""Rubrics, ratings and the agreement of judges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from raypipe.engines.echo import EchoEngine
from raypipe.systems.judges import EngineJudge, Rubric, agreement, rating_of


@pytest.mark.parametrize(
    ("answer", "rating"),
    [("3", 3), ("Rating: 0.", 0), ("I would say 2 of 3", 2), ("4", None), ("", None), ("good", None)],
)
def test_a_rating_is_the_first_number_if_it_is_one(answer: str, rating: int | None) -> None:
    assert rating_of(answer) == rating


def test_a_title_that_reads_like_a_placeholder_stays_a_title() -> None:
    prompt = Rubric(prompt="{items} / {summary}").ask({"items": "The {summary} Film", "summary": "Drama."})
    assert prompt.text == "The {summary} Film / Drama."


def test_a_rubric_that_asks_for_what_there_is_not_says_so() -> None:
    with pytest.raises(ValueError, match=r"asks for \{score\}, which there is not"):
        Rubric(prompt="{score} {items}").ask({"items": "x"})


def test_an_engine_judge_rates_in_the_order_of_the_cases_and_counts_its_cost() -> None:
    judge = EngineJudge(EchoEngine(), Rubric(prompt="the one {number}"))
    # The echo ends with a hash, which may begin with a digit; the case's own number comes first.
    assert judge.rate([{"number": str(number)} for number in (2, 0, 3, 7)]) == [2, 0, 3, None]
    assert (judge.calls, judge.tokens_in) == (4, 12)


def test_agreement_is_the_weighted_kappa_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 4, 200)
    other = np.clip(one + rng.integers(-1, 2, 200), 0, 3)
    expected = cohen_kappa_score(one, other, weights="quadratic")
    assert agreement(one.tolist(), other.tolist()) == pytest.approx(expected)
    assert agreement([*one.tolist(), None], [*other.tolist(), 3]) == pytest.approx(expected)
    assert agreement([1, 2], [1, 2]) == 1
    assert abs(agreement(one.tolist(), rng.permutation(other).tolist()) or 0) < 0.15


def test_judges_without_a_case_in_common_or_of_one_mind_about_everyone_have_no_agreement() -> None:
    assert agreement([None, 1], [2, None]) is None
    assert agreement([2, 2], [2, 2]) is None
