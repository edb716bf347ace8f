"""Keys and values of what a model has read, in buffers whose rows can be joined, copied and dropped.

Caches of models that slide or share layers stay those of transformers, whose rows can be copied and dropped alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def new_cache(model: Any, capacity: int) -> DynamicCache:
    """A cache whose plain layers fill buffers of `capacity` positions; sliding and other layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: DynamicCache | None) -> bool:
    return cache is not None and all(isinstance(layer, _BufferedLayer) for layer in cache.layers)


def joined(
    old: DynamicCache | None, kept: Tensor, first: int, new: Sequence[DynamicCache], columns: int, capacity: int
) -> DynamicCache:
    """Rows `kept` of `old` from column `first`, then all of `new`, all ending at `columns`, with room up to `capacity`."""
    caches = [*([old] if old is not None else []), *new]
    found = DynamicCache()
    found.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        taken = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        keys, values = (_placed(parts, None if old is None else kept, first, columns, capacity) for parts in taken)
        found.layers.append(_BufferedLayer.holding(keys, values, columns))
    return found


def copied(cache: DynamicCache, rows: Tensor, columns: int, capacity: int) -> DynamicCache:
    """These rows of a cache of so many columns, some of them more than once, with room up to `capacity`."""
    if is_plain(cache):
        return joined(cache, rows, 0, [], columns, capacity)
    found = copy.deepcopy(cache)
    found.batch_select_indices(rows)
    return found


def reorder(cache: DynamicCache, rows: Tensor, first: int) -> None:
    """Row n becomes what row `rows[n]` is, from column `first`; before it the two are alike."""
    if not is_plain(cache):
        cache.batch_select_indices(rows)
        return
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part[:, :, first:] = part[rows, :, first:]


class Room:
    """Buffers for copies of caches, one after the other in the same place: fresh memory for each took a tenth of the time."""

    def __init__(self) -> None:
        self._flat: list[tuple[Tensor, Tensor]] = []

    def copied(self, cache: DynamicCache, rows: Tensor, columns: int, capacity: int) -> DynamicCache:
        """As `copied`, of a plain cache; the copy made before is gone."""
        found = DynamicCache()
        found.layers = []
        for number, layer in enumerate(cache.layers):
            parts = (layer.keys, layer.values)
            shapes = [(len(rows), part.shape[1], capacity, part.shape[3]) for part in parts]
            sizes = [math.prod(shape) for shape in shapes]
            if number == len(self._flat):
                self._flat.append((parts[0].new_empty(0), parts[1].new_empty(0)))
            if any(flat.numel() < size for flat, size in zip(self._flat[number], sizes, strict=True)):
                self._flat[number] = (parts[0].new_empty(sizes[0]), parts[1].new_empty(sizes[1]))
            keys, values = (
                flat[:size].view(shape) for flat, size, shape in zip(self._flat[number], sizes, shapes, strict=True)
            )
            for part, copy_ in zip(parts, (keys, values), strict=True):
                torch.index_select(part, 0, rows, out=copy_[:, :, :columns])
            found.layers.append(_BufferedLayer.holding(keys, values, columns))
        return found


class _BufferedLayer(DynamicLayer):
    """Keys and values [rows, heads, positions, width] in a buffer allocated once: appending copies one position only.

    transformers' own layer concatenates, copying the whole cache at every token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self._capacity, width)
            self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._keys[:, :, start : self._length] = key_states
        self._values[:, :, start : self._length] = value_states
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]

    @staticmethod
    def holding(keys: Tensor, values: Tensor, length: int) -> _BufferedLayer:
        """A layer of these buffers, of which `length` positions are filled."""
        layer = _BufferedLayer(keys.shape[2])
        layer.lazy_initialization(keys, values)
        layer._keys, layer._values, layer._length = keys, values, length
        layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return layer


def _placed(parts: Sequence[Tensor], kept: Tensor | None, first: int, columns: int, capacity: int) -> Tensor:
    """Keys or values of several batches, one after the other, each ending at `columns` of one buffer; of the first batch the
    rows `kept` from column `first`, unless all of it is taken.

    Zeros where a row has no token: what is masked must still be finite. Columns to come are written before they are read:
    clearing them too took a twelfth of the time of decoding (measured).
    """
    _, heads, _, width = parts[0].shape
    rows = [len(part) for part in parts]
    if kept is not None:
        rows[0] = len(kept)
    buffer = parts[0].new_empty(sum(rows), heads, capacity, width)
    row = 0
    for number, (part, count) in enumerate(zip(parts, rows, strict=True)):
        chosen = kept if number == 0 else None
        start = columns - part.shape[2] + (0 if chosen is None else first)
        mine = buffer[row : row + count]
        mine[:, :, :start] = 0
        if chosen is None:
            mine[:, :, start:columns] = part
        else:
            torch.index_select(part[:, :, first:], 0, chosen, out=mine[:, :, start:columns])
        row += count
    return buffer
