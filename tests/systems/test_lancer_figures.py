"""What LANCER's lists are like beyond being right, by the functions that recommenders are measured by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.metrics.lists import collapse, coverage, diversity, novelty
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import NAME
from raypipe.systems.lancer_figures import EvaluationSet, measured
from raypipe.systems.lancer_lists import Lists
from tests.systems.lancer_world import ITEMS, config_of

# The first user chose 2 before and chooses it again; the second chooses 5.
HELD = HeldOut.of(Histories(np.array([1, 2, 3, 2, 4, 3, 5], np.int32), np.array([4, 7])), 1, ITEMS)
LISTS = [[2, 6, 7], [*range(6, ITEMS + 1), 5]]
TABLE = np.random.default_rng(0).standard_normal((ITEMS, 4)).astype(np.float32)


def figures(lists: list[list[int]], **options: Any) -> dict[str, dict[str, float]]:
    """Of a writer that answers everything with these lists."""
    exact, margins = [np.ones(1, bool)] * 2, [np.zeros(1, np.float32)] * 2
    writer: Any = SimpleNamespace(
        lancer=SimpleNamespace(config=config_of(**options)),
        grounding=SimpleNamespace(table=torch.from_numpy(TABLE)),
        lists=lambda *_, **__: Lists(lists, [], exact, margins, []),
    )
    told = measured(EvaluationSet(HELD, np.zeros(2, bool)), writer, lambda name, done, of: None)
    return {name: {figure: mean.value for figure, mean in mine.items()} for name, mine in told.items()}


@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_are_measured_as_they_are_served(filter_seen: bool) -> None:
    """What was chosen next stays in a list to be measured, and would not be served where it was seen before."""
    found = figures(LISTS, filter_seen=filter_seen)
    served = np.zeros((2, 10), np.int64)
    for row, mine in enumerate([LISTS[0][filter_seen:], LISTS[1][:10]]):
        served[row, : len(mine)] = mine
    counts = HELD.training.counts(ITEMS)
    vectors = np.concatenate([np.zeros((1, 4), np.float32), TABLE])
    beyond = {
        "coverage@10": coverage(served, ITEMS),
        "novelty@10": novelty(served, counts),
        "diversity@10": diversity(served, vectors),
        "collapse": collapse(vectors),
    }
    assert {name: found[NAME][name] for name in beyond} == pytest.approx(beyond)
    assert not {"coverage@10", "collapse"} & found["shuffled items"].keys()


def test_what_is_of_no_list_is_left_out() -> None:
    found = figures([[], []])[NAME]
    assert found["coverage@10"] == 0
    assert not {"novelty@10", "diversity@10"} & found.keys()
