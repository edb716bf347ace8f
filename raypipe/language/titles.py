"""Titles made distinct, so that a language model can tell items apart by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def distinct_titles(titles: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The titles, made distinct even if white space is ignored.

    A title that is empty or shared by several items gets its item's id behind it. If that still equals another title,
    it gets the item's number too.
    """
    found, marks = list(titles), list(ids)
    while alike := _shared(found):
        for item in alike:
            found[item] = f"{found[item]} [{marks[item]}]"
            # Numbers differ by more than white space, so the loop ends.
            marks[item] = str(item + 1)
    return found


def _shared(titles: Sequence[str]) -> list[int]:
    """The places of titles that are empty or equal another title, white space ignored."""
    spelled = [" ".join(title.split()) for title in titles]
    counts = Counter(spelled)
    return [place for place, title in enumerate(spelled) if not title or counts[title] > 1]
