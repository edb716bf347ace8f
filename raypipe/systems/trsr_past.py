"""What a ranker of candidates knows of users before the cut: their histories, the catalogue, and summaries of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from raypipe.language.catalogue import Catalogue
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.recommenders.windows import Histories
from raypipe.systems.candidate_facts import text_neighbours, text_vectors

_MOST_CHARACTERS = 10_000  # of an item's text, from whose words its similarity to others is computed


@dataclass(frozen=True)
class PastSummaries:
    """Summaries by history row: pairs (events, text) by rising events, where text covers the first `events` events."""

    texts: Mapping[int, Sequence[tuple[int, str]]] = field(default_factory=dict)
    cost: Mapping[str, int] = field(default_factory=dict)
    """Calls and tokens of all that were written of everybody's events before the cut, and of how many users."""

    def at(self, row: int, events: int) -> str | None:
        """The newest summary of a history that covers its first `events` events or fewer; None if there is none."""
        mine = self.texts.get(row, ())
        place = bisect_right(mine, events, key=lambda pair: pair[0])
        return mine[place - 1][1] if place else None


@dataclass(frozen=True)
class Past:
    """What is known before the cut. `held_out` bool [users] marks the users whom no training sees."""

    histories: Histories
    held_out: NDArray[np.bool_]
    catalogue: Catalogue
    summaries: PastSummaries = PastSummaries()

    @cached_property
    def learnable(self) -> Histories:
        """The histories of users whom trainings and counts may see."""
        return self.histories.of(~self.held_out)

    @cached_property
    def vectors(self) -> csr_array:
        """The `text_vectors` of every item's line."""
        return text_vectors(self.catalogue.lines(SummaryPrompts(text_characters=_MOST_CHARACTERS)))

    @cached_property
    def neighbours(self) -> csr_array:
        return text_neighbours(self.vectors)
