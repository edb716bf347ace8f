"""Caser: horizontal and vertical convolutions over the last few items (Tang & Wang, WSDM 2018).

It has no user embedding, unlike the paper (eq. 12): a state is a function of the prefix, so that users who came after
training have one too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.config import Config, shaping
from raypipe.recommenders.dropout import Dropout
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences


class CaserOptions(Config):
    window: int = shaping(5, "L, the items a state sees", ge=1)
    horizontal: int = shaping(16, "filters of each height", ge=1)
    vertical: int = shaping(4, "vertical filters", ge=1)


class Caser(Recommender):
    def __init__(
        self,
        items: int,
        width: int,
        max_length: int,
        loss: LossConfig,
        options: CaserOptions,
        dropout: float,
    ) -> None:
        super().__init__(items, width, max_length, loss)
        self.window = window = options.window
        heights = range(1, window + 1)
        self.horizontal = nn.ModuleList(nn.Conv1d(width, options.horizontal, height) for height in heights)
        self.vertical = nn.Linear(window, options.vertical)
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(options.horizontal * window + options.vertical * width, width)

    def encode_all(self, sequences: Sequences) -> Tensor:
        # The window that ends at each position of the sequence, oldest first, padded with item 0 before its start.
        back = torch.arange(self.window - 1, -1, -1, device=sequences.items.device)
        positions = torch.arange(len(sequences.items), device=back.device)
        inside = sequences.offsets[:, None] >= back
        items = torch.where(inside, sequences.items[(positions[:, None] - back).clamp(min=0)], 0)
        vectors = functional.embedding(items, self.table) * self.width**0.5 * inside[..., None]
        grid = vectors.transpose(1, 2)  # [positions, width, window]
        rows = [functional.relu(convolution(grid)).amax(2) for convolution in self.horizontal]
        columns = self.vertical(grid).flatten(1)
        return functional.relu(self.project(self.dropout(torch.cat([*rows, columns], 1))))
