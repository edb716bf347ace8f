"""How right RecInterpreter's answers are (arXiv 2310.20487, section 4.1), by titles that are exactly the catalogue's."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from raypipe.metrics.recovery import recovered, recovered_places, rouge_l, titles_in, valid_ratio

SEPARATOR = "; "
"""Between the titles of an answer."""


def recovery_figures(
    answers: Sequence[str], histories: Sequence[Sequence[str]], known: Collection[str], *, searched: bool
) -> dict[str, float]:
    """Of answers to recovery, beside the titles asked for, oldest first: means over users.

    `recovery` the share of the titles named, `recovery by place 1` that of the newest event and so on, `valid` the share of what
    is named that the catalogue has, `rouge_l`; `order` the share of answers that are exactly the titles in order, unless answers
    are `searched` for, the likeliest title first.
    """
    named = [titles_in(answer, known, SEPARATOR) for answer in answers]
    figures = {
        "recovery": [recovered(mine, history) for mine, history in zip(named, histories, strict=True)],
        "valid": [valid_ratio(mine, known) for mine in named],
        "rouge_l": [
            rouge_l(answer, SEPARATOR.join(history)) for answer, history in zip(answers, histories, strict=True)
        ],
    }
    if not searched:
        figures["order"] = [float(mine == list(history)) for mine, history in zip(named, histories, strict=True)]
    places = [recovered_places(mine, history)[::-1] for mine, history in zip(named, histories, strict=True)]
    for place in range(max(map(len, places), default=0)):
        found = [float(mine[place]) for mine in places if place < len(mine)]
        figures[f"recovery by place {place + 1}"] = found
    return {name: float(np.mean(values)) if values else 0.0 for name, values in figures.items()}


def residual_figures(answers: Sequence[str], titles: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Of answers to residual: `residual` the share that are the title exactly, `residual valid` that are any title."""
    given = [title_in(answer, known) for answer in answers]
    right = [mine == title for mine, title in zip(given, titles, strict=True)]
    return {
        "residual": float(np.mean(right)) if right else 0.0,
        "residual valid": float(np.mean([mine in known for mine in given])) if given else 0.0,
    }


def title_in(answer: str, known: Collection[str]) -> str:
    """The title an answer is, without a full stop that is none of it."""
    answer = answer.strip()
    return answer if answer in known else answer.removesuffix(".")
