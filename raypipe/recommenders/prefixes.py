"""States of prefixes: what a recommender knew of a user after so many events."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.windows import Histories

_PREFIXES_AT_ONCE = 50_000


@torch.no_grad()
def prefix_states(
    model: Recommender, histories: Histories, rows: NDArray[np.int64], events: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The state after the first `events` [n] of each history in `rows` [n], float32 [n, width]; for any model, exactly.

    Each prefix is read by itself, so that none sees anything after it, and each its last `max_length` items. Raises
    ValueError for a prefix that is empty or longer than its history.
    """
    if len(rows) and (events.min() < 1 or (events > histories.lengths[rows]).any()):
        raise ValueError("A prefix has at least one event, and no more than its history.")
    states = np.zeros((len(rows), model.width), np.float32)
    device = model.table.device
    for start in range(0, len(rows), _PREFIXES_AT_ONCE):
        chosen = slice(start, start + _PREFIXES_AT_ONCE)
        lengths = np.minimum(events[chosen], model.max_length)
        prefixes = histories.take(histories.starts[rows[chosen]] + events[chosen] - lengths, lengths)
        for batch in batches_by_length(prefixes, model.max_length):
            found = model.encode(sequences_of(prefixes, batch).to(device))
            states[start + batch] = found.float().cpu().numpy()
    return states
