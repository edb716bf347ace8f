"""Judges that say which of two titles fits a history better: a rule that counts attribute values, and any engine.

RecInterpreter's oracle (arXiv 2310.20487, section 3.4) has no right answer to compare with. Whether the title it names
is preferred to another item tells whether its words mean something. The order of the two titles is drawn for each pair,
so that a judge who always takes the first is at chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Protocol

import numpy as np

from raypipe.engines.engine import Engine, EngineConfig
from raypipe.metrics.text import item_values, value_counts
from raypipe.storage.ledger import Usage
from raypipe.systems.judges import Rubric
from raypipe.systems.source import Source

PREFERENCE = """Below is what one person chose, oldest first, and two items.
{history}
A: {one}
B: {other}
Which of the two fits that person better? Answer with the letter alone.
Letter:"""
"""A rubric's prompt for two titles."""

RULE = "rule"
"""The judge who is always there; figures of others bear their names."""

_LETTER = re.compile(r"\b[AB]\b")
_ALONE = re.compile(r"\W*([AB])(?:[^\w\s]|\s*\n|\s*$)")


@dataclass(frozen=True)
class Pair:
    """A history's titles, oldest first, and two titles of the catalogue."""

    history: Sequence[str]
    one: str
    other: str

    @property
    def turned(self) -> Pair:
        return Pair(self.history, self.other, self.one)


class PreferenceJudge(Protocol):
    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1 if the first title of a pair fits better, 0 if the other, 0.5 if both alike; None if there is no answer."""
        ...


class OverlapRule:
    """Prefers the item whose attribute values more items of the history have; implements `PreferenceJudge`."""

    def __init__(self, source: Source) -> None:
        values = [item_values(attributes) for attributes in source.catalogue.attributes]
        self.values = dict(zip(source.titles, values, strict=True))

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        return [self._preferred(pair) for pair in pairs]

    def _preferred(self, pair: Pair) -> float:
        counts = value_counts(self.values[title] for title in pair.history)
        one, other = (self._overlap(counts, title) for title in (pair.one, pair.other))
        return 0.5 if one == other else float(one > other)

    def _overlap(self, counts: Counter[str], title: str) -> float:
        """The number of the history's items that have a value of the item, as a mean over the item's values."""
        values = self.values[title]
        return sum(counts[value] for value in values) / len(values) if values else 0.0


class EnginePreference:
    """An engine that answers with a letter; implements `PreferenceJudge`.

    `calls`, `tokens_in` and `tokens_out` sum up its cost.
    """

    def __init__(self, engine: Engine, rubric: Rubric) -> None:
        self.engine, self.rubric = engine, rubric
        self.calls = self.tokens_in = self.tokens_out = 0

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        cases = [{"history": "\n".join(pair.history), "one": pair.one, "other": pair.other} for pair in pairs]
        found: list[float | None] = [None] * len(pairs)
        for outcome in self.engine.generate([self.rubric.ask(case) for case in cases], self.rubric.decoding):
            self.calls += outcome.calls
            self.tokens_in += outcome.tokens_in
            self.tokens_out += outcome.tokens_out
            found[outcome.index] = _letter(outcome.text)
        return found


class PreferenceJudges:
    """The rule, and the engines that a rubric asks, by name. The rubric's seed draws the order of the titles too."""

    def __init__(self, engines: Mapping[str, EngineConfig], rubric: Rubric) -> None:
        self.engines, self.rubric = engines, rubric
        self._asked: list[EnginePreference] = []

    @cached_property
    def identities(self) -> dict[str, dict[str, Any]]:
        """What each engine is, with the content of its model. Raises UsageError if a checkpoint does not exist."""
        return {name: engine.identity() for name, engine in self.engines.items()}

    @property
    def spent(self) -> Usage:
        """What asking the engines has taken so far."""
        return sum((Usage(one.calls, one.tokens_in, one.tokens_out) for one in self._asked), Usage())

    def build(self, source: Source) -> dict[str, PreferenceJudge]:
        """The judges of titles of the source's catalogue, with the engines' weights loaded."""
        asked = {name: EnginePreference(engine.build(), self.rubric) for name, engine in self.engines.items()}
        self._asked += asked.values()
        return {RULE: OverlapRule(source), **asked}


def _letter(answer: str) -> float | None:
    """1 for A, 0 for B, None if undecided.

    It is the letter that an answer begins with if that stands alone, otherwise the only one of the two that it names.
    An answer that may begin with the article "A" and also names B is undecided.
    """
    first = _ALONE.match(answer)
    named = {first[1]} if first else set(_LETTER.findall(answer))
    return float(named == {"A"}) if len(named) == 1 else None


@dataclass(frozen=True)
class Preference:
    """How often the first title is preferred (`share`, None if no pair was judged), and the share of pairs `judged`."""

    share: float | None
    judged: float


def preferred(judge: PreferenceJudge, pairs: Sequence[Pair], known: Collection[str], seed: int = 0) -> Preference:
    """Ask a judge how often it prefers the `one` of each pair; the order of the two titles is drawn for each pair.

    Two cases are settled without asking: a `one` that is not `known` to the catalogue loses, and equal titles count
    0.5.
    """
    settled = {at: 0.0 for at, pair in enumerate(pairs) if pair.one not in known}
    settled |= {at: 0.5 for at, pair in enumerate(pairs) if pair.one == pair.other}
    turned = np.random.default_rng(seed).random(len(pairs)) < 0.5
    asked = [at for at in range(len(pairs)) if at not in settled]
    answers = judge.prefer([pairs[at].turned if turned[at] else pairs[at] for at in asked])
    told = {
        at: 1 - answer if turned[at] else answer
        for at, answer in zip(asked, answers, strict=True)
        if answer is not None
    }
    values = [*settled.values(), *told.values()]
    return Preference(float(np.mean(values)) if values else None, len(values) / max(1, len(pairs)))


def preferences(
    judges: Mapping[str, PreferenceJudge],
    named: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    histories: Sequence[Sequence[str]],
    known: Collection[str],
    seed: int,
) -> dict[str, float]:
    """By judge and kind of rival, how often the title `named` for each history's oracle is preferred to the rival.

    `seed` draws the order of the two titles of each pair. A figure `judged` is added where a judge left some pairs undecided.
    """
    figures: dict[str, float] = {}
    for judge, rival in product(judges, rivals):
        pairs = [Pair(*case) for case in zip(histories, named, rivals[rival], strict=True)]
        found = preferred(judges[judge], pairs, known, seed)
        by = "" if judge == RULE else f" by {judge}"
        if found.share is not None:
            figures[f"oracle preferred to {rival}{by}"] = found.share
        if found.judged < 1:
            figures[f"oracle judged beside {rival}{by}"] = found.judged
    return figures
