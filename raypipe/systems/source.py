"""What systems are trained and measured on: a frozen recommender, histories up to the cut, the catalogue in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.language.catalogue import Catalogue
from raypipe.language.soft_prompts import SoftExample
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.windows import Histories


@dataclass(frozen=True)
class Source:
    """The data that a system trains and is measured on.

    `held_out` bool [users] marks the users who are asked about and whom no training sees. `catalogue` has a distinct
    title for every item. `summaries` are of what stands before the cut, by row of the histories. `replay` are other
    examples. `computed` are the recommender's item states if they were computed already. `seeds` int64 [events] are the
    seeds of what the recommender samples after each event of the histories, if its lists depend on them.
    """

    recommender: Recommender
    histories: Histories
    held_out: NDArray[np.bool_]
    catalogue: Catalogue
    summaries: Mapping[int, str] = field(default_factory=dict)
    replay: Sequence[SoftExample] = ()
    computed: NDArray[np.float32] | None = None
    seeds: NDArray[np.int64] | None = None

    @property
    def titles(self) -> Sequence[str]:
        """The items' titles, indexed by item index − 1."""
        return self.catalogue.titles

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset(self.catalogue.titles)

    @cached_property
    def item_states(self) -> NDArray[np.float32]:
        """The recommender's item states, float32 [items + 1, width]."""
        if self.computed is not None:
            return self.computed
        return self.recommender.item_states().detach().float().cpu().numpy()

    def rows(self, *, held_out: bool, least: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw at most `most` users whose histories have at least `least` events, held out or not: their rows."""
        there = np.flatnonzero((self.held_out == held_out) & (self.histories.lengths >= least))
        return rng.permutation(there)[:most]

    def items(self, row: int, events: int) -> list[int]:
        """The first `events` items of a history."""
        start = self.histories.starts[row]
        return self.histories.items[start : start + events].tolist()

    def before_cut(self, row: int) -> list[int]:
        """All items of a history."""
        return self.items(row, int(self.histories.lengths[row]))

    def titles_of(self, items: Sequence[int]) -> list[str]:
        return [self.titles[item - 1] for item in items]

    def states(self, rows: NDArray[np.int64], events: NDArray[np.int64]) -> NDArray[np.float32]:
        """The states float32 [n, width] after the first `events` [n] of the histories in `rows` [n]."""
        return prefix_states(self.recommender, self.histories, rows, events)

    @torch.no_grad()
    def queries(self, states: NDArray[np.float32], rows: NDArray[np.int64], events: NDArray[np.int64]) -> Tensor:
        """Queries [n, width] by which the recommender ranks items after the first `events` of the histories in `rows`.

        `states` [n, width] are the states at the same places.
        """
        device, seeds = self.recommender.table.device, None
        if self.seeds is not None:
            seeds = torch.from_numpy(self.seeds[self.histories.starts[rows] + events - 1]).to(device)
        return self.recommender.queries(torch.from_numpy(states).to(device), seeds)


def drawn_places(
    rows: NDArray[np.int64], last: NDArray[np.int64], most: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw for each of `rows` [n] at most `most` distinct numbers of events from 1 to its `last` [n], in rising order.

    Returns rows and numbers of events, one entry per place.
    """
    places = [np.sort(1 + rng.choice(end, min(most, end), replace=False)) for end in last.tolist()]
    return np.repeat(rows, [len(mine) for mine in places]), np.concatenate([np.zeros(0, np.int64), *places])
