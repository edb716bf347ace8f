"""An exponential moving average of weights during training (Polyak & Juditsky 1992), kept shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightAverage:
    """The average of this rank's part of every trained parameter: the whole parameter, or its ZeRO-3 shard."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._module = module
        self._averages = [held.to(torch.float32, copy=True) for held in held_of(module)]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Add the weights after step number `steps`, counted from 1.

        The first steps have a larger share, because there is little yet to average them with.
        """
        share = 1 - min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._averages, [held.to(torch.float32) for held in held_of(self._module)], share)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Put the average into the module for the duration of the block, and then restore the module's own weights."""
        before = [held.clone() for held in held_of(self._module)]
        torch._foreach_copy_(held_of(self._module), self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(held_of(self._module), before)

    def save(self, path: Path) -> None:
        save_file({str(place): average for place, average in enumerate(self._averages)}, path)

    def load(self, path: Path) -> None:
        saved = load_file(path)
        torch._foreach_copy_(self._averages, [saved[str(place)] for place in range(len(self._averages))])


def held_of(module: nn.Module) -> list[Tensor]:
    """This rank's part of every trained parameter: the whole parameter, or its ZeRO-3 shard."""
    return [getattr(weight, "ds_tensor", weight.data) for weight in module.parameters() if weight.requires_grad]
