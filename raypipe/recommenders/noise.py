"""Gaussian noise that depends on a row's seed alone, so that no batch or worker changes a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) as signed 64-bit numbers.
_STEP = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def seeded_normal(seeds: Tensor, draw: int, width: int) -> Tensor:
    """Standard normal noise, float32 [batch, width]; seeds int64 [batch]; `draw` tells apart the draws of one seed."""
    counters = torch.arange(width, device=seeds.device) + draw * width
    bits = _mixed(_mixed(seeds)[:, None] + counters * _STEP)
    upper = ((bits >> 40) & 0xFFFFFF).double()
    lower = ((bits >> 8) & 0xFFFFFFFF).double()
    radius = (-2 * torch.log((upper + 0.5) / 2**24)).sqrt()
    return (radius * torch.cos(2 * math.pi * lower / 2**32)).float()


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _MIX_1
    values = (values ^ _shifted(values, 27)) * _MIX_2
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift keeps the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)
