"""Questions whose answers are titles: how they are decoded, constrained to a catalogue, and read from outcomes.

If several titles are asked for, each may be an answer of its own: then the likeliest titles that a search finds are
named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raypipe.engines.engine import Choices, Decoding, Outcome
from raypipe.systems.interpreter_figures import SEPARATOR

_BEAMS_OF_A_TITLE = 2  # a search with only as many beams as titles would miss some of them


def searching(titles: int, most_tokens: int) -> Decoding:
    """The decoding that searches for `titles` titles of at most `most_tokens` tokens each."""
    return Decoding(max_new_tokens=most_tokens, beams=_BEAMS_OF_A_TITLE * titles)


def likeliest(texts: Iterable[str], most: int) -> list[str]:
    """The first `most` distinct, non-empty texts of a search's results, best first."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text][:most]


@dataclass(frozen=True)
class TitleQuestion:
    """A question for at most `titles` titles: a list in one answer or, if `searched`, each as an answer of its own."""

    titles: int = 1
    searched: bool = False

    def decoding(self, most_tokens: int) -> Decoding:
        """How answers are decoded, each of at most `most_tokens` tokens."""
        return searching(self.titles, most_tokens) if self.searched else Decoding(max_new_tokens=most_tokens)

    def choices(self, catalogue: Sequence[str]) -> Choices:
        """The constraint that holds an answer to the titles of a catalogue."""
        return Choices(tuple(catalogue), SEPARATOR, 1 if self.searched else self.titles)

    def answer(self, outcome: Outcome) -> str:
        """The titles of an outcome as one list; of a search, the likeliest first."""
        if not self.searched:
            return outcome.text
        return SEPARATOR.join(likeliest((beam.text for beam in outcome.beams), self.titles))


ONE_TITLE = TitleQuestion()
