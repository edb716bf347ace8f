"""Batched generation with a Hugging Face model, on CPU or GPU.

Prompts are sorted by length and share a batch of so many tokens, which others join as rows end (`decoding`). In float32
every answer equals the one the prompt gets alone; in bfloat16 the order of summation differs with the batch, and a few
per cent of long answers with it.

Not covered: paged memory, several GPUs. The engine `vllm` has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raypipe.engines.decoding import decode
from raypipe.engines.encoded import encode_prompts
from raypipe.engines.engine import Capabilities, Decoding, FinishReason, Outcome, prompt_seed
from raypipe.language.adapters import load_adapter, read_card
from raypipe.language.backbone import load_backbone
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import Encoded, SoftPromptLm, collate

if TYPE_CHECKING:
    from raypipe.engines.engine import EngineConfig


class TransformersEngine:
    """Answers prompts with a model of transformers; implements `Engine`. With an adapter it reads vectors too."""

    def __init__(self, config: EngineConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._backbone = load_backbone(config.lm, config.dtype, config.device)
        self._batch_tokens = config.batch_tokens
        self.context = min(config.context or self._backbone.context, self._backbone.context)
        self._adapter = self._adapted = None
        if config.adapter:
            folder = Path(config.adapter)
            self._adapter = read_card(folder)
            self._adapted = load_adapter(folder, self._backbone, checkpoint_hash(resolve_checkpoint(config.lm)))
        self.capabilities = Capabilities(vectors=self._adapted is not None)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._backbone.count_tokens(texts)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
        encoded, refused = encode_prompts(self._backbone, prompts, decoding, self.context, self._adapter)
        yield from refused
        # Longest first: if memory does not suffice, that shows at once and not at the end.
        fitting = sorted(encoded, key=lambda index: (-len(encoded[index].ids), index))
        rows = [encoded[index] for index in fitting]
        seeds = [prompt_seed(decoding.seed, prompts[index].key) for index in fitting] if decoding.temperature else []
        soft = _Soft(self._adapted, rows) if self._adapted is not None and any(row.soft for row in rows) else None
        ids = [row.ids for row in rows]
        for answer in decode(self._backbone, ids, decoding, seeds, self._batch_tokens, soft):
            index = fitting[answer.prompt]
            (text,) = self._backbone.decode([answer.tokens])
            reason: FinishReason = "stop" if answer.ended else "length"
            yield Outcome(index, text, len(encoded[index].ids), len(answer.tokens), reason)


class _Soft:
    """Prompts of one call, some with vectors; implements `SoftRows`."""

    def __init__(self, model: SoftPromptLm, rows: Sequence[Encoded]) -> None:
        self.model, self.rows = model, rows
        self.most_shared = min(start for row in rows for start, _ in row.soft)

    def embed(self, numbers: Sequence[int]) -> torch.Tensor:
        batch = collate([self.rows[number] for number in numbers], left=True)
        device = self.model.lm.device
        return self.model.embed({name: tensor.to(device) for name, tensor in batch.items()})
