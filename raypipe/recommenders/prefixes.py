"""States of prefixes: what a recommender knew of a user after so many events."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.windows import Histories, stretches

_PREFIXES_AT_ONCE = 50_000


@torch.no_grad()
def prefix_states(
    model: Recommender, histories: Histories, rows: NDArray[np.int64], events: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The state after the first `events` [n] of each history in `rows` [n], float32 [n, width]; for any model, exactly.

    None sees anything after its prefix, and each sees the last `max_length` items of it. Where a state depends on the items
    before it alone, the prefixes of a history that begin where it does are read at once. Raises ValueError for a prefix that is
    empty or longer than its history.
    """
    if len(rows) and (events.min() < 1 or (events > histories.lengths[rows]).any()):
        raise ValueError("A prefix has at least one event, and no more than its history.")
    states = np.zeros((len(rows), model.width), np.float32)
    within = events <= model.max_length if model.causal else np.zeros(len(rows), bool)
    for some, found in chain(
        _read_at_once(model, histories, rows, events, np.flatnonzero(within)),
        _read_one_by_one(model, histories, rows, events, np.flatnonzero(~within)),
    ):
        states[some] = found.float().cpu().numpy()
    return states


def _read_at_once(
    model: Recommender,
    histories: Histories,
    rows: NDArray[np.int64],
    events: NDArray[np.int64],
    chosen: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Some of `chosen` and their states, of a causal model's prefixes within its window: each history once, as far as asked."""
    chosen = chosen[np.argsort(rows[chosen], kind="stable")]
    owners, starts, counts = np.unique(rows[chosen], return_index=True, return_counts=True)
    asked = histories.take(
        histories.starts[owners], np.maximum.reduceat(events[chosen], starts) if len(starts) else starts
    )
    for batch in batches_by_length(asked, model.max_length):
        sequences = sequences_of(asked, batch).to(model.table.device)
        some = chosen[stretches(starts[batch], counts[batch])]
        begins = (sequences.ends - sequences.lengths).cpu().numpy()
        at = np.repeat(begins, counts[batch]) + events[some] - 1
        yield some, model.encode_all(sequences)[torch.from_numpy(at).to(model.table.device)]


def _read_one_by_one(
    model: Recommender,
    histories: Histories,
    rows: NDArray[np.int64],
    events: NDArray[np.int64],
    chosen: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    for start in range(0, len(chosen), _PREFIXES_AT_ONCE):
        some = chosen[start : start + _PREFIXES_AT_ONCE]
        lengths = np.minimum(events[some], model.max_length)
        prefixes = histories.take(histories.starts[rows[some]] + events[some] - lengths, lengths)
        for batch in batches_by_length(prefixes, model.max_length):
            yield some[batch], model.encode(sequences_of(prefixes, batch).to(model.table.device))
