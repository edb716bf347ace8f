"""Properties of recommended lists, and of the vectors behind them, other than accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LISTS_AT_ONCE = 10_000


def coverage(lists: NDArray[np.int64], items: int) -> float:
    """Share of the catalogue that occurs in some list. `lists` [users, k] are item indices from 1, with 0 for none."""
    return np.count_nonzero(np.bincount(lists.ravel(), minlength=items + 1)[1:]) / items


def novelty(lists: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Mean self-information of the recommended items, in bits: −log2 of an item's share of all events.

    `counts` [items + 1] are the events of each item; an item without events counts as having one (Zhou et al., PNAS
    2010).
    """
    shares = np.maximum(counts, 1) / max(1, int(counts.sum()))
    return float(-np.log2(shares[lists[lists > 0]]).mean())


def diversity(lists: NDArray[np.int64], vectors: NDArray[np.float32]) -> float:
    """Mean cosine distance between the items of each list (Ziegler et al., WWW 2005).

    `vectors` are [items + 1, width].
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total, count = 0.0, 0
    for start in range(0, len(lists), _LISTS_AT_ONCE):
        some = lists[start : start + _LISTS_AT_ONCE]
        real = (some > 0)[..., None]
        chosen = units[some] * real
        n = real.sum((1, 2)).astype(np.float64)
        # The sum over all pairs of a list is the squared length of its sum, minus the items paired with themselves.
        pairs = (chosen.sum(1) ** 2).sum(1) - (chosen**2).sum((1, 2))
        several = n > 1
        total += float((1 - pairs[several] / (n * (n - 1))[several]).sum())
        count += int(several.sum())
    return total / count if count else float("nan")


def collapse(vectors: NDArray[np.float32]) -> float:
    """How far the item vectors point in one direction: the length of their mean unit vector.

    It is 0 if they are spread and 1 if all are alike. `vectors` are [items + 1, width], and row 0 is padding. A model
    that is trained to regress item vectors which it may move can reduce its loss by making all of them alike.
    """
    real = vectors[1:]
    units = real / np.maximum(np.linalg.norm(real, axis=1, keepdims=True), 1e-12)
    return float(np.linalg.norm(units.mean(0)))
