"""Ranks and lists of many users. Prefixes are batched by similar length, states computed once, and scores in blocks."""

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
"""Positions of a batch once padded: a third faster on CPU than batches that leave the caches of a core."""


def batches_by_length(
    histories: Histories, max_length: int, rows: NDArray[np.int64] | None = None, positions: int = BATCH_POSITIONS
) -> Iterator[NDArray[np.int64]]:
    """Yield `rows` of histories (all if None) in groups of similar length, each of about `positions` once padded."""
    rows = np.arange(len(histories)) if rows is None else rows
    lengths = np.minimum(histories.lengths[rows], max_length)
    order = np.argsort(lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    start = 0
    while start < len(rows):
        # The last row of a group is the longest: take as many rows as fit when padded to it.
        padded = lengths[start:] * np.arange(1, len(rows) - start + 1)
        size = max(1, int(np.searchsorted(padded, positions, side="right")))
        yield rows[start : start + size]
        start += size


def sequences_of(histories: Histories, rows: NDArray[np.int64], last: int | None = None) -> Sequences:
    """The histories of `rows`; if `last` is given, only the last items of each, so many at most."""
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

    Items the model never saw are left out of the prefixes. A target is `UNRANKED` if the model never saw it, or knows
    no item of its prefix. `seeds` int64 [users] are for models that sample: give those of lists whose ranks are wanted.
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
    """The scores of the items int32 [users, candidates] after each prefix, float32 of the same shape.

    They are −∞ for items the model never saw, and for all candidates of a prefix of which it knows no item.
    """
    scores = np.full(candidates.shape, -np.inf, np.float32)
    table = model.item_states()
    for rows, queries, _ in _queries(model, prefixes, filter_seen=False):
        known = torch.from_numpy(np.where(candidates[rows] <= model.items, candidates[rows], 0).astype(np.int64))
        found = (table[known.to(table.device)] @ queries[:, :, None])[:, :, 0].float().cpu()
        scores[rows] = found.masked_fill(known == 0, -torch.inf).numpy()
    return scores


@torch.no_grad()
def top_lists(model: Recommender, prefixes: Histories, k: int, *, filter_seen: bool = True) -> NDArray[np.int64]:
    """The best k items of each prefix, int64 [users, k]; 0 if there are fewer, or the model knows none of its items."""
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
    """Yield batches of prefixes: their rows, queries, and filters of what may be recommended.

    These are the prefixes, all or those `asked` bool [users], of which the model knows an item. The model is in eval
    mode meanwhile.
    """
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
