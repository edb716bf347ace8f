"""What a recommender would have a user choose next, as a vector in the space of its items' vectors (DreamRec, section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from raypipe.language.prompt import Vectors
from raypipe.recommenders.scoring import top_k
from raypipe.systems.source import Source

SOURCE = "state"
"""Names the projector that reads these vectors, and those of states."""


@dataclass(frozen=True)
class Oracle:
    """The vector of what a recommender would have next, and the title of the item nearest to it, seen or not."""

    vector: Vectors
    title: str


@torch.no_grad()
def oracles_of(source: Source, queries: Tensor) -> list[Oracle]:
    """What the recommender would have next, from its `queries` [n, width] after histories.

    For DreamRec, the query is the oracle itself. For another recommender, the oracle is the mean of the item vectors,
    weighted by the softmax of their scores and scaled to the mean length of an item vector. Each oracle has the title
    of the item nearest to it by cosine, which need not be the recommender's best item.
    """
    table = torch.from_numpy(source.item_states).to(queries.device)
    oracles = queries.float()
    if not source.recommender.queries_are_items:
        oracles = (oracles @ table[1:].T).softmax(1) @ table[1:]
        oracles = oracles * (table[1:].norm(dim=1).mean() / oracles.norm(dim=1, keepdim=True).clamp(min=1e-12))
    nearest, _ = top_k(functional.normalize(oracles, dim=1), functional.normalize(table, dim=1), 1)
    titles, vectors = source.titles_of(nearest[:, 0].tolist()), oracles.cpu().numpy()
    return [Oracle(Vectors(vector[None], SOURCE), title) for vector, title in zip(vectors, titles, strict=True)]
