"""What a written summary says about a user, compared with what the user did. Plain string and count arithmetic.

A value counts as named if it stands in the text as a whole phrase in its exact spelling: "Fi" is not named by "Sci-Fi",
nor "War" by "Warsaw" or "war". If two values match at one place, the longer one is named.
Not covered: negation ("no Horror") and paraphrase ("scary films"); both count as the bare words do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

TOP = 3
"""How many of a user's most frequent values count as their own; values tied with the last of them do too."""

_HEAD = re.compile(r"\w+|[^\w\s]")
# A hyphen or apostrophe binds a word to its neighbour: neither "Sci-Fi" nor "Fi's" names the value "Fi".
_BOUND_BEFORE = re.compile(r"\w[-'’]$")
_BOUND_AFTER = re.compile(r"[-'’]?\w")
_LATELY = re.compile(r"\bLately\b(.*)", re.DOTALL)


class Vocabulary:
    """The attribute values of a catalogue, compiled once. `named` reads about 100,000 summaries a second."""

    def __init__(self, values: Iterable[str]) -> None:
        self.values = frozenset(value for value in values if value.strip())
        lengths: dict[str, set[int]] = {}
        for value in self.values:
            lengths.setdefault(_HEAD.findall(value)[0], set()).add(len(value))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}

    def named(self, text: str) -> tuple[str, ...]:
        """The distinct values that `text` names, in order of first mention."""
        return tuple(dict.fromkeys(value for _, value in self.found(text)))

    def found(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield (start, value) for each value that `text` names, in order and without overlaps."""
        end = 0
        for match in _HEAD.finditer(text):
            lengths = self._lengths.get(match.group())
            if lengths is None:
                continue
            start = match.start()
            if start < end or _BOUND_BEFORE.search(text, max(0, start - 2), start):
                continue
            for length in lengths:
                value = text[start : start + length]
                if value in self.values and not _BOUND_AFTER.match(text, start + length):
                    yield start, value
                    end = start + length
                    break

    def named_lately(self, text: str) -> tuple[str, ...]:
        """The distinct values named after the word "Lately"."""
        match = _LATELY.search(text)
        return self.named(match.group(1)) if match else ()


def top_values(counts: Mapping[str, int], k: int = TOP) -> frozenset[str]:
    """The k most frequent values of a history and every value that ties with the kth; empty if there are no values."""
    most = sorted(counts.values(), reverse=True)[:k]
    if not most:
        return frozenset()
    threshold = max(most[-1], 1)
    return frozenset([value for value, count in counts.items() if count >= threshold])


def item_values(attributes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The distinct values of an item's attributes (name → values), of all attributes together."""
    return tuple({value for values in attributes.values() for value in values})


def value_counts(items: Iterable[Sequence[str]]) -> Counter[str]:
    """The number of items in which each value occurs. Each item gives its distinct values, as from `item_values`."""
    return Counter(chain.from_iterable(items))


def attribute_precision(named: Sequence[str], user_top_values: frozenset[str]) -> float | None:
    """Share of the values a summary names that are among the user's top values.

    None if the user has no top values, because there is nothing to be right about. A summary that names no value scores
    0: silence is not precision.
    """
    if not user_top_values:
        return None
    return sum(value in user_top_values for value in named) / len(named) if named else 0.0


def attribute_coverage(named: Sequence[str], user_top_values: frozenset[str]) -> float | None:
    """Share of the user's top values that a summary names; None if the user has no top values."""
    if not user_top_values:
        return None
    return len(user_top_values.intersection(named)) / len(user_top_values)


def shift_precision(
    lately: Sequence[str],
    earlier: Mapping[str, int],
    recent: Mapping[str, int],
    earlier_items: int,
    recent_items: int,
) -> float | None:
    """Share of the values named after "Lately" that really are more frequent per item in the recent part than before.

    `earlier` and `recent` count in how many of `earlier_items` and `recent_items` each value occurs. None if the
    summary claims no shift or if either part is empty.
    """
    if not lately or not earlier_items or not recent_items:
        return None
    right = sum(recent.get(v, 0) * earlier_items > earlier.get(v, 0) * recent_items for v in lately)
    return right / len(lately)


def stability(before: Sequence[str], after: Sequence[str]) -> float | None:
    """How much two summaries of a user agree: shared named values over all named values; None if neither names any."""
    one, other = set(before), set(after)
    return len(one & other) / len(one | other) if one or other else None


def distinctness(summaries: Sequence[str]) -> float | None:
    """The probability that two different users have different summaries (Simpson 1949).

    None for fewer than two users.
    """
    users = len(summaries)
    if users < 2:
        return None
    alike = sum(count * (count - 1) for count in Counter(summaries).values())
    return 1 - alike / (users * (users - 1))


def rule_summary_rating(named: Sequence[str], counts: Mapping[str, int]) -> int | None:
    """A rating from 0 to 3 of a summary that names these values, by counting only; None for a user without values.

    0: none of the named values is a top value of the user. 1: fewer than half of the named values are. 2: at least half
    are. 3: all are, and at least two thirds of the top values are named.
    """
    top = top_values(counts)
    precision, coverage = attribute_precision(named, top), attribute_coverage(named, top)
    if precision is None or coverage is None:
        return None
    if precision == 1 and coverage >= 2 / 3:
        return 3
    return 0 if precision == 0 else 1 + int(precision >= 0.5)
