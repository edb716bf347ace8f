"""What recommended lists, and the vectors behind them, are like beyond being right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LISTS_AT_ONCE = 10_000


def coverage(lists: NDArray[np.int64], items: int) -> float:
    """Share of the catalogue that is in some list. lists [users, k], item indices from 1, 0 for none."""
    return np.count_nonzero(np.bincount(lists.ravel(), minlength=items + 1)[1:]) / items


def novelty(lists: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Mean self-information of the recommended items, in bits: −log2 of an item's share of all events.

    counts [items + 1], events of each item; an item without any counts as having one (Zhou et al., PNAS 2010).
    """
    shares = np.maximum(counts, 1) / max(1, int(counts.sum()))
    return float(-np.log2(shares[lists[lists > 0]]).mean())


def diversity(lists: NDArray[np.int64], vectors: NDArray[np.float32]) -> float:
    """Mean cosine distance of the pairs of each list (Ziegler et al., WWW 2005). vectors [items + 1, width]."""
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total, count = 0.0, 0
    for start in range(0, len(lists), _LISTS_AT_ONCE):
        some = lists[start : start + _LISTS_AT_ONCE]
        real = (some > 0)[..., None]
        chosen = units[some] * real
        n = real.sum((1, 2)).astype(np.float64)
        # The sum over pairs of a list is the squared length of its sum, less the items with themselves.
        pairs = (chosen.sum(1) ** 2).sum(1) - (chosen**2).sum((1, 2))
        several = n > 1
        total += float((1 - pairs[several] / (n * (n - 1))[several]).sum())
        count += int(several.sum())
    return total / count if count else float("nan")


def collapse(vectors: NDArray[np.float32]) -> float:
    """How much of the item vectors is one direction: the length of their mean unit vector, 0 for spread, 1 for one.

    vectors [items + 1, width], row 0 padding. Models that are trained to regress item vectors they may move can do so by
    making all alike.
    """
    real = vectors[1:]
    units = real / np.maximum(np.linalg.norm(real, axis=1, keepdims=True), 1e-12)
    return float(np.linalg.norm(units.mean(0)))
