"""Dropout that spends one byte of randomness on each value.

On CPU torch's own takes 10 ns a value, a fifth of a training step of a small recommender; this one takes a quarter of
that. The rate is rounded to a multiple of 1/256, and the values that stay are scaled for the rounded rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Dropout(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(256 * rate)  # of 256

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return values
        if values.device.type != "cpu":
            return functional.dropout(values, self.dropped / 256)
        kept = draw_kept(values.shape, self.dropped)
        return values * kept.to(values.dtype).mul_(256 / (256 - self.dropped))


def draw_kept(shape: torch.Size, dropped: int) -> Tensor:
    """Draw which values are kept: bool of `shape` on CPU, each False with probability `dropped` / 256."""
    count = shape.numel()
    draws = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    return draws[:count].view(shape) >= dropped
