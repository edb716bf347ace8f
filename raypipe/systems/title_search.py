"""Questions whose answers are titles: how they are decoded, what holds them to a catalogue, and how their outcomes are read.

Of several titles, each may be an answer of its own: then the likeliest that a search finds are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raypipe.engines.engine import Choices, Decoding, Outcome
from raypipe.systems.interpreter_figures import SEPARATOR

_BEAMS_OF_A_TITLE = 2  # a search as wide as what it is to find would miss some of it


def searching(titles: int, most_tokens: int) -> Decoding:
    """How so many titles are searched, each of at most so many tokens."""
    return Decoding(max_new_tokens=most_tokens, beams=_BEAMS_OF_A_TITLE * titles)


def likeliest(texts: Iterable[str], most: int) -> list[str]:
    """The first `most` of what was found, best first, none twice and none empty."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text][:most]


@dataclass(frozen=True)
class TitleQuestion:
    """Asks for at most so many titles: for a list of them in one answer or, where they are `searched`, for each as an answer
    of its own."""

    titles: int = 1
    searched: bool = False

    def decoding(self, most_tokens: int) -> Decoding:
        """With at most so many tokens an answer."""
        return searching(self.titles, most_tokens) if self.searched else Decoding(max_new_tokens=most_tokens)

    def choices(self, catalogue: Sequence[str]) -> Choices:
        """What an answer may be where it is held to the titles of a catalogue."""
        return Choices(tuple(catalogue), SEPARATOR, 1 if self.searched else self.titles)

    def answer(self, outcome: Outcome) -> str:
        """The titles as one list, of a search the likeliest first."""
        if not self.searched:
            return outcome.text
        return SEPARATOR.join(likeliest((beam.text for beam in outcome.beams), self.titles))


ONE_TITLE = TitleQuestion()
