"""Ranking metrics of one relevant item per user, with an exact treatment of ties.

Every function takes how many candidates score above the relevant one, and how many score the same, itself included.
Every order of tied items is equally likely, and a metric is its mean over these orders. So a scorer that gives all
items the same score is as good as chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


def hit_rate(above: Counts, same: Counts, k: int) -> Values:
    """The probability that the relevant item is among the first k, per user."""
    return np.clip(k - above, 0, same) / same


def ndcg(above: Counts, same: Counts, k: int) -> Values:
    """1 / log2(1 + rank) if the rank is at most k, else 0, per user."""
    return _mean_over_ties(1 / np.log2(1 + np.arange(1, k + 1)), above, same)


def reciprocal_rank(above: Counts, same: Counts, k: int) -> Values:
    """1 / rank if the rank is at most k, else 0, per user."""
    return _mean_over_ties(1 / np.arange(1, k + 1), above, same)


def _mean_over_ties(gains: Values, above: Counts, same: Counts) -> Values:
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    first, last = np.minimum(above, len(gains)), np.minimum(above + same, len(gains))
    return (sums[last] - sums[first]) / same


@dataclass(frozen=True)
class Mean:
    """A mean over users, with the half-width of its 95 % confidence interval (normal approximation).

    The half-width is NaN for a single user. Both are NaN for no users.
    """

    value: float
    half_width: float

    @classmethod
    def of(cls, values: Values) -> Mean:
        if not len(values):
            return cls(math.nan, math.nan)
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), 1.96 * spread / math.sqrt(len(values)))


def candidate_metrics(above: Counts, same: Counts, cutoffs: tuple[int, ...] = (3, 5, 10)) -> dict[str, Values]:
    """Recall and MRR per user at each cutoff, by name, such as `Recall@3`.

    There is one relevant candidate, so its recall is its hit rate.
    """
    functions = {"Recall": hit_rate, "MRR": reciprocal_rank}
    return {f"{name}@{k}": function(above, same, k) for k in cutoffs for name, function in functions.items()}


RANKING = {
    f"{name}@{k}": (function, k)
    for k in (5, 10, 20)
    for name, function in {"HR": hit_rate, "NDCG": ndcg, "MRR": reciprocal_rank}.items()
}
"""The metrics of `ranking_metrics` by name, each with its function and its cutoff."""


def ranking_metrics(above: Counts, same: Counts) -> dict[str, Mean]:
    """Means of HR, NDCG and MRR at each cutoff, by name, such as `NDCG@10`."""
    return {name: Mean.of(function(above, same, k)) for name, (function, k) in RANKING.items()}
