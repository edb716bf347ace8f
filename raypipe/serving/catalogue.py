"""A catalogue as requests speak of it: items by their own ids, attributes by name and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.errors import AccessError
from raypipe.language import instructions
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.language.titles import distinct_titles


class UnknownValueError(ValueError):
    """An attribute value that no item has; the message is for whoever asked."""


@dataclass(frozen=True)
class Catalogue:
    """`ids`, `titles`, `texts` and `attributes` by index − 1; `index_of` back; `recommendable` bool [items + 1]: available
    and not denied; `holders` the indices of the items that have an attribute's value."""

    ids: Sequence[str]
    titles: Sequence[str]
    index_of: Mapping[str, int]
    recommendable: NDArray[np.bool_]
    holders: Mapping[tuple[str, str], NDArray[np.int64]]
    texts: Sequence[str]
    attributes: Sequence[Mapping[str, Sequence[str]]]

    @classmethod
    def of(cls, items: pa.Table, denied: frozenset[str] = frozenset()) -> Catalogue:
        """Of the rows of `items`, all of them, in any order."""
        items = items.sort_by("index")
        ids = items["item_id"].to_pylist()
        recommendable = np.concatenate([[False], items["available"].to_numpy()])
        recommendable[[index for index, item in enumerate(ids, start=1) if item in denied]] = False
        holders: dict[tuple[str, str], list[int]] = {}
        attributes = [{name: values or () for name, values in pairs or ()} for pairs in items["attributes"].to_pylist()]
        for index, pairs in enumerate(attributes, start=1):
            for name, values in pairs.items():
                for value in values:
                    holders.setdefault((name, value), []).append(index)
        found = {pair: np.array(indices, np.int64) for pair, indices in holders.items()}
        return cls(
            ids,
            items["title"].to_pylist(),
            {item: n for n, item in enumerate(ids, start=1)},
            recommendable,
            found,
            items["text"].to_pylist(),
            attributes,
        )

    @cached_property
    def spoken(self) -> instructions.Catalogue:
        """As a language model is to tell items apart: each by a title of its own."""
        return instructions.Catalogue(distinct_titles(self.titles, self.ids), self.attributes, self.texts)

    def lines(self, indices: Sequence[int], prompts: SummaryPrompts) -> list[str]:
        """The line of each, as prompts of summaries show it."""
        titles, attributes, texts = self.titles, self.attributes, self.texts
        return [prompts.item_line(titles[index - 1], attributes[index - 1], texts[index - 1]) for index in indices]

    def indices(self, item_ids: Sequence[str]) -> NDArray[np.int32]:
        """Of those ids that are known, in their order."""
        found = (self.index_of.get(item, 0) for item in item_ids)
        return np.array([index for index in found if index], np.int32)

    def allowed(self, only: Sequence[tuple[str, str]], items: int) -> NDArray[np.bool_]:
        """bool [items + 1], of the first `items`: recommendable, with every attribute value of `only`.

        Raises UnknownValueError for a value that no item has.
        """
        allowed = self.recommendable[: items + 1]
        for pair in only:
            if pair not in self.holders:
                raise UnknownValueError(
                    f"No item has {pair[1]!r} in its attribute {pair[0]!r}; values are compared exactly."
                )
            holders = self.holders[pair]
            has = np.zeros(items + 1, bool)
            has[holders[holders <= items]] = True
            allowed = allowed & has
        return allowed


def read_denied(path: str | None) -> frozenset[str]:
    """The item ids of a deny list, a line each; raises AccessError where it cannot be read."""
    if path is None:
        return frozenset()
    try:
        return frozenset(Path(path).read_text(encoding="utf-8").split("\n")) - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"The deny list {path} cannot be read: {error}.", "Write one item id a line.") from None
