"""Ranks and lists of many users: prefixes in batches of like length, states once, scores in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import UNRANKED, Filters, ranks, top_k
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories

BATCH_POSITIONS = 4_000
"""Padded: a third faster on CPU than batches that leave the caches of a core."""


def batches_by_length(
    histories: Histories, max_length: int, rows: NDArray[np.int64] | None = None, positions: int = BATCH_POSITIONS
) -> Iterator[NDArray[np.int64]]:
    """`rows` of histories (all where unset) in groups of like length, each of about `positions` once padded."""
    rows = np.arange(len(histories)) if rows is None else rows
    lengths = np.minimum(histories.lengths[rows], max_length)
    order = np.argsort(lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    start = 0
    while start < len(rows):
        # The longest of a group is its last: as many rows as fit when padded to it.
        padded = lengths[start:] * np.arange(1, len(rows) - start + 1)
        size = max(1, int(np.searchsorted(padded, positions, side="right")))
        yield rows[start : start + size]
        start += size


def sequences_of(histories: Histories, rows: NDArray[np.int64], last: int | None = None) -> Sequences:
    """The histories of `rows`, of each its `last` items where given."""
    lengths = histories.lengths[rows]
    kept = lengths if last is None else np.minimum(lengths, last)
    taken = histories.take(histories.ends[rows] - kept, kept)
    users = None if histories.users is None else torch.from_numpy(histories.users[rows])
    return Sequences(torch.from_numpy(taken.items.astype(np.int64)), torch.from_numpy(kept), users)


@torch.no_grad()
def target_ranks(
    model: Recommender,
    prefixes: Histories,
    targets: NDArray[np.int32],
    *,
    filter_seen: bool = True,
    seeds: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many items score above each user's target, and how many the same, itself included: int64 [users] each.

    Items the model never saw are left out of the prefixes. A target it never saw, or one after nothing it knows, is `UNRANKED`.
    `seeds` int64 [users] are those of what is sampled, where these ranks are to be those of lists made by them.
    """
    above = np.full(len(prefixes), UNRANKED, np.int64)
    same = np.ones_like(above)
    table = model.item_states()
    known = targets <= model.items
    for rows, queries, filters in _queries(model, prefixes, known, filter_seen=filter_seen, seeds=seeds):
        asked = torch.from_numpy(targets[rows].astype(np.int64)).to(table.device)
        better, equal = ranks(queries, table, asked, filters)
        above[rows], same[rows] = better.cpu().numpy(), equal.cpu().numpy()
    return above, same


@torch.no_grad()
def candidate_scores(model: Recommender, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of the items int32 [users, candidates] after each prefix, float32 alike; −∞ for items the model never saw, and for all of
    them after nothing it knows."""
    scores = np.full(candidates.shape, -np.inf, np.float32)
    table = model.item_states()
    for rows, queries, _ in _queries(model, prefixes, filter_seen=False):
        known = torch.from_numpy(np.where(candidates[rows] <= model.items, candidates[rows], 0).astype(np.int64))
        found = (table[known.to(table.device)] @ queries[:, :, None])[:, :, 0].float().cpu()
        scores[rows] = found.masked_fill(known == 0, -torch.inf).numpy()
    return scores


@torch.no_grad()
def top_lists(model: Recommender, prefixes: Histories, k: int, *, filter_seen: bool = True) -> NDArray[np.int64]:
    """The best k items of each prefix, int64 [users, k]; 0 where there are fewer, or nothing the model knows."""
    lists = np.zeros((len(prefixes), k), np.int64)
    table = model.item_states()
    for rows, queries, filters in _queries(model, prefixes, filter_seen=filter_seen):
        items, _ = top_k(queries, table, k, filters)
        lists[rows] = items.cpu().numpy()
    return lists


def _queries(
    model: Recommender,
    prefixes: Histories,
    asked: NDArray[np.bool_] | None = None,
    *,
    filter_seen: bool,
    seeds: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], Tensor, Filters]]:
    """Batches of the prefixes, all or those `asked` bool [users], that hold anything the model knows: rows, queries, and what
    may be recommended. The model is in eval mode meanwhile."""
    prefixes = prefixes.within(model.items)
    there = prefixes.lengths > 0 if asked is None else asked & (prefixes.lengths > 0)
    device = model.table.device
    was_training = model.training
    model.eval()
    try:
        for rows in batches_by_length(prefixes, model.max_length, np.flatnonzero(there)):
            states = model.encode(sequences_of(prefixes, rows, model.max_length).to(device))
            seen = sequences_of(prefixes, rows).to(device) if filter_seen else None
            drawn = None if seeds is None else torch.from_numpy(seeds[rows]).to(device)
            yield rows, model.queries(states, drawn), Filters(excluded=seen)
    finally:
        model.train(was_training)
