"""Projectors, which turn a recommender's vectors into tokens of a language model.

RecInterpreter (arXiv 2310.20487, section 3.2) has one linear layer without activation. RecExplainer (arXiv 2311.10947,
section 3.2) has two layers with a GELU between. A Q-former (Li et al. 2023, section 3.1) lets learned queries attend
over the vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from raypipe.config import Config, shaping

# A share of the largest direction's variance. Measured: one direction of SASRec's states is constant but for rounding.
_LEAST_VARIANCE = 1e-4


class ProjectorConfig(Config):
    """Options: how vectors [count, width] become tokens of the language model."""

    kind: Literal["linear", "mlp", "qformer"] = shaping("linear", "one layer, two with a GELU, or queries that attend")
    pool: Literal["each", "learned_positions"] = shaping(
        "each",
        "every vector is a token, or what a qformer attends to; or their sum, weighted by learned weights of their places, is "
        "the one",
    )
    positions: int = shaping(
        10, "places that learned_positions weighs and a qformer tells apart, the last one last", ge=1
    )
    tokens: int = shaping(
        1, "tokens that a qformer makes of the vectors; of one alone it has nothing to choose from", ge=1
    )
    heads: int = shaping(4, "attention heads of a qformer", ge=1)
    whitened: bool = shaping(
        False,
        "vectors pass a layer of their own first, which starts as what makes them uncorrelated, each direction as large",
    )

    @model_validator(mode="after")
    def _a_qformer_has_several_to_attend_to(self) -> ProjectorConfig:
        if self.kind == "qformer" and self.pool == "learned_positions":
            raise ValueError("a qformer pools vectors itself, and attends to nothing where one sum is left of them")
        return self

    def build(self, width: int, hidden: int) -> Projector:
        """A projector from vectors of `width` to embeddings of `hidden`."""
        return Projector(self, width, hidden)

    def tokens_of(self, vectors: int) -> int:
        """How many tokens `vectors` vectors take in a prompt."""
        if self.kind == "qformer":
            return self.tokens
        return 1 if self.pool == "learned_positions" else vectors


class Projector(nn.Module):
    """Turns vectors into tokens, as its config says."""

    def __init__(self, config: ProjectorConfig, width: int, hidden: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        if config.pool == "learned_positions":
            # All weight starts on the last vector, as if there were no pooling.
            self.places = nn.Parameter(torch.eye(config.positions)[-1])
        if config.kind == "linear":
            self.layers: nn.Module = nn.Linear(width, hidden)
        elif config.kind == "mlp":
            self.layers = nn.Sequential(nn.Linear(width, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, hidden))
        else:
            self.layers = _QFormer(width, hidden, config)
        self.enter: nn.Module = nn.Linear(width, width) if config.whitened else nn.Identity()

    @torch.no_grad()
    def whiten(self, sample: Tensor) -> None:
        """Initialise the first layer as the whitening of `sample` [n, width] that changes vectors least (ZCA).

        Most of the variance of states lies in a few directions, but what tells the last item lies in the others. A
        language model reads it far sooner if all directions are equally large. A direction without variance is left
        without any.
        """
        centred = sample.double() - sample.double().mean(0)
        sizes, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(sample)))
        scales = sizes.clamp(min=_LEAST_VARIANCE * float(sizes.max()) or 1.0).rsqrt()
        weight = axes * scales @ axes.T
        assert isinstance(self.enter, nn.Linear)
        self.enter.weight.copy_(weight)
        self.enter.bias.copy_(-weight @ sample.double().mean(0))

    def forward(self, vectors: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [batch, tokens, hidden] of `vectors` [batch, count, width], and which are there, bool [batch, tokens].

        `known` bool [batch, count] says which vectors are there; absent ones stand before present ones.
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
    """Learned queries that attend over the vectors and their places; each then passes a feed-forward layer."""

    def __init__(self, width: int, hidden: int, config: ProjectorConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.tokens, hidden) * hidden**-0.5)
        self.enter = nn.Linear(width, hidden)
        self.places = nn.Parameter(torch.zeros(config.positions, hidden))
        self.attention = nn.MultiheadAttention(hidden, config.heads, batch_first=True)
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, vectors: Tensor, known: Tensor) -> Tensor:
        # Counted from the end, where the last vector always stands; what is further back shares the first place.
        places = torch.arange(-vectors.shape[1], 0, device=vectors.device) + len(self.places)
        entered = self.before(self.enter(vectors) + self.places[places.clamp(min=0)])
        queries = self.queries.expand(len(vectors), -1, -1)
        read, _ = self.attention(queries, entered, entered, key_padding_mask=~known, need_weights=False)
        tokens = queries + read
        return tokens + self.feed(self.after(tokens))
