"""A recommender's own predictions as labels for models that imitate it (RecExplainer, arXiv 2311.10947, section 3.1).

What happened next is never a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raypipe.recommenders.sequences import Sequences
from raypipe.systems.source import Source

CANDIDATES = 5
LIKED, DISLIKED = 0.2, 0.5
"""Unseen items before this share of them, best first, are liked, those from that on disliked."""

_BLOCK_SCORES = 2**24


@dataclass(frozen=True)
class Taught:
    """What the recommender says at places in histories; all items are unseen there.

    `states` float32 [n, width]; `favourites` int64 [n], its best items; `candidates` int64 [n, 5], drawn uniformly, and
    their `scores` float32 [n, 5]; `liked` int64 [n], drawn from its best fifth, and `disliked` int64 [n], from its
    worse half.
    """

    states: NDArray[np.float32]
    favourites: NDArray[np.int64]
    candidates: NDArray[np.int64]
    scores: NDArray[np.float32]
    liked: NDArray[np.int64]
    disliked: NDArray[np.int64]

    @property
    def orders(self) -> NDArray[np.int64]:
        """Places in `candidates` from best to worst, [n, 5]; of equal scores, the smaller item comes first."""
        return np.lexsort((self.candidates, -self.scores))


def teachable(source: Source, events: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether histories of `events` [n] events leave enough items unseen to be asked about, whatever they hold."""
    return events + 2 * CANDIDATES <= source.recommender.items


def teach(source: Source, rows: NDArray[np.int64], events: NDArray[np.int64], rng: np.random.Generator) -> Taught:
    """The recommender's predictions after the first `events` [n] of the histories in `rows` [n].

    Raises ValueError if a history leaves fewer than ten items unseen.
    """
    states = source.states(rows, events)
    parts = [
        _taught(source, states[part], rows[part], events[part], rng)
        for part in _parts(len(rows), source.recommender.items)
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Taught(states, *columns)


def most_similar(source: Source) -> NDArray[np.int64]:
    """For each item, the index of the other item whose vector is nearest by cosine: int64 [items]."""
    vectors = torch.nn.functional.normalize(torch.from_numpy(source.item_states[1:]), dim=1)
    nearest = []
    for part in _parts(len(vectors), len(vectors)):
        likeness = vectors[part] @ vectors.T
        own = torch.arange(part.start, min(part.stop, len(vectors)))
        likeness[torch.arange(len(own)), own] = -torch.inf
        # argmax takes NaN for the largest: here NaN is put below every cosine, and above the item itself.
        nearest.append(likeness.nan_to_num_(nan=-2, neginf=-torch.inf).argmax(1) + 1)
    return torch.cat(nearest).numpy()


@torch.no_grad()
def _taught(
    source: Source,
    states: NDArray[np.float32],
    rows: NDArray[np.int64],
    events: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64] | NDArray[np.float32], ...]:
    seen = source.histories.take(source.histories.starts[rows], events)
    prefixes = Sequences(torch.from_numpy(seen.items.astype(np.int64)), torch.from_numpy(seen.lengths))
    scores = (source.queries(states, rows, events) @ source.recommender.item_states().T).float().cpu()
    unseen = torch.ones_like(scores, dtype=torch.bool)
    unseen[:, 0] = False
    unseen[prefixes.rows, prefixes.items] = False
    left = unseen.sum(1)
    if int(left.min()) < 2 * CANDIDATES:
        raise ValueError(
            f"A history leaves {int(left.min())} of {source.recommender.items} items unseen: too few to ask about."
        )
    # Sorting takes NaN for the largest: here NaN becomes the lowest score that an unseen item can have.
    known = scores.nan_to_num(nan=torch.finfo(scores.dtype).min, posinf=torch.inf)
    order = known.masked_fill(~unseen, -torch.inf).argsort(dim=1, descending=True, stable=True)
    drawn = (
        torch.from_numpy(rng.random(scores.shape, np.float32)).masked_fill(~unseen, -1).topk(CANDIDATES, dim=1).indices
    )
    liked_count, worse = (left * LIKED).long().clamp(min=1), (left * DISLIKED).long()
    draws = torch.from_numpy(rng.random((2, len(states))))
    liked = order.gather(1, (draws[0] * liked_count).long()[:, None])[:, 0]
    disliked = order.gather(1, (worse + (draws[1] * (left - worse)).long())[:, None])[:, 0]
    return (
        order[:, 0].numpy(),
        drawn.numpy(),
        scores.gather(1, drawn).numpy(),
        liked.numpy(),
        disliked.numpy(),
    )


def _parts(count: int, items: int) -> Iterator[slice]:
    size = max(1, _BLOCK_SCORES // (items + 1))
    return (slice(at, at + size) for at in range(0, count, size))
