"""BERT4Rec: bidirectional self-attention trained on masked items (Sun et al., CIKM 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from raypipe.recommenders.attention import Transformer
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences


class Bert4Rec(Recommender):
    """The state of a prefix is that of a mask behind it. A window is the last max_length − 1 items and the mask."""

    causal: ClassVar[bool] = False

    def __init__(
        self,
        items: int,
        width: int,
        max_length: int,
        loss: LossConfig,
        transformer: Transformer,
        masked: float,
    ) -> None:
        super().__init__(items, width, max_length, loss)
        self.masked = masked
        self.mask = nn.Parameter(torch.randn(width) * width**-0.5)
        self.transformer = transformer
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))

    def encode(self, prefixes: Sequences) -> Tensor:
        asked = prefixes.tail(self.max_length - 1).followed_by(0)
        return self.personal(self.head(asked.last(self._states(asked, asked.items == 0))), asked.users)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of the masked items. Each item is masked with probability `masked`, the last of a window always.

        `items` are whole windows; `targets` are not used. The sum is divided by the number of this worker's masked
        items.
        """
        sequences = Sequences.of_batch(batch)
        hidden = torch.rand(len(sequences.items), device=sequences.items.device) < self.masked
        hidden[sequences.ends - 1] = True
        owners = None if sequences.owners is None else sequences.owners[hidden]
        states = self.personal(self.head(self._states(sequences, hidden)[hidden]), owners)
        batch = {**batch, "count": hidden.sum()}
        if self.loss_config.kind == "bce":  # one negative for each position
            batch["negatives"] = batch["negatives"][hidden]
        return self.next_item_loss(states, sequences.items[hidden], batch)

    def _states(self, sequences: Sequences, hidden: Tensor) -> Tensor:
        vectors = torch.where(hidden[:, None], self.mask, self.vectors(sequences.items)) * self.width**0.5
        return self.transformer(vectors, sequences)
