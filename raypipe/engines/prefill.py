"""Reading prompts before anything is written: each once, and what all of them begin with once for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from raypipe.engines.caches import is_plain, new_cache
from raypipe.language.backbone import Backbone

_FEW_TOKENS = 8  # Copying the keys and values of fewer is not worth its while.
# A CPU reads prompts in pieces whose activations stay in its caches: 1.7 times as fast as 30,000 tokens at once (measured).
_CPU_READ_TOKENS = 3000


class SoftRows(Protocol):
    """Prompts in which vectors stand at some places."""

    most_shared: int
    """Tokens before the first such place of any prompt."""

    def embed(self, numbers: Sequence[int]) -> Tensor:
        """What the model reads of the prompts of these numbers, [rows, longest, hidden], padded on the left."""
        ...


def shared_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, none where they are few; at least one of each prompt is left."""
    if len(prompts) < 2:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # In their order these two differ first.
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(map(len, prompts)) - 1)
    return first[:length] if length >= _FEW_TOKENS else []


@dataclass(frozen=True, slots=True)
class Read:
    """Prompts that were read: their cache, bool [rows, longest] where it holds a token, and the last position's logits."""

    cache: DynamicCache
    read: Tensor
    logits: Tensor


class Prefill:
    """Reads prompts, of which `soft` says what is read where they hold more than words."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Sequence[int]], soft: SoftRows | None = None) -> None:
        self.model, self.device = backbone.model, backbone.device
        self.prompts, self.soft = prompts, soft
        self._shared: DynamicCache | None = None
        self._shared_tokens = 0
        shared = shared_start([prompt[: soft.most_shared] for prompt in prompts] if soft else prompts)
        if shared:
            cache = new_cache(self.model, len(shared))
            if is_plain(cache):
                self.model(
                    input_ids=torch.tensor([shared], device=self.device), past_key_values=cache, logits_to_keep=1
                )
                self._shared, self._shared_tokens = cache, len(shared)

    def parts(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Of prompts, longest first, those that are read at once."""
        whole = self.device.type != "cpu" or not is_plain(new_cache(self.model, 0))
        at = 0
        while at < len(numbers):
            rows = len(numbers) if whole else max(1, _CPU_READ_TOKENS // len(self.prompts[numbers[at]]))
            yield numbers[at : at + rows]
            at += rows

    def read(self, numbers: Sequence[int]) -> Read:
        """The prompts of these numbers, padded on the left."""
        prompts = [self.prompts[number] for number in numbers]
        longest, rows, known = max(map(len, prompts)), len(prompts), self._shared_tokens
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        tokens = torch.zeros(rows, longest - known, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt[known:])
        place = torch.arange(longest, device=self.device)
        read = (place < known) | (place - known >= padding[:, None])
        cache = new_cache(self.model, longest)
        if self._shared is not None:
            for layer, start in zip(cache.layers, self._shared.layers, strict=True):
                layer.update(start.keys.expand(rows, -1, -1, -1), start.values.expand(rows, -1, -1, -1))
        words = {"input_ids": tokens.to(self.device)}
        logits = self.model(
            **(words if self.soft is None else {"inputs_embeds": self.soft.embed(numbers)[:, known:]}),
            attention_mask=read.long() if padding.any() else None,
            position_ids=(read.cumsum(1) - 1).clamp(min=0)[:, known:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return Read(cache, read, logits)
