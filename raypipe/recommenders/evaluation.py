"""Leave-one-out evaluation over the whole catalogue: ranks of the last events, and properties of the lists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raypipe.metrics.lists import collapse, coverage, diversity, novelty
from raypipe.metrics.ranking import RANKING, Mean, hit_rate, ranking_metrics
from raypipe.recommenders.floors import Floor
from raypipe.recommenders.ranking import batches_by_length, sequences_of, target_ranks, top_lists
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import BLOCK_SCORES, Filters, ranks_among
from raypipe.recommenders.windows import Histories

_CUTOFF = 10
_COLD_EVENTS = 5
_LENGTHS = (10, 20, 50, 100, 200)
_BANDS: dict[str, tuple[float, float]] = {
    f"HR@{_CUTOFF} length {f'{low + 1}–{high}' if high else f'> {low}'}": (low, high or math.inf)
    for low, high in zip((0, *_LENGTHS), (*_LENGTHS, None), strict=True)
}
_COLD = f"HR@{_CUTOFF} cold items"
_LISTS = (f"coverage@{_CUTOFF}", f"novelty@{_CUTOFF}", f"diversity@{_CUTOFF}", "collapse")

METRICS = (*RANKING, *_BANDS, _COLD, *_LISTS)
"""The names of all metrics of `evaluate_model`, in its order."""


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation asks for: the last event of every history that has one beyond those of training.

    `training` are the histories that models learnt from. Per asked user, `prefixes` hold the events before the last
    one, and `targets` the last events. `askable` is the number of users with such an event, asked or not. `items` is
    the size of the catalogue; `users` and `events` are the numbers of users and events in the whole log.
    """

    training: Histories
    prefixes: Histories
    targets: NDArray[np.int32]
    items: int
    users: int
    events: int
    askable: int

    @property
    def asks_all(self) -> bool:
        return len(self.targets) == self.askable

    @classmethod
    def of(
        cls,
        histories: Histories,
        hold_out: int,
        items: int,
        learnt_from: NDArray[np.bool_] | None = None,
        asked: NDArray[np.bool_] | None = None,
    ) -> HeldOut:
        """Ask users with more than `hold_out` events; if `asked` bool [users] is given, those of them only.

        Models learnt from the users of `learnt_from` bool [users], or from all if it is not given. Raises ValueError if
        `hold_out` is 0, as training then saw every event.
        """
        if hold_out < 1:
            raise ValueError("The model was trained on every event, so that none is left to ask for.")
        long_enough = histories.lengths > hold_out
        rows = np.flatnonzero(long_enough if asked is None else long_enough & asked)
        before = histories.without_last(1)
        prefixes = before.take(before.starts[rows], before.lengths[rows])
        targets = histories.items[histories.ends[rows] - 1]
        training = histories.without_last(hold_out)
        if learnt_from is not None:
            training = training.of(learnt_from)
        return cls(training, prefixes, targets, items, len(histories), len(histories.items), int(long_enough.sum()))


def ranks_of_floor(floor: Floor, held: HeldOut, *, filter_seen: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `target_ranks`, for a floor, which has no states."""
    above = np.empty(len(held.targets), np.int64)
    same = np.empty_like(above)
    size = max(1, BLOCK_SCORES // (held.items + 1))
    batches = batches_by_length(held.prefixes, max_length=200)
    for rows in (batch[at : at + size] for batch in batches for at in range(0, len(batch), size)):
        prefixes = held.prefixes.take(held.prefixes.starts[rows], held.prefixes.lengths[rows])
        scores = torch.from_numpy(floor.scores(prefixes))
        seen = sequences_of(held.prefixes, rows) if filter_seen else None
        found = ranks_among(scores, torch.from_numpy(held.targets[rows].astype(np.int64)), Filters(excluded=seen))
        above[rows], same[rows] = found[0].numpy(), found[1].numpy()
    return above, same


def evaluate_floor(floor: Floor, held: HeldOut, *, filter_seen: bool = True) -> dict[str, Mean]:
    """HR, NDCG and MRR of a floor, which is a scorer without learning."""
    return ranking_metrics(*ranks_of_floor(floor, held, filter_seen=filter_seen))


def evaluate_model(model: Recommender, held: HeldOut, *, filter_seen: bool = True) -> dict[str, Mean]:
    """All metrics of a model, by the names of `METRICS`.

    These are HR, NDCG and MRR; HR@10 by length of the prefix and for items of few training events, NaN if no user is in
    the group; coverage, novelty (bits) and diversity of the lists of ten; and collapse of the item vectors.
    """
    above, same = target_ranks(model, held.prefixes, held.targets, filter_seen=filter_seen)
    metrics = ranking_metrics(above, same)
    hits = hit_rate(above, same, _CUTOFF)
    lengths = held.prefixes.lengths
    metrics |= {name: Mean.of(hits[(lengths > low) & (lengths <= high)]) for name, (low, high) in _BANDS.items()}
    counts = held.training.counts(held.items)
    cold = counts[held.targets] < _COLD_EVENTS
    metrics[_COLD] = Mean.of(hits[cold])
    lists = top_lists(model, held.prefixes, min(_CUTOFF, model.items), filter_seen=filter_seen)
    return metrics | list_metrics(lists, model.item_states().detach().cpu().numpy(), held)


def list_metrics(lists: NDArray[np.int64], vectors: NDArray[np.float32], held: HeldOut) -> dict[str, Mean]:
    """Coverage, novelty (bits) and diversity of the lists' first ten items, and collapse of the item vectors.

    `lists` int64 [users, k], 0 for no item; `vectors` float32 [items + 1, width]. Without any item coverage is 0 and
    novelty NaN; diversity is NaN if no list has two items.
    """
    first, counts = lists[:, :_CUTOFF], held.training.counts(held.items)
    surprise = novelty(first, counts) if first.any() else math.nan
    exact = (coverage(first, held.items), surprise, diversity(first, vectors), collapse(vectors))
    return {name: Mean(value, 0.0) for name, value in zip(_LISTS, exact, strict=True)}
