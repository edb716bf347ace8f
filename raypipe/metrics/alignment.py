"""How far a language model answers as the recommender f does (RecExplainer, arXiv 2311.10947).

Plain numbers in and out. Answers are compared with f's own predictions, not with what a user did next. Figures are
named after the paper's tasks: T1 is f's next item, T2 f's order of five candidates, T3 whether f would recommend an
item, T6 the history behind a user's vector. Answers are given as the titles that they name (`recovery.titles_in`). If
an answer leaves items tied or unmentioned, the figure is the mean over all ways to order them, so that an answer
without an opinion scores as chance does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from raypipe.metrics.ranking import Mean, Values, hit_rate, ndcg
from raypipe.metrics.recovery import recovered, valid_ratio

GAINS = (1000.0, 100.0, 10.0, 1.0, 0.0)
"""Of f's first to fifth candidate in T2; a random order scores .6131."""

_NOWHERE = 2**31


def retrieval_figures(
    answers: Sequence[Sequence[str]], right: Sequence[str], known: Collection[str], k: int = 5
) -> dict[str, Mean]:
    """T1, ranked titles compared with f's best unseen item: `T1 HR@k`, `T1 NDCG@k` and `T1 valid`.

    `T1 valid` is the share of titles that are `known`. A repeated title takes no place; a title that is not in the
    catalogue does.
    """
    above = _places(answers, right)
    return {
        f"T1 HR@{k}": Mean.of(hit_rate(above, np.ones_like(above), k)),
        f"T1 NDCG@{k}": Mean.of(ndcg(above, np.ones_like(above), k)),
        "T1 valid": Mean.of(np.array([valid_ratio(answer, known) for answer in answers], np.float64)),
    }


def unseen_retrieval_figures(
    answers: Sequence[Sequence[str]], right: Sequence[str], seen: Sequence[Collection[str]], k: int = 5
) -> dict[str, Mean]:
    """`T1 HR@k unseen` and `T1 NDCG@k unseen` (ours): titles of the user's own history take no place.

    They have none in f's list either. Otherwise an answer that names them first would be wrong even if its order is f's
    own.
    """
    unseen = [[title for title in answer if title not in own] for answer, own in zip(answers, seen, strict=True)]
    above = _places(unseen, right)
    return unseen_retrieval_metrics(above, np.ones_like(above), k)


def unseen_retrieval_metrics(above: NDArray[np.int64], same: NDArray[np.int64], k: int = 5) -> dict[str, Mean]:
    """The same figures from how many unseen items rank above f's best, and how many equal it, itself included.

    Both counts are as for `hit_rate`.
    """
    return {
        f"T1 HR@{k} unseen": Mean.of(hit_rate(above, same, k)),
        f"T1 NDCG@{k} unseen": Mean.of(ndcg(above, same, k)),
    }


def _places(answers: Sequence[Sequence[str]], right: Sequence[str]) -> NDArray[np.int64]:
    """How many distinct titles stand above the right one: [answers]."""
    distinct = [list(dict.fromkeys(answer)) for answer in answers]
    return np.array(
        [mine.index(title) if title in mine else _NOWHERE for mine, title in zip(distinct, right, strict=True)],
        np.int64,
    )


def ranking_figures(answers: Sequence[Sequence[str]], orders: Sequence[Sequence[str]]) -> dict[str, Mean]:
    """T2, answered orders compared with f's, best first: `T2 NDCG@5` and `T2 named`.

    `T2 named` is the share of candidates that are named. Candidates that an answer leaves out share the remaining
    places. Repeated and invented titles take no place.
    """
    scores = np.zeros((len(orders), len(GAINS)))
    for row, (answer, order) in enumerate(zip(answers, orders, strict=True)):
        named = [title for title in dict.fromkeys(answer) if title in order]
        for place, title in enumerate(named):
            scores[row, order.index(title)] = len(GAINS) - place
    return {
        "T2 NDCG@5": Mean.of(order_ndcg(scores)),
        "T2 named": Mean.of((scores > 0).mean(1)),
    }


def order_ndcg(scores: NDArray[np.floating]) -> Values:
    """NDCG@5 [n] of the order that `scores` [n, 5] give f's candidates. Columns are in f's order, best first."""
    above = (scores[:, None, :] > scores[:, :, None]).sum(2)
    same = (scores[:, None, :] == scores[:, :, None]).sum(2)
    discounts = 1 / np.log2(np.arange(2, len(GAINS) + 2))
    return ndcg(above, same, len(GAINS)) @ GAINS / (discounts @ GAINS)


def decisions(yes: NDArray[np.floating], no: NDArray[np.floating], liked: NDArray[np.bool_]) -> Values:
    """T3 per pair of scores: 1 if the higher score is f's answer, else 0. Equal scores count 0.5, whatever f says."""
    return np.where(yes == no, 0.5, (yes > no) == liked)


def reconstruction_figures(
    answers: Sequence[Sequence[str]], histories: Sequence[Sequence[str]], known: Collection[str]
) -> dict[str, Mean]:
    """T6, answered titles compared with the history's: `T6 HCR` and `T6 valid`.

    `T6 HCR` is the share of the history that is `recovered`. `T6 valid` is the share of titles that are `known`.
    """
    covered = [recovered(answer, history) for answer, history in zip(answers, histories, strict=True)]
    return {
        "T6 HCR": Mean.of(np.array(covered, np.float64)),
        "T6 valid": Mean.of(np.array([valid_ratio(answer, known) for answer in answers], np.float64)),
    }
