"""Candidate sets: what each user chose next among items they never chose, drawn by hash and so the same for every model.

A user's set follows from the seed, the user's id and the history alone: neither who else is asked nor in which order
changes it. Where the chosen item stands in it is drawn too, so that no scorer is right by naming a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.storage.hashing import U64, mix

_PLACE = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True)
class CandidateSets:
    """`keys` int64 [n], stable hashes of the users' ids; `items` int32 [n, candidates]; `places` int64 [n], the column of the
    item that was chosen."""

    keys: NDArray[np.int64]
    items: NDArray[np.int32]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def targets(self) -> NDArray[np.int32]:
        """int32 [n], what was chosen."""
        return self.items[np.arange(len(self)), self.places]

    def ranks(self, scores: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many candidates score above the chosen one, and how many the same, itself included: int64 [n] each, from scores
        [n, candidates]."""
        return ranks_at(scores, self.places)


def ranks_at(scores: NDArray[np.floating], places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of scores [n, candidates] how many are above the one in the column `places` [n], and how many the same, itself included.

    What is no number is below all that are, and the same as its like.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    own = known[np.arange(len(places)), places][:, None]
    return (known > own).sum(1), (known == own).sum(1)


def history_seeds(users: U64, history_lanes: U64, seed: int) -> U64:
    """A number for each user [n] out of the hash of their id, the two of their history [n, 2], and a seed."""
    with np.errstate(over="ignore"):
        salted = mix(users ^ mix(np.array([seed], np.uint64)))
        return mix(salted ^ mix(history_lanes[:, 0] ^ mix(history_lanes[:, 1])))


def draw_unseen(
    seeds: U64, seen: NDArray[np.int32], lengths: NDArray[np.int64], items: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """For each seed [n] as many distinct items of 1 … `items`, none of those the user has seen, all alike likely.

    `seen` are the items of all, one after the other, `lengths` [n] how many are whose. Returns int32 [n, count] and which rows
    are filled: of whom fewer are unseen, the row has no meaning.
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
        # The first so many fresh ones of each row, in the order in which they were drawn.
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
    """Sets of the users [n] who have left enough items unseen, and which these are, bool [n]; other arguments as for
    `draw_unseen`. `seen` holds each user's target too."""
    drawn, filled = draw_unseen(seeds, seen, lengths, items, negatives)
    places = (mix(seeds ^ _PLACE) % np.uint64(negatives + 1)).astype(np.int64)
    columns = np.arange(negatives + 1)[None]
    whole = np.concatenate([drawn, np.zeros((len(drawn), 1), np.int32)], 1)
    # The one at the target's place moves to the end.
    whole[:, negatives] = whole[np.arange(len(whole)), places]
    whole = np.where(columns == places[:, None], targets[:, None], whole).astype(np.int32)
    return CandidateSets(keys[filled], whole[filled], places[filled]), filled


def _first_of_their_kind(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values [n, m] stand for the first time in their row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, 1)
    return first
