"""Recommendations and scores for many requests at a time, each with filters of its own, in plain torch, as in batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import Filters, most_popular, top_k
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories
from raypipe.serving.catalogue import ServedCatalogue
from raypipe.storage.hashing import U64, mix


@dataclass(frozen=True)
class ModelInputs:
    """What is known of a user.

    `items` is the history, item indices in time order. `seed` is for models that sample. `state` [width] is there if a
    night has computed it. `user` is the stable hash of the user id, 0 for somebody no model can know.
    """

    items: NDArray[np.int32]
    seed: int
    state: NDArray[np.float32] | None = None
    user: int = 0

    @classmethod
    def of(cls, items: NDArray[np.int32]) -> ModelInputs:
        """The inputs of a history of which nothing else is known. Equal histories draw equal samples."""
        return cls(items, int(_seed(items.astype(np.uint64))))


@dataclass(frozen=True)
class ListSpec:
    """The list that is asked for.

    `count` is its length, `only` are attribute values that every item must have, `deny` are the indices of items that
    must not be in it, and `filter_seen` keeps out the items of the history.
    """

    count: int
    only: tuple[tuple[str, str], ...] = ()
    deny: NDArray[np.int32] | None = None
    filter_seen: bool = True


@dataclass(frozen=True)
class Ranked:
    """Item indices, best first, and their scores: None if the items are the popular ones and not a model's."""

    items: NDArray[np.int64]
    scores: NDArray[np.float32] | None


@torch.inference_mode()
def recommend(
    model: Recommender,
    table: Tensor,
    catalogue: ServedCatalogue,
    popular: Sequence[int],
    requests: Sequence[tuple[ModelInputs, ListSpec]],
) -> list[Ranked]:
    """A list for each request; if the model knows nothing of the history, a list of popular items.

    A list is shorter than asked for if fewer items are allowed. `table` [items + 1, width] are the model's item states,
    which may take the model long to compute. Raises UnknownValueError for an attribute value that no item has. Check
    that before, as it fails all requests.
    """
    allowed = {only: catalogue.allowed(only, model.items) for only in {spec.only for _, spec in requests}}
    lists: list[Ranked | None] = [None] * len(requests)
    histories = known_histories(model, [inputs for inputs, _ in requests])
    warm = np.flatnonzero(histories.lengths > 0)
    queries = _queries(model, histories, warm, [inputs for inputs, _ in requests])
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for row, at in enumerate(warm.tolist()):
        groups.setdefault(requests[at][1].only, []).append(row)
    for only, rows in groups.items():
        mine = [requests[at] for at in warm[rows]]
        most = min(max(spec.count for _, spec in mine), model.items)
        filters = Filters(torch.from_numpy(allowed[only]), _excluded(mine))
        items, scores = top_k(queries[rows], table, most, filters)
        for at, ids, values, (_, spec) in zip(warm[rows].tolist(), items.numpy(), scores.numpy(), mine, strict=True):
            ids, values = ids[: spec.count], values[: spec.count]
            lists[at] = Ranked(ids[ids > 0], values[ids > 0])
    return [
        found if found is not None else _popular(popular, allowed[spec.only], inputs, spec)
        for found, (inputs, spec) in zip(lists, requests, strict=True)
    ]


@torch.inference_mode()
def score(
    model: Recommender, table: Tensor, requests: Sequence[tuple[ModelInputs, NDArray[np.int32]]]
) -> list[NDArray[np.float32] | None]:
    """The scores of each request's items, [n]; None if the model knows nothing of the history.

    Items that the model never saw have the score NaN.
    """
    histories = known_histories(model, [inputs for inputs, _ in requests])
    warm = np.flatnonzero(histories.lengths > 0)
    queries = _queries(model, histories, warm, [inputs for inputs, _ in requests])
    found: list[NDArray[np.float32] | None] = [None] * len(requests)
    for row, at in enumerate(warm.tolist()):
        items = requests[at][1]
        inside = items <= model.items
        scores = np.full(len(items), np.nan, np.float32)
        scores[inside] = (queries[row] @ table[torch.from_numpy(items[inside].astype(np.int64))].T).float().numpy()
        found[at] = scores
    return found


@torch.inference_mode()
def state_of(model: Recommender, inputs: ModelInputs) -> tuple[Histories, NDArray[np.float32]]:
    """The history without items the model never saw, and the state [1, width] after it; [0, width] if it is empty."""
    histories = known_histories(model, [inputs])
    return histories, _states(model, histories, np.flatnonzero(histories.lengths > 0), [inputs]).numpy()


@torch.inference_mode()
def queries_of(model: Recommender, inputs: ModelInputs) -> Tensor:
    """The query [1, width] by which `recommend` ranks items; [0, width] if the model knows no item of the history."""
    histories = known_histories(model, [inputs])
    return _queries(model, histories, np.flatnonzero(histories.lengths > 0), [inputs])


def known_histories(model: Recommender, inputs: Sequence[ModelInputs]) -> Histories:
    """The histories without items that the model never saw."""
    lengths = np.array([len(mine.items) for mine in inputs], np.int64)
    items = np.concatenate([mine.items for mine in inputs]) if inputs else np.zeros(0, np.int32)
    users = np.array([mine.user for mine in inputs], np.int64)
    return Histories(items.astype(np.int32), lengths.cumsum(), users).within(model.items)


def _queries(
    model: Recommender, histories: Histories, warm: NDArray[np.int64], inputs: Sequence[ModelInputs]
) -> Tensor:
    """The queries [warm, width] of the histories in the rows `warm`."""
    states = _states(model, histories, warm, inputs)
    seeds = torch.tensor([inputs[at].seed for at in warm.tolist()], dtype=torch.int64)
    return model.queries(states, seeds) if len(warm) else states


def _states(model: Recommender, histories: Histories, warm: NDArray[np.int64], inputs: Sequence[ModelInputs]) -> Tensor:
    """States [warm, width]: those that a night has computed are taken, the others are computed."""
    states = torch.zeros((len(warm), model.width))
    missing = []
    for row, at in enumerate(warm.tolist()):
        state = inputs[at].state
        if state is None:
            missing.append(row)
        else:
            states[row] = torch.from_numpy(state.astype(np.float32))
    left = histories.take(histories.starts[warm[missing]], histories.lengths[warm[missing]])
    for block in batches_by_length(left, model.max_length):
        rows = torch.tensor(missing)[block]
        states[rows] = model.encode(sequences_of(left, block, model.max_length)).float()
    return states


def _excluded(requests: Sequence[tuple[ModelInputs, ListSpec]]) -> Sequences | None:
    parts = []
    for inputs, spec in requests:
        seen = inputs.items if spec.filter_seen else inputs.items[:0]
        parts.append(seen if spec.deny is None else np.concatenate([seen, spec.deny]))
    lengths = torch.tensor([len(part) for part in parts])
    if not int(lengths.sum()):
        return None
    return Sequences(torch.from_numpy(np.concatenate(parts).astype(np.int64)), lengths)


def _popular(popular: Sequence[int], allowed: NDArray[np.bool_], inputs: ModelInputs, spec: ListSpec) -> Ranked:
    excluded = set(spec.deny.tolist() if spec.deny is not None else ())
    excluded |= set(inputs.items.tolist()) if spec.filter_seen else set()
    return Ranked(most_popular(popular, allowed, spec.count, excluded), None)


def _seed(items: U64) -> np.int64:
    places = np.arange(len(items), dtype=np.uint64)
    return np.bitwise_xor.reduce(mix(items + mix(places)), initial=np.uint64(0)).view(np.int64)
