"""Finds prompts that begin alike, so that a shared beginning is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class Family:
    """Numbers of prompts, longest prompt first, and how many tokens all of them begin with.

    Each prompt is longer than that. A family of one shares nothing.
    """

    members: tuple[int, ...]
    shared: int = 0


def families(prompts: Sequence[Sequence[int]], least: int) -> list[Family]:
    """Assign every prompt to one family, so that few tokens are read if each family's beginning is read once.

    What all prompts share is assumed to be read once in any case; a family shares at least `least` tokens more than
    that. A family takes in smaller ones with longer beginnings if its own, shorter beginning saves more tokens than
    theirs do together.
    """
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    alike = [_alike(prompts[one], prompts[other]) for one, other in pairwise(order)]
    everybody = min(alike, default=0)
    # Stretches of the order are joined where neighbours share most first: what they share there, all of a stretch
    # share.
    first, last, saved = list(range(len(order))), list(range(len(order))), [0] * len(order)
    together = np.zeros(len(alike), bool)
    for gap in sorted(range(len(alike)), key=lambda gap: -alike[gap]):
        start, stop, more = first[gap], last[gap + 1], alike[gap] - everybody
        first[stop], last[start] = start, stop
        saved[start] += saved[gap + 1]
        if more >= least and (stop - start) * more > saved[start]:
            saved[start] = (stop - start) * more
            together[start:stop] = True
    found, start = [], 0
    for stop in [*np.flatnonzero(~together).tolist(), len(order) - 1] if order else []:
        members = sorted(order[start : stop + 1], key=lambda number: (-len(prompts[number]), number))
        found.append(Family(tuple(members), min(alike[start:stop], default=0)))
        start = stop + 1
    return found


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with; at least one token of each is left over."""
    shorter = min(len(one), len(other)) - 1
    return next((at for at in range(shorter) if one[at] != other[at]), max(0, shorter))
