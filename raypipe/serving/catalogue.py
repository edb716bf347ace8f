"""The catalogue as requests refer to it: items by their own ids, attributes by name and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.data.recommendable import Holders, attributes_of, holders_of, narrowed, recommendable
from raypipe.language.catalogue import Catalogue
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.language.titles import distinct_titles


@dataclass(frozen=True)
class ServedCatalogue:
    """The items that are served.

    `ids`, `titles`, `texts` and `attributes` are by index − 1; `index_of` maps an id to its index. `recommendable` bool
    [items + 1]: the item is available and not denied. `holders`: the indices of the items that have an attribute value.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    index_of: Mapping[str, int]
    recommendable: NDArray[np.bool_]
    holders: Holders
    texts: Sequence[str]
    attributes: Sequence[Mapping[str, Sequence[str]]]

    @classmethod
    def of(cls, items: pa.Table, denied: frozenset[str] = frozenset()) -> ServedCatalogue:
        """The catalogue of `items`, which holds the rows of all items, in any order."""
        items = items.sort_by("index")
        ids = items["item_id"].to_pylist()
        attributes = attributes_of(items)
        return cls(
            ids,
            items["title"].to_pylist(),
            {item: n for n, item in enumerate(ids, start=1)},
            recommendable(items, denied),
            holders_of(attributes),
            items["text"].to_pylist(),
            attributes,
        )

    @cached_property
    def for_prompts(self) -> Catalogue:
        """The catalogue for prompts, in which every item has a title of its own, so that they can be told apart."""
        return Catalogue(distinct_titles(self.titles, self.ids), self.attributes, self.texts)

    def lines(self, indices: Sequence[int], prompts: SummaryPrompts) -> list[str]:
        """The line of each item, as prompts of summaries show it."""
        titles, attributes, texts = self.titles, self.attributes, self.texts
        return [prompts.item_line(titles[index - 1], attributes[index - 1], texts[index - 1]) for index in indices]

    def indices(self, item_ids: Sequence[str]) -> NDArray[np.int32]:
        """The indices of the ids that are known, in their order; unknown ids are left out."""
        found = (self.index_of.get(item, 0) for item in item_ids)
        return np.array([index for index in found if index], np.int32)

    def allowed(self, only: Sequence[tuple[str, str]], items: int) -> NDArray[np.bool_]:
        """Which of the first `items` are recommendable and have every attribute value of `only`, bool [items + 1].

        Raises UnknownValueError for a value that no item has.
        """
        return narrowed(self.recommendable[: items + 1], self.holders, only)
