"""Exact top-k and ranks over the whole catalogue, a block of items at a time, with filters of items."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.recommenders.sequences import Sequences

BLOCK_SCORES = 2**22
"""Most scores that are held at a time, whatever the size of the catalogue."""
UNRANKED = 2**31 - 1
"""The number of items above a target that has no score: it is beyond every cutoff, however few items there are."""


@dataclass(frozen=True)
class Filters:
    """Which items may be recommended to which user.

    allowed: bool [items + 1], the same for all users (availability, deny lists, categories), or None for every item.
    excluded: one sequence of items per user (what they have seen, their own deny list), or None.
    """

    allowed: Tensor | None = None
    excluded: Sequences | None = None


EVERYTHING = Filters()


def top_k(queries: Tensor, table: Tensor, k: int, filters: Filters = EVERYTHING) -> tuple[Tensor, Tensor]:
    """The best k items of each user, int64 [batch, k], and their scores, float32 [batch, k].

    They are in the order of falling score, and of rising index where scores are equal. queries [batch, width]; table
    [items + 1, width], whose row 0, padding, is no item. Scores are inner products. If fewer than k items may be
    recommended, or have a score that is a number, the rest is item 0 with score −inf. Raises ValueError if the
    catalogue has fewer than k items.
    """
    items = len(table) - 1
    if k > items:
        raise ValueError(f"A list of {k} items was asked for and the catalogue has {items}: ask for fewer.")
    best: Tensor | None = None
    for rows in _blocks(items, len(queries)):
        keys = _best_keys(_filtered(queries @ table[rows].T, rows, filters), rows, k)
        keys = keys if best is None else torch.cat([best, keys], 1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    assert best is not None
    scores = _ordered_to_float(best >> 32)
    indices = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return torch.where(scores == -math.inf, 0, indices), scores


def most_popular(
    popular: Sequence[int], allowed: NDArray[np.bool_], k: int, excluded: Collection[int] = ()
) -> NDArray[np.int64]:
    """At most k allowed items, int64, for users of whom a model knows nothing: `popular` ones first, then by index.

    `popular` are item indices, most events first, as many as a checkpoint lists; `allowed` bool [items + 1]; `excluded`
    are item indices of any catalogue.
    """
    found = [item for item in popular if allowed[item] and item not in excluded][:k]
    if len(found) < k:
        others = allowed.copy()
        others[0] = False
        others[[item for item in (*popular, *excluded) if item < len(others)]] = False
        found += np.flatnonzero(others)[: k - len(found)].tolist()
    return np.array(found, np.int64)


def ranks(queries: Tensor, table: Tensor, targets: Tensor, filters: Filters = EVERYTHING) -> tuple[Tensor, Tensor]:
    """How many items score above each user's target, and how many the same, the target included: int64 [batch] each.

    The target is a candidate even if a filter would exclude it. A target whose score is NaN is `UNRANKED`; a NaN of any
    other item counts as the lowest score there is.
    """
    blocks = _blocks(len(table) - 1, len(queries))
    if len(blocks) == 1:
        return ranks_among(queries @ table.T, targets, filters)
    own = torch.empty(len(targets), device=queries.device)
    for rows in blocks:  # The target's score comes from the same product as the others', so that ties are exact.
        here = _within(targets, rows)
        own[here] = (queries @ table[rows].T)[here, targets[here] - rows.start].float()
    above, same = torch.zeros_like(targets), torch.ones_like(targets)
    for rows in blocks:
        more = _counted(queries @ table[rows].T, rows, targets, own, filters)
        above, same = above + more[0], same + more[1]
    return _unranked_where_nan(own, above, same)


def ranks_among(scores: Tensor, targets: Tensor, filters: Filters = EVERYTHING) -> tuple[Tensor, Tensor]:
    """As `ranks`, from given scores [batch, items + 1]; column 0 has no meaning."""
    own = scores.gather(1, targets[:, None])[:, 0].float()
    rows = slice(1, scores.shape[1])
    above, same = _counted(scores[:, rows].clone(), rows, targets, own, filters)
    return _unranked_where_nan(own, above, same + 1)


def _unranked_where_nan(own: Tensor, above: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Make targets whose score is NaN `UNRANKED`: no score compares with NaN, so they would stand first alone."""
    unknown = own.isnan()
    return above.masked_fill(unknown, UNRANKED), same.masked_fill(unknown, 1)


def _counted(scores: Tensor, rows: slice, targets: Tensor, own: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """How many items of a block score above `own`, and how many the same, the target left out. Overwrites `scores`."""
    scores = _filtered(scores, rows, filters)
    here = _within(targets, rows)
    scores[here, targets[here] - rows.start] = -math.inf
    return (scores > own[:, None]).sum(1), ((scores == own[:, None]) & (scores > -math.inf)).sum(1)


def _within(targets: Tensor, rows: slice) -> Tensor:
    return ((targets >= rows.start) & (targets < rows.stop)).nonzero()[:, 0]


def _blocks(items: int, batch: int) -> list[slice]:
    """Slices of the table's rows 1…items that make at most `BLOCK_SCORES` scores each."""
    size = max(1, BLOCK_SCORES // max(1, batch))
    return [slice(at, min(at + size, items + 1)) for at in range(1, items + 1, size)]


def _filtered(scores: Tensor, rows: slice, filters: Filters) -> Tensor:
    """The scores with −∞ for items that may not be recommended. Overwrites `scores`."""
    scores = scores.float()
    if filters.allowed is not None:
        # Most catalogues forbid few items, and a mask would read every score again.
        scores.index_fill_(1, (~filters.allowed[rows]).nonzero()[:, 0], -math.inf)
    if filters.excluded is not None:
        items = filters.excluded.items
        here = (items >= rows.start) & (items < rows.stop)
        scores[filters.excluded.rows[here], items[here] - rows.start] = -math.inf
    return scores


def _best_keys(scores: Tensor, rows: slice, k: int) -> Tensor:
    """The k largest keys of each user among a block's scores, in no order; all if it has no more. Overwrites `scores`.

    Keys are made of the k best scores only, which is a third of the work, unless other items score the same as the last
    of them.
    """
    if scores.shape[1] <= k:
        return _keys(_without_nan(scores), torch.arange(rows.start, rows.stop, device=scores.device))
    values, places = scores.topk(k + 1, dim=1)
    # topk counts NaN as the largest, so the first values show any. To look at every score takes 5 to 8 % more
    # (measured).
    if values[:, 0].isnan().any():
        values, places = _without_nan(scores).topk(k + 1, dim=1)
    keys = _keys(values[:, :k], places[:, :k] + rows.start)
    ties = (values[:, k] == values[:, k - 1]) & (values[:, k] > -math.inf)
    if ties.any():
        indices = torch.arange(rows.start, rows.stop, device=scores.device)
        keys[ties] = _keys(scores[ties], indices).topk(k, dim=1).values
    return keys


def _without_nan(scores: Tensor) -> Tensor:
    """The scores with −∞ for NaN. Overwrites `scores`."""
    return scores.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _keys(scores: Tensor, indices: Tensor) -> Tensor:
    """One int64 for each score that orders by score, then by falling index: its upper half has the float's order."""
    bits = (scores + 0.0).contiguous().view(torch.int32)  # adding 0.0 makes −0.0 equal 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (0xFFFFFFFF - indices)


def _ordered_to_float(ordered: Tensor) -> Tensor:
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32)
    return bits.view(torch.float32)
