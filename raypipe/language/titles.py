"""Titles as a language model is to tell items apart by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def distinct_titles(titles: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The titles, no two alike but for white space; one that several items share, or that is empty, has its item's id behind it,
    and where another's title reads like that, its number too."""
    found, marks = list(titles), list(ids)
    while alike := _shared(found):
        for item in alike:
            found[item] = f"{found[item]} [{marks[item]}]"
            # Numbers differ by more than white space, so that this ends.
            marks[item] = str(item + 1)
    return found


def _shared(titles: Sequence[str]) -> list[int]:
    """The places of titles that are empty, or that another is too."""
    spelled = [" ".join(title.split()) for title in titles]
    counts = Counter(spelled)
    return [place for place, title in enumerate(spelled) if not title or counts[title] > 1]
