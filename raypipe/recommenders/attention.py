"""Transformer blocks over packed sequences: everything but the attention itself runs without padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.recommenders.sequences import Sequences


class Attention(nn.Module):
    """Multi-head self-attention within each sequence. The weights themselves are not dropped: the kernels that hold no
    [length × length] matrix cannot."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, states: Tensor, sequences: Sequences) -> Tensor:
        """[positions, width] → [positions, width]."""
        padded = sequences.pad(self.project(states))  # [batch, longest, 3 · width]
        batch, longest, _ = padded.shape
        queries, keys, values = padded.view(batch, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if not self.causal:
            within = torch.arange(longest, device=states.device) < sequences.lengths[:, None]
            mask = within[:, None, None, :]
        # Under a causal mask nothing real looks at padding, which is on the right.
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=self.causal)
        return self.merge(sequences.unpad(mixed.transpose(1, 2).reshape(batch, longest, -1)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, sequences: Sequences) -> Tensor:
        states = states + self.dropout(self.attention(self.attention_norm(states), sequences))
        return states + self.dropout(self.feedforward(self.feedforward_norm(states)))


class Transformer(nn.Module):
    """Positions, dropout, blocks, and a last norm: item vectors [positions, width] → states [positions, width]."""

    def __init__(
        self, width: int, max_length: int, layers: int, heads: int, feedforward: int, dropout: float, *, causal: bool
    ) -> None:
        super().__init__()
        self.places = nn.Embedding(max_length, width)
        nn.init.normal_(self.places.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, feedforward, dropout, causal=causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor, sequences: Sequences) -> Tensor:
        states = self.dropout(vectors + self.places(sequences.offsets))
        for block in self.blocks:
            states = block(states, sequences)
        return self.norm(states)
