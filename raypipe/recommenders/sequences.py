"""Packed batches of sequences: one flat tensor of items, no padding, and the way to a padded view and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Item sequences, one after the other.

    `items` int64 [positions] are catalogue indices from 1; `lengths` int64 [batch], each at least 1. Computations at
    one position alone never see padding; those that mix positions go through `pad` and `unpad`. `users` int64 [batch]
    are the keys of the sequences' users, for models that know users.
    """

    items: Tensor
    lengths: Tensor
    users: Tensor | None = None

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Sequences:
        """The sequences in `lists`. Raises ValueError for an empty sequence."""
        if not all(len(items) for items in lists):
            raise ValueError("An empty history has no state; recommend what is popular to users without events.")
        flat = np.concatenate([np.asarray(items, np.int64) for items in lists]) if lists else np.zeros(0, np.int64)
        return cls(torch.from_numpy(flat), torch.tensor([len(items) for items in lists], dtype=torch.int64))

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor]) -> Sequences:
        """The sequences of a training batch."""
        return cls(batch["items"], batch["lengths"], batch.get("users"))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def ends(self) -> Tensor:
        """Where each sequence ends in `items`, exclusive, int64 [batch]."""
        return self.lengths.cumsum(0)

    @cached_property
    def rows(self) -> Tensor:
        """The sequence that each position belongs to, int64 [positions]."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.items))

    @cached_property
    def owners(self) -> Tensor | None:
        """The key of each position's user, int64 [positions]; None if users are not known."""
        return None if self.users is None else self.users[self.rows]

    @cached_property
    def offsets(self) -> Tensor:
        """The place of each position in its sequence, from 0, int64 [positions]."""
        starts = self.ends - self.lengths
        return torch.arange(len(self.items), device=self.items.device) - starts[self.rows]

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    @cached_property
    def _cells(self) -> Tensor:
        return self.rows * self.longest + self.offsets

    def tail(self, length: int) -> Sequences:
        """The last `length` items of each sequence."""
        if self.longest <= length:
            return self
        keep = self.offsets >= (self.lengths - length)[self.rows]
        return Sequences(self.items[keep], self.lengths.clamp(max=length), self.users)

    def followed_by(self, item: int) -> Sequences:
        """Each sequence with `item` appended."""
        items = self.items.new_full((len(self.items) + len(self),), item)
        items[torch.arange(len(self.items), device=items.device) + self.rows] = self.items
        return Sequences(items, self.lengths + 1, self.users)

    def pad(self, values: Tensor) -> Tensor:
        """Values [positions, …] as [batch, longest, …], padded with zeros on the right."""
        padded = values.new_zeros(len(self) * self.longest, *values.shape[1:])
        return padded.index_copy(0, self._cells, values).view(len(self), self.longest, *values.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Padded values [batch, longest, …] as [positions, …]."""
        return padded.reshape(-1, *padded.shape[2:])[self._cells]

    def last(self, values: Tensor) -> Tensor:
        """The value at each sequence's last position, from values [positions, …]: [batch, …]."""
        return values[self.ends - 1]

    def to(self, device: torch.device | str) -> Sequences:
        users = None if self.users is None else self.users.to(device)
        return Sequences(self.items.to(device), self.lengths.to(device), users)
