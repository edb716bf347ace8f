"""SASRec: causal self-attention over the history (Kang & McAuley, ICDM 2018)."""

from __future__ import annotations

from torch import Tensor

from raypipe.recommenders.attention import Transformer
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences


class SasRec(Recommender):
    """Places are counted from the window's start, so that a prefix has the same state within a longer sequence."""

    def __init__(
        self,
        items: int,
        width: int,
        max_length: int,
        loss: LossConfig,
        transformer: Transformer,
    ) -> None:
        super().__init__(items, width, max_length, loss)
        self.transformer = transformer

    def encode_all(self, sequences: Sequences) -> Tensor:
        vectors = self.vectors(sequences.items) * self.width**0.5
        return self.personal(self.transformer(vectors, sequences), sequences.owners)
