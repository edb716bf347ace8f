"""Transformer blocks over packed sequences. Everything but the attention itself runs without padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.recommenders.dropout import Dropout
from raypipe.recommenders.dropped_attention import dropped_attention
from raypipe.recommenders.sequences import Sequences


def rotated(vectors: Tensor) -> Tensor:
    """Vectors [batch, heads, length, width] with rotary positions (Su et al. 2021).

    Pairs of halves are turned by place × rate. The product of two turned vectors depends only on the distance of their
    places, so that a state in the middle of a long window teaches as much as one at its end.
    """
    half = vectors.shape[-1] // 2
    rates = 10_000 ** (-torch.arange(half, device=vectors.device) / half)
    angles = torch.arange(vectors.shape[-2], device=vectors.device)[:, None] * rates
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    turned = [first * cosine - second * sine, first * sine + second * cosine, vectors[..., 2 * half :]]
    return torch.cat(turned, -1)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence.

    If attention weights are dropped, training on CPU holds all of them, [batch, heads, longest, longest], of which a
    causal model leaves nearly half out.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.dropout = Dropout(dropout)
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, states: Tensor, sequences: Sequences) -> Tensor:
        """[positions, width] → [positions, width]."""
        padded = sequences.pad(self.project(states))  # [batch, longest, 3 · width]
        batch, longest, _ = padded.shape
        queries, keys, values = padded.view(batch, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            queries, keys = rotated(queries), rotated(keys)
        inside = None
        if not self.causal:
            inside = torch.arange(longest, device=states.device) < sequences.lengths[:, None]
        # Under a causal mask no real position attends to padding, which is on the right.
        dropped = self.dropout.dropped if self.training else 0
        if dropped and states.device.type == "cpu":
            mixed = dropped_attention(queries, keys, values, dropped, inside)
        else:
            mask = None if inside is None else inside[:, None, None, :]
            rate = dropped / 256
            mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, rate, is_causal=self.causal)
        return self.merge(sequences.unpad(mixed.transpose(1, 2).reshape(batch, longest, -1)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        attention_dropout: float,
        *,
        causal: bool,
        rotary: bool,
    ) -> None:
        super().__init__()
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, attention_dropout, causal=causal, rotary=rotary)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward), nn.GELU(), Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, sequences: Sequences) -> Tensor:
        states = states + self.dropout(self.attention(self.attention_norm(states), sequences))
        return states + self.dropout(self.feedforward(self.feedforward_norm(states)))


class Transformer(nn.Module):
    """Positions, dropout, blocks and a last norm: item vectors [positions, width] → states [positions, width]."""

    def __init__(
        self,
        width: int,
        max_length: int,
        layers: int,
        heads: int,
        feedforward: int,
        dropout: float,
        *,
        causal: bool,
        attention_dropout: float = 0.0,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.places = None if rotary else nn.Embedding(max_length, width)
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=0.02)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, feedforward, dropout, attention_dropout, causal=causal, rotary=rotary)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor, sequences: Sequences) -> Tensor:
        if self.places is not None:
            vectors = vectors + self.places(sequences.offsets)
        states = self.dropout(vectors)
        for block in self.blocks:
            states = block(states, sequences)
        return self.norm(states)
