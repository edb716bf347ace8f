"""An exponential moving average of weights while they are trained (Polyak & Juditsky 1992), shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightAverage:
    """The average of what this rank holds of every trained parameter: all of it, or its ZeRO-3 shard."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._averages = [held.to(torch.float32, copy=True) for held in self._held()]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After step number `steps`, from 1: the first ones count for more, as nothing is there to be averaged with."""
        share = 1 - min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averages, [held.to(torch.float32) for held in self._held()], share)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The module holds the average; afterwards what it held before."""
        before = [held.clone() for held in self._held()]
        torch._foreach_copy_(self._held(), self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._held(), before)

    def save(self, path: Path) -> None:
        save_file({str(place): average for place, average in enumerate(self._averages)}, path)

    def load(self, path: Path) -> None:
        saved = load_file(path)
        torch._foreach_copy_(self._averages, [saved[str(place)] for place in range(len(self._averages))])

    def _held(self) -> list[Tensor]:
        return [getattr(parameter, "ds_tensor", parameter.data) for parameter in self._trained]
