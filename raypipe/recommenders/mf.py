"""Matrix factorisation whose user vector is made of item vectors (asymmetric SVD, Paterek 2007; FISM, Kabbur 2013).

It knows no order: a prefix has the same state in any order. Users who came after training have a state too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.recommenders.dropout import Dropout
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences


class Mf(Recommender):
    def __init__(self, items: int, width: int, max_length: int, loss: LossConfig, dropout: float) -> None:
        super().__init__(items, width, max_length, loss)
        self.sources = nn.Parameter(torch.randn(items + 1, width))
        self.dropout = Dropout(dropout)

    def encode_all(self, sequences: Sequences) -> Tensor:
        """The state of a prefix of n items: the sum of their source vectors divided by √n."""
        vectors = self.dropout(functional.embedding(sequences.items, self.sources))
        sums = sequences.unpad(sequences.pad(vectors).cumsum(1))
        return sums * (sequences.offsets[:, None] + 1).to(sums.dtype).rsqrt()
