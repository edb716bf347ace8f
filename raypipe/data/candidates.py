"""Candidate sets: each user's next item among items that the user never chose.

They are drawn by hash, so they are the same for every model. A user's set depends only on the seed, the user's id and
the history. It does not depend on which other users are asked, or in which order. The place of the chosen item in the
set is drawn too, so that no scorer can be right by naming a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.storage.hashing import U64, mix

_PLACE = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True)
class CandidateSets:
    """Candidate sets of n users.

    `keys` int64 [n] are stable hashes of the users' ids. `items` int32 [n, candidates] are the candidates. `places`
    int64 [n] is the column of the item that the user chose.
    """

    keys: NDArray[np.int64]
    items: NDArray[np.int32]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def targets(self) -> NDArray[np.int32]:
        """The chosen items: int32 [n]."""
        return self.items[np.arange(len(self)), self.places]

    def ranks(self, scores: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many candidates score above the chosen one, and how many score the same, itself included: int64 [n] each.

        `scores` are [n, candidates].
        """
        return ranks_at(scores, self.places)


def ranks_at(scores: NDArray[np.floating], places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many scores of a row are above the one in column `places`, and how many equal it, itself included: [n] each.

    `scores` are [n, candidates] and `places` [n]. NaN counts as lower than every number and as equal to NaN.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    own = known[np.arange(len(places)), places][:, None]
    return (known > own).sum(1), (known == own).sum(1)


def history_seeds(users: U64, history_lanes: U64, seed: int) -> U64:
    """A seed for each user [n], made from the hash of the id, the two hashes of the history [n, 2] and `seed`."""
    with np.errstate(over="ignore"):
        salted = mix(users ^ mix(np.array([seed], np.uint64)))
        return mix(salted ^ mix(history_lanes[:, 0] ^ mix(history_lanes[:, 1])))


def draw_unseen(
    seeds: U64, seen: NDArray[np.int32], lengths: NDArray[np.int64], items: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Draw for each seed `count` distinct items of 1 … `items` that the user has not seen, all equally likely.

    `seeds` are [n]. `seen` are the items of all users one after another, and `lengths` [n] is how many of them each
    user has. Returns int32 [n, count], and bool [n], which is False for users who have fewer unseen items; their rows
    have no meaning.
    """
    rows = len(seeds)
    owners = np.repeat(np.arange(rows), lengths)
    width = items + 1
    taken = np.unique(owners * width + seen)
    filled = items - np.bincount(taken // width, minlength=rows) >= count
    drawn = np.zeros((rows, count), np.int32)
    left, tries = np.flatnonzero(filled), 2 * count
    while len(left):
        numbers = np.arange(tries, dtype=np.uint64)
        with np.errstate(over="ignore"):
            found = (mix(seeds[left, None] + numbers[None] * _PLACE) % np.uint64(items)).astype(np.int64) + 1
        places = left[:, None] * width + found
        at = np.searchsorted(taken, places)
        fresh = taken[np.minimum(at, len(taken) - 1)] != places if len(taken) else np.ones(places.shape, bool)
        fresh &= _first_of_their_kind(found)
        enough = fresh.sum(1) >= count
        # The first `count` unseen items of each row, in the order in which they were drawn.
        chosen = fresh[enough] & (fresh[enough].cumsum(1) <= count)
        drawn[left[enough]] = found[enough][chosen].reshape(-1, count)
        left, tries = left[~enough], 2 * tries
    return drawn, filled


def candidate_sets(
    keys: NDArray[np.int64],
    seeds: U64,
    targets: NDArray[np.int32],
    seen: NDArray[np.int32],
    lengths: NDArray[np.int64],
    items: int,
    negatives: int,
) -> tuple[CandidateSets, NDArray[np.bool_]]:
    """The candidate sets of users with enough unseen items, and which of the users [n] those are: bool [n].

    `seen` must contain each user's target too. The other arguments are as in `draw_unseen`.
    """
    drawn, filled = draw_unseen(seeds, seen, lengths, items, negatives)
    places = (mix(seeds ^ _PLACE) % np.uint64(negatives + 1)).astype(np.int64)
    columns = np.arange(negatives + 1)[None]
    whole = np.concatenate([drawn, np.zeros((len(drawn), 1), np.int32)], 1)
    # The item at the target's place moves to the end.
    whole[:, negatives] = whole[np.arange(len(whole)), places]
    whole = np.where(columns == places[:, None], targets[:, None], whole).astype(np.int32)
    return CandidateSets(keys[filled], whole[filled], places[filled]), filled


def _first_of_their_kind(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values [n, m] occur for the first time in their row: bool [n, m]."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, 1)
    return first
