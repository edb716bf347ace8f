"""Figures of RecInterpreter's answers (arXiv 2310.20487, section 4.1); only exact titles of the catalogue count."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from raypipe.metrics.recovery import recovered, recovered_places, rouge_l, titles_in, valid_ratio

SEPARATOR = "; "
"""Between the titles of an answer."""


def recovery_figures(
    answers: Sequence[str], histories: Sequence[Sequence[str]], known: Collection[str], *, searched: bool
) -> dict[str, float]:
    """Figures of answers to recovery, as means over users; `histories` are the titles asked for, oldest first.

    `recovery` is the share of the titles that the answer names; `recovery by place 1` is that of the newest event, and
    so on. `valid` is the share of named titles that the catalogue has. `rouge_l` compares the texts, and `order` is the
    share of answers that are exactly the titles in order. Both are left out if answers are `searched`, since these list
    the likeliest title first.
    """
    named = [titles_in(answer, known, SEPARATOR) for answer in answers]
    figures = {
        "recovery": [recovered(mine, history) for mine, history in zip(named, histories, strict=True)],
        "valid": [valid_ratio(mine, known) for mine in named],
    }
    if not searched:
        texts = map(SEPARATOR.join, histories)
        figures["rouge_l"] = [rouge_l(answer, text) for answer, text in zip(answers, texts, strict=True)]
        figures["order"] = [float(mine == list(history)) for mine, history in zip(named, histories, strict=True)]
    places = [recovered_places(mine, history)[::-1] for mine, history in zip(named, histories, strict=True)]
    for place in range(max(map(len, places), default=0)):
        found = [float(mine[place]) for mine in places if place < len(mine)]
        figures[f"recovery by place {place + 1}"] = found
    return {name: float(np.mean(values)) if values else 0.0 for name, values in figures.items()}


def residual_figures(answers: Sequence[str], titles: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Shares of answers to residual: `residual` of those that are exactly the title, `residual valid` any title."""
    given = [title_in(answer, known) for answer in answers]
    right = [mine == title for mine, title in zip(given, titles, strict=True)]
    return {
        "residual": float(np.mean(right)) if right else 0.0,
        "residual valid": float(np.mean([mine in known for mine in given])) if given else 0.0,
    }


def title_in(answer: str, known: Collection[str]) -> str:
    """The title that an answer gives: the stripped answer, without a final full stop that is no part of the title."""
    answer = answer.strip()
    return answer if answer in known else answer.removesuffix(".")
