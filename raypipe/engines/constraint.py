"""Constrained decoding: tokens that an answer may not continue with get no weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def constrained(weights: Tensor, allowed: Sequence[NDArray[np.int64]]) -> Tensor:
    """`weights` [rows, vocabulary] of each row's `allowed` tokens, with −∞ for all other tokens."""
    rows = np.repeat(np.arange(len(allowed)), [len(tokens) for tokens in allowed])
    places = tuple(torch.from_numpy(part).to(weights.device) for part in (rows, np.concatenate(allowed)))
    return torch.full_like(weights, -torch.inf).index_put(places, weights[places])


def one_end(logits: Tensor, ends: Tensor) -> Tensor:
    """Logits [rows, vocabulary] in which the first end token weighs as much as all of them, and the others nothing."""
    if len(ends) < 2:
        return logits
    weight = logits[:, ends].logsumexp(1)
    logits = logits.index_fill(1, ends, -torch.inf)
    logits[:, ends[0]] = weight
    return logits
