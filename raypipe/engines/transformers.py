"""Batched generation with a Hugging Face model, on CPU or GPU.

Prompts are sorted by length and share a batch of so many tokens, which others join as rows end (`decoding`). In float32
every answer equals the one the prompt gets alone; in bfloat16 the order of summation differs with the batch, and a few
per cent of long answers with it.

Not covered: paged memory, several GPUs. The engine `vllm` has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from raypipe.engines.decoding import decode
from raypipe.engines.encoded import encode_prompts
from raypipe.engines.engine import Capabilities, Decoding, FinishReason, Outcome, prompt_seed
from raypipe.language.backbone import load_backbone
from raypipe.language.prompt import Prompt

if TYPE_CHECKING:
    from raypipe.engines.engine import EngineConfig


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
        encoded, refused = encode_prompts(self._backbone, prompts, decoding, self.context)
        yield from refused
        # Longest first: if memory does not suffice, that shows at once and not at the end.
        fitting = sorted(encoded, key=lambda index: (-len(encoded[index]), index))
        seeds = [prompt_seed(decoding.seed, prompts[index].text) for index in fitting] if decoding.temperature else []
        for answer in decode(self._backbone, [encoded[i] for i in fitting], decoding, seeds, self._batch_tokens):
            index = fitting[answer.prompt]
            (text,) = self._backbone.decode([answer.tokens])
            reason: FinishReason = "stop" if answer.ended else "length"
            yield Outcome(index, text, len(encoded[index]), len(answer.tokens), reason)
