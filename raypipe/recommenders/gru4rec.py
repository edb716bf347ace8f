"""GRU4Rec: gated recurrent units over the history (Hidasi et al., ICLR 2016), trained to predict the next item."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from raypipe.recommenders.dropout import Dropout
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences


class Gru4Rec(Recommender):
    def __init__(
        self, items: int, width: int, max_length: int, loss: LossConfig, layers: int, hidden: int, dropout: float
    ) -> None:
        super().__init__(items, width, max_length, loss)
        self.dropout = Dropout(dropout)
        self.gru = nn.GRU(width, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.project = nn.Linear(hidden, width)

    def encode_all(self, sequences: Sequences) -> Tensor:
        vectors = self.dropout(self.vectors(sequences.items) * self.width**0.5)
        packed = pack_padded_sequence(
            sequences.pad(vectors), sequences.lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.personal(self.project(self.dropout(sequences.unpad(hidden))), sequences.owners)
