"""Keys and values of what a model has read, in buffers whose rows can be joined, copied and moved.

Models with sliding windows or shared layers keep the caches of transformers, whose rows can only be copied and dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def new_cache(model: Any, capacity: int) -> DynamicCache:
    """A cache whose plain layers fill buffers of `capacity` positions; sliding and other layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: DynamicCache | None) -> bool:
    return cache is not None and all(isinstance(layer, _BufferedLayer) for layer in cache.layers)


def joined(caches: Sequence[DynamicCache], columns: int) -> DynamicCache:
    """A plain cache with the rows of all `caches`, one cache after the other; every row ends at column `columns`."""
    found = DynamicCache()
    found.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        keys, values = (
            torch.cat([pad(getattr(layer, name), (0, 0, columns - layer.keys.shape[2], 0)) for layer in layers])
            for name in ("keys", "values")
        )
        found.layers.append(_BufferedLayer.holding(keys, values, columns))
    return found


def copied(cache: DynamicCache, rows: Tensor, columns: int, capacity: int) -> DynamicCache:
    """A copy of these `rows` of a cache of so many `columns`, with room for `capacity`. A row may be named twice."""
    if is_plain(cache):
        return Room().copied(cache, rows, columns, capacity)
    found = copy.deepcopy(cache)
    found.batch_select_indices(rows)
    return found


def reorder(cache: DynamicCache, rows: Tensor, first: int) -> None:
    """Replace each row n by row `rows[n]`, from column `first` on; before that column the two are alike."""
    if not is_plain(cache):
        cache.batch_select_indices(rows)
        return
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part[:, :, first:] = part[rows, :, first:]


class Room:
    """Buffers that one copy of a cache after the other uses: fresh memory for each copy took a tenth of the time."""

    def __init__(self) -> None:
        self._flat: list[tuple[Tensor, Tensor]] = []

    def copied(self, cache: DynamicCache, rows: Tensor, columns: int, capacity: int) -> DynamicCache:
        """As the function `copied`, for a plain cache. It overwrites the copy that was made before."""
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


class Slots(DynamicCache):
    """Keys and values of a batch whose rows come and go in place.

    The rows of the batch are the first of the buffers' `rows` rows, and all end at the same column.
    """

    def __init__(self, like: DynamicCache, rows: int, columns: int) -> None:
        super().__init__()
        self.layers = [_SlotLayer(layer, rows, columns) for layer in like.layers]

    def show(self, rows: int, first: int, stop: int) -> None:
        """Set what the model reads next: so many `rows`, from column `first` to before column `stop`."""
        for layer in self.layers:
            layer.show(rows, first, stop)

    def move(self, rows: Tensor, to: Tensor) -> None:
        """Copy `rows` to the places `to`."""
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                part[to] = part[rows]

    def put(self, cache: DynamicCache, row: int, stop: int) -> None:
        """Write the rows of a plain cache from row `row` on, so that they end before column `stop`."""
        for layer, new in zip(self.layers, cache.layers, strict=True):
            layer.put(new, row, stop)

    def settle(self, rows: int, columns: int, stop: int) -> None:
        """Move to buffers of so many rows and columns, in which what is shown ends before column `stop`."""
        # Layer by layer, so that the old and the new buffers are never both held for all layers.
        for number, layer in enumerate(self.layers):
            self.layers[number] = _SlotLayer(layer, rows, columns)
            self.layers[number].put(layer, 0, stop)


class _SlotLayer(DynamicLayer):
    """One layer of `Slots`: buffers [rows, heads, columns, width] of keys and values, and views of what they show."""

    def __init__(self, like: DynamicLayer, rows: int, columns: int) -> None:
        super().__init__()
        held: Any = (like.keys, like.values)
        self.lazy_initialization(*held)
        self.buffers = tuple(part.new_empty(rows, part.shape[1], columns, part.shape[3]) for part in held)

    def put(self, new: DynamicLayer, row: int, stop: int) -> None:
        """Write the rows of another layer from row `row` on, so that they end before column `stop`, behind zeros."""
        # Masked columns must still be finite. Columns from `stop` on are written before they are read: clearing them
        # too took a twelfth of the time of decoding (measured).
        for part, mine in zip(self.buffers, (new.keys, new.values), strict=True):
            rows, start = part[row : row + len(mine)], stop - mine.shape[2]
            rows[:, :, :start] = 0
            rows[:, :, start:stop] = mine

    def show(self, rows: int, first: int, stop: int) -> None:
        self._shown, self._first, self._stop = rows, first, stop
        self.keys, self.values = (part[:rows, :, first:stop] for part in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self._stop + key_states.shape[2]
        for part, states in zip(self.buffers, (key_states, value_states), strict=True):
            part[: self._shown, :, self._stop : stop] = states
        self.show(self._shown, self._first, stop)
        return self.keys, self.values


class _BufferedLayer(DynamicLayer):
    """Keys and values [rows, heads, positions, width] in a buffer allocated once: appending copies new positions only.

    The layer of transformers concatenates, which copies the whole cache at every token.
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
        """A layer over these buffers, in which `length` positions are filled."""
        layer = _BufferedLayer(keys.shape[2])
        layer.lazy_initialization(keys, values)
        layer._keys, layer._values, layer._length = keys, values, length
        layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return layer
