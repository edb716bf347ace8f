"""Prefixes: keys and values before everything that a language model reads, in every layer (Li & Liang 2021).

LANCER (arXiv 2309.10435, section 4) has two. The knowledge prompt is learnt: virtual tokens P pass two layers with a
tanh between, `W₂ tanh(W₁ P)`, as peft builds it. The reasoning prompt is made of the vectors of the items that a user
chose last: they read the knowledge prompt's tokens by one head of attention, and one layer turns each into a virtual
token of every layer.

Vectors that make a prefix stand first in a prompt, with the source `PREFIX`; they take room and positions as tokens do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers import DynamicCache

from raypipe.config import Config, shaping
from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt, Vectors

PREFIX = "prefix"
"""The source of vectors that make a prefix."""


class PrefixConfig(Config):
    """Options: what stands before a prompt in every layer."""

    knowledge: int = shaping(20, "virtual tokens of the knowledge prompt; 0 for none", ge=0)
    vectors: int = shaping(
        10,
        "most vectors, the last ones, that make the reasoning prompt; 0: the knowledge prompt itself is the prefix",
        ge=0,
    )
    residual: bool = shaping(
        False, "a vector stays beside what attention makes of it; published: attention's part alone"
    )

    @model_validator(mode="after")
    def _something_stands_there(self) -> PrefixConfig:
        if not self.knowledge and not self.vectors:
            raise ValueError("a prefix has a knowledge prompt, vectors, or both")
        return self

    @property
    def room(self) -> int:
        """The largest number of virtual tokens before a prompt."""
        return self.vectors or self.knowledge


@dataclass(frozen=True)
class PrefixShape:
    """The dimensions of a prefix: layers, heads of keys and values, and the width of a head."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, lm: Any) -> PrefixShape:
        """The shape for a model. Raises UsageError if the model does not attend to its whole context."""
        config = lm.config.get_text_config()
        if any(layer.is_sliding for layer in DynamicCache(config=lm.config).layers):
            raise UsageError(
                "This language model forgets what lies behind its window, and a prefix with it.",
                "Name one that attends to its whole context.",
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, heads, width)

    @property
    def token(self) -> int:
        """Width of the keys of one layer, all heads together."""
        return self.heads * self.width

    @property
    def size(self) -> int:
        """How many numbers a virtual token takes: keys and values of all layers."""
        return self.layers * 2 * self.token

    def cache(self, prefix: Tensor) -> DynamicCache:
        """The key-value cache that a model continues from, given virtual tokens [batch, tokens, size]."""
        found = DynamicCache()
        for layer, (keys, values) in enumerate(self.split(prefix)):
            found.update(keys, values, layer)
        return found

    def split(self, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [batch, heads, tokens, width] of every layer, from virtual tokens [batch, tokens, size]."""
        batch, tokens, _ = prefix.shape
        parts = prefix.view(batch, tokens, self.layers, 2, self.heads, self.width).permute(2, 3, 0, 4, 1, 5)
        return [(layer[0], layer[1]) for layer in parts]


class Prefix(nn.Module):
    """The knowledge prompt and the reasoning prompt of one language model; `width` is the width of the vectors."""

    def __init__(self, config: PrefixConfig, shape: PrefixShape, width: int) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        if config.knowledge:
            from peft import PrefixEncoder, PrefixTuningConfig

            self.knowledge = PrefixEncoder(
                PrefixTuningConfig(
                    num_virtual_tokens=config.knowledge,
                    num_layers=shape.layers,
                    token_dim=shape.token,
                    num_attention_heads=shape.heads,
                    encoder_hidden_size=width,
                    prefix_projection=True,
                )
            )
        if config.vectors:
            self.norm = nn.LayerNorm(width)
            keys = shape.token if config.knowledge else width
            self.attention = nn.MultiheadAttention(width, 1, kdim=keys, vdim=keys, batch_first=True)
            # A prefix has no order of its own, so places are learnt; the last vector has the last place.
            self.places = nn.Parameter(torch.zeros(config.vectors, width))
            self.out = nn.Linear(width, shape.size)

    def knowledge_of(self, batch: int) -> Tensor | None:
        """The knowledge prompt [batch, tokens, size]; None if there is none."""
        if not self.config.knowledge:
            return None
        weights = self.knowledge.embedding.weight
        tokens = self.knowledge(torch.arange(len(weights), device=weights.device))
        return tokens.expand(batch, -1, -1)

    def forward(self, batch: int, vectors: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Virtual tokens [batch, tokens, size], and which of them are there, bool [batch, tokens].

        They are made of `vectors` [batch, count, width]. `known` bool [batch, count] says which vectors are there;
        absent ones stand before present ones. Without a reasoning prompt, the virtual tokens are the knowledge prompt.
        """
        if not self.config.vectors:
            tokens = self.knowledge_of(batch)
            assert tokens is not None
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        assert vectors is not None, "this prefix is made of vectors"
        assert known is not None, "and some of them may not be there"
        queries = self.norm(vectors.to(self.places.dtype)) + self.places[len(self.places) - vectors.shape[1] :]
        if self.config.knowledge:
            read = self.knowledge.embedding.weight.expand(batch, -1, -1)
            seen, _ = self.attention(queries, read, read, need_weights=False)
        else:
            # A row without any vector attends to absent ones, because attention over nothing is not a number.
            absent = ~known & known.any(1, keepdim=True)
            seen, _ = self.attention(queries, queries, queries, key_padding_mask=absent, need_weights=False)
        return self.out(queries + seen if self.config.residual else seen), known

    def of_batch(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward`, from `prefix/vectors` and `prefix/known` of a batch that has `tokens`."""
        return self(len(batch["tokens"]), batch.get(f"{PREFIX}/vectors"), batch.get(f"{PREFIX}/known"))


def split_prefix(prompt: Prompt) -> tuple[Vectors | None, Prompt]:
    """Split a prompt into the vectors at its beginning that make its prefix (None if there are none) and the rest."""
    first, *rest = prompt.segments
    if isinstance(first, Vectors) and first.source == PREFIX:
        return first, Prompt(tuple(rest))
    return None, prompt


def behind(
    decoder: Any, shape: PrefixShape, tokens: Tensor, there: Tensor, words: Mapping[str, Any], mask: Tensor
) -> Tensor:
    """The last layer's states [batch, length, hidden] of a decoder that reads behind virtual tokens.

    `words` are the decoder's arguments for its input. `tokens` and `there` are as `Prefix.forward` returns them; `mask`
    [batch, length] is 1 where a token stands.
    """
    read = torch.cat([there.to(mask.dtype), mask], 1)
    return decoder(
        **words,
        attention_mask=read,
        position_ids=(read.cumsum(1) - 1).clamp(min=0)[:, there.shape[1] :],
        past_key_values=shape.cache(tokens.to(decoder.dtype)),
    ).last_hidden_state
