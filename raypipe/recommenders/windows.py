"""Training batches of packed windows. In an epoch every event after the first of a history is a target once.

In masked training (`whole`) the first event is a target too. The few windows that fill no batch sit out an epoch.
Batches are a function of (seed, step): an interrupted run goes on with the batch it would have had, and there is no
loader whose state could be lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Windows of similar length share a batch, so that little attention is wasted on padding. They are sorted only within so
# many batches of shuffled windows, which keeps them mixed.
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class Histories:
    """Item sequences of many users in one array. `items` int32 [events]; `ends` int64 [users], where each one ends.

    `users` int64 [users] are the keys of the sequences' users, the stable hashes of their ids; None if not needed.
    """

    items: NDArray[np.int32]
    ends: NDArray[np.int64]
    users: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], self.ends])[: len(self.ends)].astype(np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.starts

    def without_last(self, count: int) -> Histories:
        """Every history without its last `count` events; one that has no more than these becomes empty."""
        kept = np.maximum(self.lengths - count, 0)
        return self.take(self.starts, kept)

    def take(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Histories:
        """Histories made of slices of `items`, each within one history. The user of an empty slice has no meaning."""
        users = self.users
        if users is not None and len(users):
            users = users[np.searchsorted(self.ends, starts, side="right").clip(max=len(users) - 1)]
        return Histories(self.items[stretches(starts, lengths)], lengths.cumsum(), users)

    def of(self, chosen: NDArray[np.bool_]) -> Histories:
        """The histories of the `chosen` users, bool [users]."""
        rows = np.flatnonzero(chosen)
        return self.take(self.starts[rows], self.lengths[rows])

    def within(self, items: int) -> Histories:
        """Every history without events of items beyond the first `items`; a history may become empty."""
        inside = self.items <= items
        if inside.all():
            return self
        kept = np.concatenate([[0], inside.cumsum()])
        return Histories(self.items[inside], kept[self.ends], self.users)

    def offsets_within(self, items: int) -> NDArray[np.int64]:
        """The place in the whole history, from 0, of each event that `within` keeps."""
        inside = self.items <= items
        return stretches(np.zeros_like(self.lengths), self.lengths)[inside]

    def counts(self, items: int) -> NDArray[np.int64]:
        """How often each item occurs, int64 [items + 1]."""
        return np.bincount(self.items, minlength=items + 1).astype(np.int64)


def stretches(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places start … start + length − 1 of every stretch, one stretch after the other."""
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


@dataclass(frozen=True)
class Batch:
    """Packed inputs, and `targets`, the items that came next. `users` int64 [windows] are rows of the histories."""

    items: NDArray[np.int64]
    targets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    users: NDArray[np.int64]
    count: int  # targets of the whole step, over all workers


class Windows:
    """Windows of at most `max_length` inputs over histories, and the batches of every step.

    A history of n events has n − 1 targets. Its windows are cut backwards from its end, so that the newest window has
    the most context. With `whole` (masked training) the inputs of a window are its targets, n in all, and its last
    event stands where a prefix that is asked about has its mask.

    `ties` int32 [events] numbers, in order, the groups of events whose order means nothing. Every epoch draws another
    order within each group.
    """

    def __init__(
        self, histories: Histories, max_length: int, *, whole: bool = False, ties: NDArray[np.int32] | None = None
    ) -> None:
        self.histories, self.whole, self.ties = histories, whole, ties
        targets = histories.lengths if whole else histories.lengths - 1
        pieces = np.maximum(-(-targets // max_length), 0)
        self.users = np.repeat(np.arange(len(histories)), pieces)
        nth_from_end = np.arange(int(pieces.sum())) - np.repeat(pieces.cumsum() - pieces, pieces)
        # Inputs end before `stop`, where the last target lies unless `whole`.
        stops = np.repeat(histories.ends - (0 if whole else 1), pieces) - nth_from_end * max_length
        self.starts = np.maximum(stops - max_length, histories.starts[self.users])
        self.lengths = stops - self.starts
        self._epoch: tuple[int, int, int] | None = None
        self._drawn = histories
        self._order: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def __len__(self) -> int:
        return len(self.users)

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self) // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> Batch:
        """The share of rank `rank`, of `world` ranks, in the `batch_size` windows of `step`."""
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        if self._epoch != (epoch, seed, batch_size):
            self._order, self._epoch = self._shuffled(epoch, seed, batch_size), (epoch, seed, batch_size)
            self._drawn = self._with_ties_drawn(epoch, seed)
        chosen = self._order[index]
        count = int(self.lengths[chosen].sum())
        chosen = chosen[rank::world]
        starts, lengths = self.starts[chosen], self.lengths[chosen]
        inputs = self._drawn.take(starts, lengths).items.astype(np.int64)
        targets = inputs if self.whole else self._drawn.take(starts + 1, lengths).items.astype(np.int64)
        return Batch(inputs, targets, lengths, self.users[chosen], count)

    def _shuffled(self, epoch: int, seed: int, batch_size: int) -> NDArray[np.int64]:
        """The windows of every step of an epoch, int64 [steps, batch_size]; the few that fill no batch sit it out."""
        rng = np.random.default_rng((seed, epoch))
        steps = self.steps_per_epoch(batch_size)
        if len(self) < batch_size:
            return np.arange(len(self))[None]
        order = rng.permutation(len(self))[: steps * batch_size]
        # Sorted by length within groups of `_SORTED_BATCHES` batches.
        group = np.arange(len(order)) // (batch_size * _SORTED_BATCHES)
        order = order[np.lexsort((self.lengths[order], group))].reshape(steps, batch_size)
        return order[rng.permutation(steps)]

    def _with_ties_drawn(self, epoch: int, seed: int) -> Histories:
        if self.ties is None:
            return self.histories
        drawn = np.random.default_rng((seed, epoch, 1)).random(len(self.ties))
        return replace(self.histories, items=self.histories.items[np.lexsort((drawn, self.ties))])


def tie_groups(times: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int32]:
    """The number of each event's group, from 1, int32 [events]. A group holds the events of one history at one time."""
    begins = np.ones(len(times), bool)
    begins[1:] = times[1:] != times[:-1]
    begins[ends[:-1][ends[:-1] < len(times)]] = True
    return begins.cumsum().astype(np.int32)
