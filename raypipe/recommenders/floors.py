"""Floors: scorers without learning that a recommender has to beat, by popularity and by which items follow which."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from raypipe.recommenders.windows import Histories


class Floor(Protocol):
    def scores(self, prefixes: Histories) -> NDArray[np.float32]:
        """The scores of all items after each prefix, [users, items + 1]; column 0 has no meaning."""
        ...


class Popularity:
    """Scores an item by its number of events in training, the same for every user."""

    def __init__(self, training: Histories, items: int) -> None:
        self.counts = training.counts(items).astype(np.float32)

    def scores(self, prefixes: Histories) -> NDArray[np.float32]:
        return np.broadcast_to(self.counts, (len(prefixes), len(self.counts))).copy()


class Transitions:
    """Scores an item by how often, in training, it came within `window` places after a prefix's last `recent` items."""

    def __init__(self, training: Histories, items: int, window: int = 10, recent: int = 5) -> None:
        self.recent = recent
        self.followers = csr_array((items + 1, items + 1), dtype=np.float32)
        last_place = np.repeat(training.ends, training.lengths)
        places = np.arange(len(training.items))
        for distance in range(1, window + 1):
            before = places[places + distance < last_place]
            pairs = (training.items[before], training.items[before + distance])
            ones = np.ones(len(before), np.float32)
            self.followers = self.followers + csr_array((ones, pairs), shape=self.followers.shape)

    def scores(self, prefixes: Histories) -> NDArray[np.float32]:
        kept = np.minimum(prefixes.lengths, self.recent)
        last = prefixes.take(prefixes.ends - kept, kept)
        users = np.repeat(np.arange(len(last)), last.lengths)
        chosen = csr_array(
            (np.ones(len(users), np.float32), (users, last.items)), shape=(len(last), self.followers.shape[0])
        )
        return (chosen @ self.followers).toarray()
