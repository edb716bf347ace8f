"""Ranking metrics against scikit-learn and enumeration; a scorer without an opinion is as good as chance."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from raypipe.metrics import lists as lists_metrics
from raypipe.metrics.lists import collapse, coverage, diversity, novelty
from raypipe.metrics.published import published
from raypipe.metrics.ranking import Mean, candidate_metrics, hit_rate, ndcg, ranking_metrics, reciprocal_rank


def counted(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = scores[np.arange(len(targets)), targets][:, None]
    return (scores > own).sum(1), (scores == own).sum(1)


@pytest.mark.parametrize("levels", [3, 1000])
def test_ndcg_is_that_of_scikit_learn_ties_included(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (40, 25)).astype(float)
    targets = rng.integers(0, 25, 40)
    relevance = np.eye(25)[targets]
    above, same = counted(scores, targets)
    for k in (1, 5, 10):
        expected = [ndcg_score(relevance[row : row + 1], scores[row : row + 1], k=k) for row in range(40)]
        np.testing.assert_allclose(ndcg(above, same, k), expected)


def test_ties_count_as_the_mean_over_all_orders() -> None:
    scores, target, k = [2.0, 1.0, 1.0, 1.0, 0.0], 2, 3
    above, same = counted(np.array([scores]), np.array([target]))
    ranks = []
    for order in permutations(range(5)):
        by_score = sorted(order, key=lambda item: -scores[item])  # stable: ties stay in this order
        ranks.append(by_score.index(target) + 1)
    assert hit_rate(above, same, k)[0] == pytest.approx(np.mean([rank <= k for rank in ranks]))
    reciprocal = np.mean([1 / rank if rank <= k else 0 for rank in ranks])
    assert reciprocal_rank(above, same, k)[0] == pytest.approx(reciprocal)


def test_a_constant_scorer_is_at_chance() -> None:
    above, same = np.zeros(7, np.int64), np.full(7, 200)
    metrics = ranking_metrics(above, same)
    assert metrics["HR@10"].value == pytest.approx(10 / 200)
    assert metrics["NDCG@10"].value == pytest.approx((1 / np.log2(np.arange(2, 12))).sum() / 200)
    assert set(metrics) == {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in (5, 10, 20)}


def test_the_interval_is_that_of_a_mean() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert Mean.of(values).half_width == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(5))
    assert np.isnan(Mean.of(np.array([])).value)


def test_diversity_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    found, vectors = rng.integers(0, 9, (50, 4)), rng.normal(size=(9, 3)).astype(np.float32)
    whole = diversity(found, vectors)
    monkeypatch.setattr(lists_metrics, "_LISTS_AT_ONCE", 7)
    assert diversity(found, vectors) == pytest.approx(whole)


def test_lists_are_told_apart_by_coverage_novelty_and_diversity() -> None:
    lists = np.array([[1, 2], [1, 3], [4, 0]])
    assert coverage(lists, 8) == 0.5
    counts = np.array([0, 4, 2, 1, 1, 0, 0, 0, 0])
    assert novelty(lists, counts) == pytest.approx(np.mean([1, 2, 1, 3, 3]))
    vectors = np.array([[9, 9], [1, 0], [0, 2], [-3, 0], [1, 1]], np.float32)
    # 1 and 2 are orthogonal, 1 and 3 opposed; a list of one has no pairs.
    assert diversity(lists, vectors) == pytest.approx((1 + 2) / 2)


def test_collapse_tells_spread_from_one_direction() -> None:
    spread = np.random.default_rng(0).normal(size=(2001, 64)).astype(np.float32)
    assert collapse(spread) < 0.05
    assert collapse(spread * 0.01 + 1) > 0.99


def test_figures_are_published_for_the_data_they_were_measured_on_alone() -> None:
    known = published(6_040, 1_000_209, "sasrec")
    assert known is not None
    assert known.values == {"HR@10": 0.3159, "NDCG@10": 0.1857}
    assert published(6_040, 1_000_208, "sasrec") is None
    assert published(6_040, 1_000_209, "mf") is None


def test_a_constant_scorer_of_21_candidates_scores_what_llm_trsr_calls_chance() -> None:
    told = candidate_metrics(np.array([0]), np.array([21]))
    values = {name: round(float(value[0]), 3) for name, value in told.items()}
    assert values == {
        "Recall@3": 0.143,
        "Recall@5": 0.238,
        "Recall@10": 0.476,
        "MRR@3": 0.087,
        "MRR@5": 0.109,
        "MRR@10": 0.139,
    }
