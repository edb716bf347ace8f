"""Judges of written texts: a rubric that any engine can answer, and the agreement of judges.

The rubric of RecExplainer (arXiv 2311.10947, section 4.3) rates from 0, wrong, to 3, right and thorough. A judge rates
a case: named pieces of text that replace the rubric's placeholders. A judge that is not a model implements `Judge`
itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from raypipe.config import Config, shaping
from raypipe.engines.engine import Decoding, Engine
from raypipe.language.prompt import Prompt

HIGHEST = 3
Case = Mapping[str, str]
"""Placeholder → the text that stands in for it."""

_SUMMARY = """Below is what one person chose, oldest first, and a summary of it that somebody wrote.
{items}
Summary: {summary}
How good is the summary? 0: it is about something else. 1: parts of it are wrong. 2: it is right and leaves out something \
that matters. 3: it is right and complete. Answer with the number alone.
Rating:"""
EXPLANATION = """Below are what one person chose, oldest first, an item, whether it is recommended to that person, and what \
somebody wrote about it.
{history}
Item: {item}
Recommended: {label}
Written: {decision}. {explanation}
How good is it? 0: its decision is wrong. 1: the decision is right, and the explanation missing, beside the point or made up. \
2: the explanation is right and has a weakness. 3: it is right, sums up the choices and says how the item fits them. Answer \
with the number alone.
Rating:"""
"""A rubric's prompt for explanations of recommendations."""

_NUMBER = re.compile(r"\d+")


class Rubric(Config):
    """The question a judge is asked, and how its answer is decoded."""

    prompt: str = shaping(_SUMMARY, "a template; each {name} stands for that piece of the case")
    decoding: Decoding = shaping(lambda: Decoding(max_new_tokens=8), "of the rating")

    def ask(self, case: Case) -> Prompt:
        """The rubric's prompt filled with the case. Raises ValueError if the case lacks a piece."""
        pieces = {"{" + name + "}": text for name, text in case.items()}
        asked = set(re.findall(r"\{\w+\}", self.prompt))
        if missing := asked - pieces.keys():
            raise ValueError(f"the rubric asks for {', '.join(sorted(missing))}, which there is not")
        # Replaced in one pass, so that a title that looks like a placeholder stays a title.
        return Prompt.of(re.sub(r"\{\w+\}", lambda found: pieces[found[0]], self.prompt))


class Judge(Protocol):
    def rate(self, cases: Sequence[Case]) -> list[int | None]:
        """Rate each case from 0 to 3; None if the judge gave no rating."""
        ...


class EngineJudge:
    """An engine that answers the rubric; implements `Judge`. `calls`, `tokens_in` and `tokens_out` sum up its cost."""

    def __init__(self, engine: Engine, rubric: Rubric) -> None:
        self.engine, self.rubric = engine, rubric
        self.calls = self.tokens_in = self.tokens_out = 0

    def rate(self, cases: Sequence[Case]) -> list[int | None]:
        ratings: list[int | None] = [None] * len(cases)
        for outcome in self.engine.generate([self.rubric.ask(case) for case in cases], self.rubric.decoding):
            self.calls += outcome.calls
            self.tokens_in += outcome.tokens_in
            self.tokens_out += outcome.tokens_out
            ratings[outcome.index] = rating_of(outcome.text)
        return ratings


def rating_of(answer: str) -> int | None:
    """The first number of an answer if it is at most `HIGHEST`, otherwise None."""
    found = _NUMBER.search(answer)
    return int(found[0]) if found and int(found[0]) <= HIGHEST else None


def agreement(one: Sequence[int | None], other: Sequence[int | None]) -> float | None:
    """Quadratically weighted kappa (Cohen 1968) of two judges over the cases that both rated.

    1 is full agreement, 0 is agreement by chance. None if there is no such case, or if both gave every case one and the
    same rating.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    a, b = np.array(pairs, np.float64).T
    apart = np.mean((a - b) ** 2)
    by_chance = (
        a.var() + b.var() + (a.mean() - b.mean()) ** 2
    )  # the mean squared difference over all pairs of a rating of one and a rating of the other
    return float(1 - apart / by_chance) if by_chance else None
