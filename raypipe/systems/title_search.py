"""Several titles of which each is an answer of its own: the likeliest that a search finds."""

from __future__ import annotations

from collections.abc import Iterable

from raypipe.engines.engine import Decoding

_BEAMS_OF_A_TITLE = 2  # a search as wide as what it is to find would miss some of it


def searching(titles: int, most_tokens: int) -> Decoding:
    """How so many titles are searched, each of at most so many tokens."""
    return Decoding(max_new_tokens=most_tokens, beams=_BEAMS_OF_A_TITLE * titles)


def likeliest(texts: Iterable[str], most: int) -> list[str]:
    """The first `most` of what was found, best first, none twice and none empty."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text][:most]
