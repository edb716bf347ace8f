"""States of prefixes: what a recommender knew of a user after a number of events."""

from __future__ import annotations

from collections.abc import Iterator

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
    """The state after the first `events` [n] events of each history in `rows` [n], float32 [n, width].

    It is exact for any model: a state sees the last `max_length` items of its prefix, and nothing after it. If a model
    is causal, all prefixes of a history that are no longer than `max_length` are read at once. Raises ValueError if a
    prefix is empty or longer than its history.
    """
    if len(rows) and (events.min() < 1 or (events > histories.lengths[rows]).any()):
        raise ValueError("A prefix has at least one event, and no more than its history.")
    states = np.zeros((len(rows), model.width), np.float32)
    within = events <= model.max_length if model.causal else np.zeros(len(rows), bool)
    for asked, read in ((within, _read_at_once), (~within, _read_one_by_one)):
        places = np.flatnonzero(asked)
        for some, found in read(model, histories, rows[places], events[places]):
            states[places[some]] = found.float().cpu().numpy()
    return states


def _read_at_once(
    model: Recommender, histories: Histories, rows: NDArray[np.int64], events: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield places in `rows` and their states, for prefixes within the window of a causal model.

    Each history is read once, up to its longest prefix.
    """
    order = np.argsort(rows, kind="stable")
    owners, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    longest = np.zeros(len(owners), np.int64)
    np.maximum.at(longest, np.repeat(np.arange(len(owners)), counts), events[order])
    asked = histories.take(histories.starts[owners], longest)
    for batch in batches_by_length(asked, model.max_length):
        sequences = sequences_of(asked, batch).to(model.table.device)
        some = order[stretches(starts[batch], counts[batch])]
        begins = (sequences.ends - sequences.lengths).cpu().numpy()
        at = np.repeat(begins, counts[batch]) + events[some] - 1
        yield some, model.encode_all(sequences)[torch.from_numpy(at).to(model.table.device)]


def _read_one_by_one(
    model: Recommender, histories: Histories, rows: NDArray[np.int64], events: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    for start in range(0, len(rows), _PREFIXES_AT_ONCE):
        chosen = np.arange(start, min(start + _PREFIXES_AT_ONCE, len(rows)))
        lengths = np.minimum(events[chosen], model.max_length)
        prefixes = histories.take(histories.starts[rows[chosen]] + events[chosen] - lengths, lengths)
        for batch in batches_by_length(prefixes, model.max_length):
            yield chosen[batch], model.encode(sequences_of(prefixes, batch).to(model.table.device))
