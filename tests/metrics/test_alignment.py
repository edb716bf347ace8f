"""Alignment with a recommender against enumeration, with answers that must be at chance."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from raypipe.metrics.alignment import (
    GAINS,
    decisions,
    order_ndcg,
    ranking_figures,
    reconstruction_figures,
    retrieval_figures,
    unseen_retrieval_figures,
)

ORDER = ["Alien", "Aliens", "Alien³", "Heat", "Big"]
KNOWN = {*ORDER, "Speed", "Fargo"}


def ranked(answer: list[str]) -> float:
    return ranking_figures([answer], [ORDER])["T2 NDCG@5"].value


def test_retrieval_finds_the_one_right_title_at_its_place() -> None:
    answers = [
        ["Alien", "Heat"],
        ["Heat", "Alien"],
        ["Speed", "Aliens", "Heat", "Big", "Fargo", "Alien"],
        [],
        ["Aliens"],
    ]
    figures = retrieval_figures(answers, ["Alien"] * 5, KNOWN)
    assert figures["T1 HR@5"].value == pytest.approx(2 / 5)
    assert figures["T1 NDCG@5"].value == pytest.approx((1 + 1 / np.log2(3)) / 5)


def test_in_retrieval_a_repeated_title_takes_no_place_and_an_unknown_one_does() -> None:
    answers = [["Heat", "Heat", "Alien"], ["Heet", "Hot", "Alien"]]
    figures = retrieval_figures(answers, ["Alien"] * 2, KNOWN)
    assert figures["T1 NDCG@5"].value == pytest.approx((1 / np.log2(3) + 1 / np.log2(4)) / 2)
    assert figures["T1 valid"].value == pytest.approx((1 + 1 / 3) / 2)


def test_titles_a_user_has_seen_take_no_place_among_the_unseen() -> None:
    answers = [["Heat", "Big", "Heet", "Alien"], ["Heat", "Alien"], ["Alien"], ["Heat"] * 9, ["Big"]]
    figures = unseen_retrieval_figures(answers, ["Alien"] * 5, [{"Heat", "Big"}, set(), {"Alien"}, set(), {"Big"}])
    assert figures["T1 HR@5 unseen"].value == pytest.approx(2 / 5)
    assert figures["T1 NDCG@5 unseen"].value == pytest.approx((1 / np.log2(3) + 1 / np.log2(3)) / 5)


def test_every_order_scores_as_in_scikit_learn_and_a_random_one_6131() -> None:
    values = []
    for order in permutations(range(5)):
        scores = -np.argsort(order).astype(np.float64)  # candidate → place
        expected = ndcg_score([GAINS], [scores], k=5)
        assert ranked([ORDER[at] for at in order]) == pytest.approx(expected)
        values.append(expected)
    assert np.mean(values) == pytest.approx(0.6131, abs=1e-4)
    assert ranked(ORDER) == pytest.approx(1)
    assert order_ndcg(np.full((3, 5), 7.0)).tolist() == pytest.approx([np.mean(values)] * 3)


@pytest.mark.parametrize("named", [[], ["Heat"], ["Big", "Alien"], ["Aliens", "Heat", "Big"], ORDER[:4]])
def test_candidates_left_out_share_the_remaining_places(named: list[str]) -> None:
    rest = [title for title in ORDER if title not in named]
    expected = np.mean([ranked([*named, *order]) for order in permutations(rest)])
    assert ranked(named) == pytest.approx(expected)
    assert ranking_figures([named], [ORDER])["T2 named"].value == pytest.approx(len(named) / 5)


def test_in_an_order_what_is_repeated_or_made_up_takes_no_place() -> None:
    assert ranked(["Rocky", "Alien", "Alien", "Speed", "Aliens", "Alien³", "Heat", "Alien", "Big"]) == pytest.approx(1)


@pytest.mark.parametrize("levels", [2, 4])
def test_tied_scores_count_as_the_mean_over_all_orders_of_those_tied(levels: int) -> None:
    for scores in np.random.default_rng(levels).integers(0, levels, (20, 5)):
        orders = [sorted(order, key=lambda at: -scores[at]) for order in permutations(range(5))]
        expected = np.mean([ranked([ORDER[at] for at in order]) for order in orders])
        assert order_ndcg(scores[None].astype(np.float32))[0] == pytest.approx(expected)


def test_a_decision_is_the_higher_score_and_a_tie_is_half_right() -> None:
    yes, no = np.array([2.0, 2.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 2.0, 0.0, 0.0])
    assert decisions(yes, no, np.array([True, False, False, True, False])).tolist() == [1, 0, 1, 0.5, 0.5]


def test_reconstruction_covers_the_history_and_tells_valid_titles() -> None:
    answers = [["Alien", "Rocky", "Heat", "Heat"], [], ["Aliens"]]
    figures = reconstruction_figures(answers, [["Alien", "Big", "Alien"], ["Big"], ["Alien"]], KNOWN)
    assert figures["T6 HCR"].value == pytest.approx(1 / 2 / 3)
    assert figures["T6 valid"].value == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_without_answers_there_are_no_figures() -> None:
    assert np.isnan(retrieval_figures([], [], KNOWN)["T1 HR@5"].value)
    assert np.isnan(ranking_figures([], [])["T2 NDCG@5"].value)
    assert np.isnan(reconstruction_figures([], [], KNOWN)["T6 HCR"].value)
