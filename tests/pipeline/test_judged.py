"""What a judge is told that is right, of planted scores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypipe.pipeline import judged
from raypipe.pipeline.loaded import Loaded
from raypipe.recommenders.checkpoint import Card
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Model

RECOMMENDER = RecommenderConfig(width=8, hidden=8, max_length=50, dropout=0.0)
ITEMS = 100


@pytest.mark.parametrize("newer", [0, 30])
def test_the_best_fifth_of_what_a_user_has_not_chosen_is_liked_whatever_came_after_the_recommender(newer: int) -> None:
    model = RECOMMENDER.build(ITEMS, seed=1).eval()
    chosen = list(range(1, 11))
    with torch.no_grad():
        scores = model.score(model.encode(Sequences.of([chosen])))[0]
    unseen = [item for item in scores.argsort(descending=True).tolist() if item > len(chosen)]
    expected = {0: "yes", 17: "yes", 18: None, 31: None, 44: None, 45: "no", 89: "no"}
    items = np.array([unseen[above] for above in expected], np.int32)
    history = np.array([*chosen, *range(ITEMS + 1, ITEMS + 1 + newer)], np.int32)
    prefixes = Histories(np.tile(history, len(items)), np.arange(1, len(items) + 1) * len(history))
    loaded = Loaded(Model("sasrec", "0", "", {}, 0.0), model, Card(RECOMMENDER, {"items": ITEMS}, []), pa.table({}))
    assert judged._labels(loaded, prefixes, items, np.zeros(len(items), np.int64)) == list(expected.values())
