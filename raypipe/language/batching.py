"""Batches of examples of like length, so that little is spent on padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SORTED_BATCHES = 32


def batches_of_like_length(
    lengths: NDArray[np.int64], seed: tuple[int, ...], batch_size: int
) -> list[NDArray[np.int64]]:
    """Every example in one batch, drawn anew for each seed; what does not fill a batch is left out, unless nothing does."""
    rng = np.random.default_rng(seed)
    batches: list[NDArray[np.int64]] = []
    order = rng.permutation(len(lengths))
    # Left out before they are sorted: behind it would be the longest, the same ones every time where all are sorted at once.
    order = order[: len(order) // batch_size * batch_size or len(order)]
    for start in range(0, len(order), batch_size * _SORTED_BATCHES):
        chunk = order[start : start + batch_size * _SORTED_BATCHES]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        whole = [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
        batches += [whole[i] for i in rng.permutation(len(whole))]
    return batches
