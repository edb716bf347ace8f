"""Titles as a language model is to tell items apart by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def distinct_titles(titles: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The titles; one that several items share, or that is empty, has its item's id behind it."""
    counts = Counter(titles)
    return [
        f"{title} [{item}]" if counts[title] > 1 or not title else title
        for title, item in zip(titles, ids, strict=True)
    ]
