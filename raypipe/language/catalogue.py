"""A catalogue as language models are told of it: what items are called, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.language.summary_prompts import Attributes, SummaryPrompts


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Items in order of their index: row r describes item index r + 1, as index 0 is padding."""

    titles: Sequence[str]
    attributes: Sequence[Attributes]
    texts: Sequence[str] = ()

    def lines(self, prompts: SummaryPrompts) -> list[str]:
        """The line of every item, as prompts show it."""
        texts = self.texts or [""] * len(self.titles)
        return [prompts.item_line(*item) for item in zip(self.titles, self.attributes, texts, strict=True)]
