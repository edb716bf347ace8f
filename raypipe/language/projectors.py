"""Projectors: a recommender's vectors as tokens of a language model.

RecInterpreter (arXiv 2310.20487, section 3.2) has one linear layer without activation, RecExplainer (arXiv 2311.10947,
section 3.2) two with a GELU between; a Q-former (Li et al. 2023, section 3.1) lets learned queries attend over the vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from raypipe.config import Config, shaping

# Of the largest direction's: *m*, one of SASRec's states is constant but for rounding.
_LEAST_VARIANCE = 1e-4


class ProjectorConfig(Config):
    """How vectors [count, width] become tokens of the language model."""

    kind: Literal["linear", "mlp", "qformer"] = shaping("linear", "one layer, two with a GELU, or queries that attend")
    pool: Literal["each", "learned_positions"] = shaping(
        "each", "every vector is a token; or their sum, weighted by learned weights of their places, is the one"
    )
    positions: int = shaping(10, "places that learned_positions weighs, the last one last", ge=1)
    tokens: int = shaping(1, "tokens that a qformer makes of the vectors", ge=1)
    heads: int = shaping(4, "attention heads of a qformer", ge=1)
    whitened: bool = shaping(
        False,
        "vectors pass a layer of their own first, which starts as what makes them uncorrelated, each direction as large",
    )

    def build(self, width: int, hidden: int) -> Projector:
        """From vectors of `width` to embeddings of `hidden`."""
        return Projector(self, width, hidden)

    def tokens_of(self, vectors: int) -> int:
        """How many tokens so many vectors take in a prompt."""
        if self.kind == "qformer":
            return self.tokens
        return 1 if self.pool == "learned_positions" else vectors


class Projector(nn.Module):
    """See the module."""

    def __init__(self, config: ProjectorConfig, width: int, hidden: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        if config.pool == "learned_positions":
            # All weight on the last one: pooling begins as if there was none.
            self.places = nn.Parameter(torch.eye(config.positions)[-1])
        if config.kind == "linear":
            self.layers: nn.Module = nn.Linear(width, hidden)
        elif config.kind == "mlp":
            self.layers = nn.Sequential(nn.Linear(width, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, hidden))
        else:
            self.layers = _QFormer(width, hidden, config.tokens, config.heads)
        self.enter: nn.Module = nn.Linear(width, width) if config.whitened else nn.Identity()

    @torch.no_grad()
    def whiten(self, sample: Tensor) -> None:
        """Lets the layer that vectors pass first start as the whitening of these, [n, width], that changes them least (ZCA).

        Most of what states differ by lies in a few directions, and what tells the last item in the others: a language model reads
        it far sooner where these are as large. A direction in which nothing differs stays nothing.
        """
        centred = sample.double() - sample.double().mean(0)
        sizes, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(sample)))
        scales = sizes.clamp(min=_LEAST_VARIANCE * float(sizes.max()) or 1.0).rsqrt()
        weight = axes * scales @ axes.T
        assert isinstance(self.enter, nn.Linear)
        self.enter.weight.copy_(weight)
        self.enter.bias.copy_(-weight @ sample.double().mean(0))

    def forward(self, vectors: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [batch, tokens, hidden] of vectors [batch, count, width], and which of these are there, bool alike.

        `known` bool [batch, count] says which vectors are there; those that are not stand before those that are.
        """
        if self.config.pool == "learned_positions":
            vectors, known = self._pooled(vectors * known[..., None]), known.any(1, keepdim=True)
        vectors = self.enter(vectors)
        if isinstance(self.layers, _QFormer):
            tokens = self.layers(vectors, known)
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.layers(vectors), known

    def _pooled(self, vectors: Tensor) -> Tensor:
        count = min(vectors.shape[1], len(self.places))
        return (self.places[-count:, None] * vectors[:, -count:]).sum(1, keepdim=True)


class _QFormer(nn.Module):
    """Queries that attend over the vectors, each then through a feed-forward layer."""

    def __init__(self, width: int, hidden: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, hidden) * hidden**-0.5)
        self.enter = nn.Linear(width, hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, vectors: Tensor, known: Tensor) -> Tensor:
        entered = self.before(self.enter(vectors))
        queries = self.queries.expand(len(vectors), -1, -1)
        read, _ = self.attention(queries, entered, entered, key_padding_mask=~known, need_weights=False)
        tokens = queries + read
        return tokens + self.feed(self.after(tokens))
