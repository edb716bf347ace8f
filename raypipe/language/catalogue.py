"""A catalogue as language models see it: the titles, attributes and texts of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.language.summary_prompts import Attributes, SummaryPrompts, beginning


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Items in order of index: row r describes the item of index r + 1, because index 0 is padding."""

    titles: Sequence[str]
    attributes: Sequence[Attributes]
    texts: Sequence[str] = ()

    def first(self, count: int) -> Catalogue:
        """The catalogue of the first `count` items, by index."""
        return Catalogue(self.titles[:count], self.attributes[:count], self.texts[:count])

    def descriptions(self, characters: int) -> list[str]:
        """The beginning of every item's text, on one line; empty if it has none."""
        return [beginning(text, characters) for text in self.texts or [""] * len(self.titles)]

    def lines(self, prompts: SummaryPrompts) -> list[str]:
        """The line of every item, as prompts show it."""
        texts = self.texts or [""] * len(self.titles)
        return [prompts.item_line(*item) for item in zip(self.titles, self.attributes, texts, strict=True)]
