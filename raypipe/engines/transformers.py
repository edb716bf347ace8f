"""Batched generation with a Hugging Face model, on CPU or GPU, by a decoding loop of our own.

Prompts are sorted by length and batched by tokens; keys and values live in buffers allocated once a batch; rows that
have ended leave the batch. In float32 every answer equals the one the prompt gets alone; in bfloat16 the order of
summation differs with the batch, and a few per cent of long answers with it.

Not covered: continuous refilling of a batch, paged memory, several GPUs. Use a serving engine for those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from raypipe.engines.engine import Capabilities, Decoding, Outcome, OutcomeError
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.prompt import Prompt

if TYPE_CHECKING:
    from raypipe.engines.engine import EngineConfig

# Dropping rows copies the cache, so it waits until this share of the batch has ended.
_ENDED_SHARE = 0.25


class TransformersEngine:
    """Answers prompts with a model of transformers; implements `Engine`."""

    capabilities = Capabilities()

    def __init__(self, config: EngineConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._backbone = load_backbone(config.lm, config.dtype, config.device)
        self._batch_tokens = config.batch_tokens
        self.context = min(config.context or self._backbone.context, self._backbone.context)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._backbone.count_tokens(texts)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
        readable = [index for index, prompt in enumerate(prompts) if not prompt.has_vectors]
        encoded = dict(zip(readable, self._backbone.encode([prompts[i].text for i in readable]), strict=True))
        fitting = []
        for index in range(len(prompts)):
            error = self._refusal(encoded.get(index), decoding)
            if error is None:
                fitting.append(index)
            else:
                yield Outcome(index, tokens_in=len(encoded.get(index, ())), error=error)
        # Longest first: if memory does not suffice, that shows at once and not at the end.
        fitting.sort(key=lambda index: (-len(encoded[index]), index))
        for batch in self._batches(fitting, encoded, decoding):
            seeds = [_seed(decoding.seed, prompts[i].text) for i in batch] if decoding.temperature else []
            answers = _decode(self._backbone, [encoded[i] for i in batch], decoding, seeds)
            texts = self._backbone.decode([tokens for tokens, _ in answers])
            for index, text, (tokens, ended) in zip(batch, texts, answers, strict=True):
                yield Outcome(index, text, len(encoded[index]), len(tokens), "stop" if ended else "length")

    def _refusal(self, tokens: list[int] | None, decoding: Decoding) -> OutcomeError | None:
        if tokens is None:
            return OutcomeError("unsupported_prompt", "The transformers engine reads text only.")
        if not tokens:
            return OutcomeError("unsupported_prompt", "The prompt holds no token.")
        if len(tokens) + decoding.max_new_tokens > self.context:
            message = (
                f"{len(tokens)} tokens and {decoding.max_new_tokens} of answer exceed the context of {self.context}."
            )
            return OutcomeError("prompt_too_long", message)
        return None

    def _batches(
        self, longest_first: Sequence[int], encoded: dict[int, list[int]], decoding: Decoding
    ) -> Iterator[Sequence[int]]:
        start = 0
        while start < len(longest_first):
            tokens_a_row = len(encoded[longest_first[start]]) + decoding.max_new_tokens
            rows = max(1, self._batch_tokens // tokens_a_row)
            yield longest_first[start : start + rows]
            start += rows


def _seed(seed: int, text: str) -> int:
    """A seed of 63 bits from the decoding's seed and the prompt: the same in every batch and process."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.inference_mode()
def _decode(
    backbone: Backbone, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int]
) -> list[tuple[list[int], bool]]:
    """For each prompt its generated tokens without the end mark, and whether the model ended the answer."""
    device = backbone.device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)], device=device)
    ends = torch.tensor(backbone.ends, device=device)
    capacity = longest + decoding.max_new_tokens
    cache = _cache(backbone.model, capacity)
    # mask [rows, capacity]: 1 where there is a token; columns from `longest` on are answers.
    mask = torch.ones(len(prompts), capacity, dtype=torch.long, device=device)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = any(padding)
    draws = _draws(seeds, decoding.max_new_tokens).to(device) if seeds else None  # [rows, max_new_tokens]

    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch answers
    live = torch.ones(len(prompts), dtype=torch.bool, device=device)
    answers = torch.full((len(prompts), decoding.max_new_tokens), -1, dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    step_tokens, start = tokens, 0
    for step in range(decoding.max_new_tokens):
        stop = longest + step
        logits = backbone.model(
            input_ids=step_tokens,
            attention_mask=mask[:, :stop] if padded else None,
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [rows, vocabulary]
        chosen = _chosen(logits, decoding.temperature, None if draws is None else draws[rows, step])
        stops = torch.isin(chosen, ends)
        ended[rows[live & stops]] = True
        live &= ~stops
        answers[rows[live], step] = chosen[live]
        left = int(live.sum())
        if not left:
            break
        if left <= len(rows) * (1 - _ENDED_SHARE):
            kept = live.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, live, chosen, mask, positions = rows[kept], live[kept], chosen[kept], mask[kept], positions[kept]
        step_tokens, start = chosen.unsqueeze(1), stop
    return [
        ([token for token in tokens if token >= 0], end)
        for tokens, end in zip(answers.tolist(), ended.tolist(), strict=True)
    ]


def _chosen(logits: Tensor, temperature: float, draws: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the one at quantile `draws` of the tempered distribution."""
    if draws is None:
        return logits.argmax(-1)
    # float64, so that the sum over a large vocabulary does not depend on how it is split.
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    quantiles = draws.unsqueeze(1).double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantiles).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _draws(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers [rows, count], each row from its own seed."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _cache(model: Any, capacity: int) -> DynamicCache:
    """A cache whose plain layers fill buffers of `capacity` positions; sliding and other layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _BufferedLayer(DynamicLayer):
    """Keys and values [rows, heads, positions, width] in a buffer allocated once: appending copies one position only.

    transformers' own layer concatenates, copying the whole cache at every token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self._capacity, width)
            self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._keys[:, :, start : self._length] = key_states
        self._values[:, :, start : self._length] = value_states
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
