"""Histories with an ablation's disturbance: events that are missing, and events that are of other items.

What becomes of an event follows from the user's key and the event's place in the history alone, so that it is the same in
every prompt about the user, in whatever batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.recommenders.windows import Histories
from raypipe.storage.hashing import mix

_EVENTS, _ITEMS = np.uint64(0x2545F4914F6CDD1D), np.uint64(0x9FB21C651E98DF25)


@dataclass(frozen=True)
class Disturbed:
    """What is left of `whole` histories: `left` are their events that are not missing.

    `kept` int64 [events + 1] counts how many of the first events of all histories together are left.
    """

    whole: Histories
    left: Histories
    kept: NDArray[np.int64]

    @classmethod
    def of(cls, whole: Histories, keys: NDArray[np.int64], missing: float, noise: float, items: int) -> Disturbed:
        """Histories of users of these `keys` [users], of whose events the shares `missing` and `noise` are disturbed.

        An event in the share `noise` is of an item drawn uniformly from 1 … `items`.
        """
        if not missing and not noise:
            return cls(whole, whole, np.arange(len(whole.items) + 1))
        places = (np.arange(len(whole.items)) - np.repeat(whole.starts, whole.lengths)).astype(np.uint64)
        drawn = mix(np.repeat(mix(keys.view(np.uint64) ^ _EVENTS), whole.lengths) + places)
        fates = (drawn >> np.uint64(11)).astype(np.float64) / 2.0**53  # below 1, so that a share of 1 is everything
        there = fates >= missing
        others = (mix(drawn ^ _ITEMS) % np.uint64(items)).astype(np.int32) + np.int32(1)
        told = np.where(fates < missing + noise, others, whole.items).astype(np.int32)
        kept = np.concatenate([[0], there.cumsum()]).astype(np.int64)
        return cls(whole, Histories(told[there], kept[whole.ends], whole.users), kept)

    def prefixes(self, rows: NDArray[np.int64], events: NDArray[np.int64]) -> Histories:
        """What is left of the first `events` int64 [n] of the histories `rows` int64 [n]."""
        first = self.kept[self.whole.starts[rows]]
        return self.left.take(first, self.kept[self.whole.starts[rows] + events] - first)
