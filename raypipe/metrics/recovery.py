"""How much of a history an answer names, title by title (RecInterpreter, arXiv 2310.20487).

The paper's released metrics are broken: they search titles as regular expressions, so "Alien" is found in "Aliens".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def titles_in(answer: str, known: Collection[str], separator: str = "; ") -> list[str]:
    """The titles that an answer lists, in order.

    A known title that contains the separator is one piece. A full stop at the end is removed from the last title,
    unless a title is known with it.
    """
    found = _pieces(answer.strip(), known, separator)
    if found and found[-1] not in known and found[-1].endswith("."):
        return _pieces(answer.strip().removesuffix("."), known, separator)
    return found


def _pieces(answer: str, known: Collection[str], separator: str) -> list[str]:
    pieces = [piece.strip() for piece in answer.split(separator)]
    longest = max((title.count(separator) for title in known), default=0) + 1
    found: list[str] = []
    at = 0
    while at < len(pieces):
        joins = (separator.join(pieces[at : at + count]) for count in range(min(longest, len(pieces) - at), 1, -1))
        piece = next((join for join in joins if join in known), pieces[at])
        found.append(piece)
        at += piece.count(separator) + 1 if piece in known else 1
    return [piece for piece in found if piece]


def recovered(answer: Sequence[str], history: Sequence[str]) -> float:
    """Share of the history's distinct titles that the answer names; 0 for an empty history.

    Only the answer's first distinct titles count, as many as the history has.
    """
    titles = set(history)
    return len(titles.intersection(_first(answer, len(titles)))) / len(titles) if titles else 0.0


def recovered_places(answer: Sequence[str], history: Sequence[str]) -> list[bool]:
    """For each event of the history, oldest first, whether `recovered` counts its title as named."""
    named = set(_first(answer, len(set(history))))
    return [title in named for title in history]


def _first(answer: Sequence[str], count: int) -> list[str]:
    """The first `count` distinct titles of an answer, so that a longer answer is no better guess."""
    return list(dict.fromkeys(answer))[:count]


def valid_ratio(answer: Sequence[str], known: Collection[str]) -> float:
    """Share of the answer's pieces that are titles of the catalogue; 0 if the answer has no pieces."""
    return sum(piece in known for piece in answer) / len(answer) if answer else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004)."""
    one, other = answer.split(), reference.split()
    if not one or not other:
        return 0.0
    longest = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, against in enumerate(other, start=1):
            above = longest[place]
            longest[place] = diagonal + 1 if word == against else max(above, longest[place - 1])
            diagonal = above
    return 2 * longest[-1] / (len(one) + len(other))
