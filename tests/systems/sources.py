"""A small source of untrained recommenders, for tests of systems."""

from __future__ import annotations

import numpy as np
import torch

from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.recommender import freeze
from raypipe.recommenders.windows import Histories
from raypipe.systems.source import Source

ITEMS = 40
LENGTHS = np.array([3, 9, 6, 2, 5, 7, 4, 8])
HELD_OUT = np.array([False, True, False, False, True, False, True, False])


def source_of(model: str = "sasrec", **options: object) -> Source:
    """Eight users, three of them held out; every item has a title of its own and one genre of three."""
    rng = np.random.default_rng(7)
    items = np.concatenate([rng.choice(ITEMS, length, replace=False) + 1 for length in LENGTHS]).astype(np.int32)
    torch.manual_seed(0)
    recommender = RecommenderConfig.model_validate({"model": model, "width": 8, "max_length": 12}).build(ITEMS)
    catalogue = Catalogue(
        [f"Film {n}" for n in range(1, ITEMS + 1)],
        [{"genre": [("Drama", "War", "Noir")[n % 3]]} for n in range(ITEMS)],
    )
    return Source(
        freeze(recommender),
        Histories(items, LENGTHS.cumsum()),
        HELD_OUT,
        catalogue,
        **options,  # type: ignore[arg-type]
    )
