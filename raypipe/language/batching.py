"""Batches of examples of similar length, so that little is spent on padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SORTED_BATCHES = 32


def batches_of_like_length(
    lengths: NDArray[np.int64], seed: tuple[int, ...], batch_size: int
) -> list[NDArray[np.int64]]:
    """Put every example into one batch, drawn anew for each `seed`; return the indices of each batch's examples.

    Examples that do not fill a batch are left out, unless there are too few for even one batch.
    """
    rng = np.random.default_rng(seed)
    batches: list[NDArray[np.int64]] = []
    order = rng.permutation(len(lengths))
    # Examples are left out before sorting. Afterwards they would be the longest ones, the same ones every time if all
    # examples are sorted at once.
    order = order[: len(order) // batch_size * batch_size or len(order)]
    for start in range(0, len(order), batch_size * _SORTED_BATCHES):
        chunk = order[start : start + batch_size * _SORTED_BATCHES]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        whole = [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
        batches += [whole[i] for i in rng.permutation(len(whole))]
    return batches
