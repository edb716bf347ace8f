"""States of prefixes, of every model, against encoding each prefix by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories

ITEMS = 20
LISTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]
HISTORIES = Histories(np.array([item for mine in LISTS for item in mine], np.int32), np.array([9, 10, 13]))


@pytest.mark.parametrize("model", ["sasrec", "gru4rec", "caser", "bert4rec", "dreamrec", "mf"])
def test_a_state_is_that_of_its_prefix_and_sees_nothing_later(model: str) -> None:
    built = RecommenderConfig(model=model, width=8, max_length=4, hidden=8).build(ITEMS).eval()
    rows, events = np.array([0, 2, 0, 1, 0, 2, 0]), np.array([9, 2, 3, 1, 5, 3, 1])
    states = prefix_states(built, HISTORIES, rows, events)
    for row, count, state in zip(rows.tolist(), events.tolist(), states, strict=True):
        with torch.no_grad():
            alone = built.encode(Sequences.of([LISTS[row][:count]]))[0]
        np.testing.assert_allclose(state, alone.numpy(), rtol=1e-5, atol=1e-5)
    changed = HISTORIES.items.copy()
    changed[5:9] = 20  # after the fifth event of the first
    again = prefix_states(built, Histories(changed, HISTORIES.ends), rows, events)
    np.testing.assert_array_equal(again[[2, 4, 6]], states[[2, 4, 6]])


@pytest.mark.parametrize("events", [0, 10])
def test_a_prefix_that_is_none_is_refused(events: int) -> None:
    built = RecommenderConfig(width=8, max_length=4, hidden=8).build(ITEMS)
    with pytest.raises(ValueError, match="at least one event, and no more than its history"):
        prefix_states(built, HISTORIES, np.array([0]), np.array([events]))
