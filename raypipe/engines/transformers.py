"""Batched generation with a Hugging Face model, on CPU or GPU.

Prompts are sorted by length. They share a batch of at most `batch_tokens` tokens, which others join as rows end
(`decoding`). In float32 every answer equals the one that the prompt gets alone. In bfloat16 the order of summation
differs with the batch, and with it a few per cent of long answers. The prompts of a batch start together when beams are
searched (`beams`) and answers are scored (`scoring`).

Not covered: paged memory and several GPUs. The engine `vllm` has both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from raypipe.engines.beams import Hypothesis, search
from raypipe.engines.decoding import Answer, Growing, decode
from raypipe.engines.encoded import encode_prompts
from raypipe.engines.engine import (
    Beam,
    Choices,
    Decoding,
    FinishReason,
    Outcome,
    OutcomeError,
    Piece,
    Scores,
    lacking,
    prompt_seed,
)
from raypipe.engines.prefill import Before
from raypipe.engines.scoring import score
from raypipe.errors import UsageError
from raypipe.language.adapters import load_adapter, read_card
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import Encoded, SoftPromptLm, collate
from raypipe.language.trie import AnswerTrie, answer_tokens

if TYPE_CHECKING:
    from raypipe.engines.engine import EngineConfig

_NOT_FINITE = OutcomeError(
    "not_finite",
    "The language model found no number for what comes next. Its weights are damaged, or overflow in its dtype: check the checkpoint "
    "on a few prompts, or choose float32.",
)
# Systems ask for one text and for a list; a system that writes items asks with a catalogue and with the one before it.
_TRIES_KEPT = 2


class TransformersEngine:
    """Answers prompts with a model of transformers; implements `Engine`. With an adapter it reads vectors too.

    A `backbone` that is given is taken as it is. `adapted` is the model with its adapter, None without one.
    """

    def __init__(self, config: EngineConfig, backbone: Backbone | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._config = config
        self.backbone = backbone or load_backbone(config.lm, config.dtype, config.device)
        self._batch_tokens = config.batch_tokens
        self.context = min(config.context or self.backbone.context, self.backbone.context)
        self._adapter = self.adapted = None
        if config.adapter:
            folder = Path(config.adapter)
            self._adapter = read_card(folder)
            self.adapted = load_adapter(folder, self.backbone, checkpoint_hash(resolve_checkpoint(config.lm)))
        self.capabilities = config.capabilities
        self._tries: list[tuple[Choices, AnswerTrie]] = []

    def beside(self, adapter: Path) -> TransformersEngine:
        """An engine with the adapter over the same weights.

        The weights are in memory once, except for those that the adapter changes. The answers of this engine stay the
        same. Raises UsageError as `EngineConfig.build` does.
        """
        card = read_card(adapter).config
        own: Literal["nothing", "embeddings", "everything"] = "embeddings" if card.embeddings else "nothing"
        config = self._config.model_copy(update={"adapter": str(adapter)})
        return TransformersEngine(config, self.backbone.twin("everything" if card.full else own))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.backbone.count_tokens(texts)

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        trie = self._trie_of(choices, decoding) if choices is not None else None
        encoded, refused = self._encoded(prompts, [decoding.max_new_tokens] * len(prompts))
        yield from refused
        fitting, rows, soft = self._longest_first(encoded)
        if decoding.beams > 1:
            for number, found in search(self.backbone, rows, decoding, self._batch_tokens, soft, trie):
                yield self._searched(fitting[number], len(rows[number]), found, choices)
            return
        seeds = self._seeds(prompts, fitting, decoding)
        for answer in decode(self.backbone, rows, decoding, seeds, self._batch_tokens, soft, trie):
            assert isinstance(answer, Answer)
            text = self._text(answer.tokens, answer.chosen, choices)
            yield self._outcome(fitting[answer.prompt], len(rows[answer.prompt]), answer, text)

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        if decoding.beams > 1:
            raise lacking("search whose answers are told piece by piece")
        encoded, refused = self._encoded(prompts, [decoding.max_new_tokens] * len(prompts))
        yield from refused
        fitting, rows, soft = self._longest_first(encoded)
        seeds = self._seeds(prompts, fitting, decoding)
        for answer in decode(self.backbone, rows, decoding, seeds, self._batch_tokens, soft, growing=True):
            index, (text,) = fitting[answer.prompt], self.backbone.decode([answer.tokens])
            if isinstance(answer, Growing):
                # A character of several tokens is shown once it is whole.
                yield Piece(index, text.rstrip("\ufffd"))
            else:
                yield self._outcome(index, len(rows[answer.prompt]), answer, text)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        if len(answers) != len(prompts) or not all(answers):
            raise ValueError("Every prompt needs answers to score.")
        tokens = [answer_tokens(self.backbone, mine) for mine in answers]
        told = zip(chain.from_iterable(answers), chain.from_iterable(tokens), strict=True)
        if not all(text and ids for text, ids in told):
            raise ValueError("An answer that is to be scored holds a token.")
        encoded, refused = self._encoded(prompts, [max(map(len, mine)) for mine in tokens])
        for outcome in refused:
            yield Scores(outcome.index, tokens_in=outcome.tokens_in, error=outcome.error)
        fitting, rows, soft = self._longest_first(encoded)
        asked = [tokens[index] for index in fitting]
        for number, logprobs in score(self.backbone, rows, asked, self._batch_tokens, soft):
            if any(map(math.isnan, logprobs)):
                yield Scores(fitting[number], tokens_in=len(rows[number]), error=_NOT_FINITE)
            else:
                yield Scores(fitting[number], tuple(logprobs), len(rows[number]))

    def _encoded(self, prompts: Sequence[Prompt], room: Sequence[int]) -> tuple[dict[int, Encoded], list[Outcome]]:
        return encode_prompts(self.backbone, prompts, room, self.context, self._adapter)

    def _longest_first(self, encoded: Mapping[int, Encoded]) -> tuple[list[int], list[list[int]], _Soft | None]:
        """Indices, token ids and vectors of prompts, longest first: if memory does not suffice, that shows at once."""
        fitting = sorted(encoded, key=lambda index: (-len(encoded[index].ids), index))
        rows = [encoded[index] for index in fitting]
        adapted = self.adapted
        reads = adapted is not None and (adapted.prefix is not None or any(row.soft for row in rows))
        soft = _Soft(adapted, rows) if adapted is not None and reads and rows else None
        return fitting, [row.ids for row in rows], soft

    def _trie_of(self, choices: Choices, decoding: Decoding) -> AnswerTrie:
        """The trie of these choices, from an earlier call if they are among the last that were asked for.

        Raises UsageError if `max_new_tokens` leave no room for the longest text.
        """
        trie = next((trie for held, trie in self._tries if held == choices), None)
        if trie is None:
            trie = AnswerTrie(self.backbone, self.backbone.ends, choices.texts, choices.separator, choices.most)
        others = [(held, other) for held, other in self._tries if other is not trie]
        self._tries = [(choices, trie), *others][:_TRIES_KEPT]
        longest = trie.longest
        if longest > decoding.max_new_tokens:
            raise UsageError(
                f"The longest text takes {longest} tokens, its end included, and max_new_tokens is {decoding.max_new_tokens}.",
                f"Set it to {longest} or more, or leave out what is so long.",
            )
        return trie

    def _searched(self, index: int, tokens_in: int, found: Sequence[Hypothesis], choices: Choices | None) -> Outcome:
        if not found:
            return Outcome(index, tokens_in=tokens_in, error=_NOT_FINITE)
        beams = tuple(Beam(self._text(beam.tokens, beam.chosen, choices), beam.logprob, beam.chosen) for beam in found)
        best = found[0]
        reason: FinishReason = "stop" if best.ended else "length"
        written = sum(len(beam.tokens) for beam in found)
        return Outcome(index, beams[0].text, tokens_in, written, reason, chosen=best.chosen, beams=beams)

    def _seeds(self, prompts: Sequence[Prompt], fitting: Sequence[int], decoding: Decoding) -> list[int]:
        """One seed for each prompt if the decoding samples, else none."""
        return [prompt_seed(decoding.seed, prompts[index].key) for index in fitting] if decoding.temperature else []

    def _outcome(self, index: int, tokens_in: int, answer: Answer, text: str) -> Outcome:
        if answer.broken:
            return Outcome(index, tokens_in=tokens_in, tokens_out=len(answer.tokens), error=_NOT_FINITE)
        reason: FinishReason = "stop" if answer.ended else "length"
        return Outcome(index, text, tokens_in, len(answer.tokens), reason, chosen=answer.chosen)

    def _text(self, tokens: Sequence[int], chosen: Sequence[int], choices: Choices | None) -> str:
        return self.backbone.decode([tokens])[0] if choices is None else choices.text(chosen)


class _Soft:
    """The prompts of one call, some with vectors, or all behind a prefix; implements `SoftRows`."""

    def __init__(self, model: SoftPromptLm, rows: Sequence[Encoded]) -> None:
        self.model, self.rows = model, rows
        # Equal tokens behind different vectors or prefixes have other keys and values, and are not shared.
        starts = [0] if model.prefix is not None else [start for row in rows for start, _ in row.soft]
        self.most_shared = min(starts)
        self.contents: Sequence[Sequence[int]] = [row.content for row in rows]

    def embed(self, numbers: Sequence[int]) -> torch.Tensor:
        return self.model.embed(self._batch(numbers))

    def before(self, numbers: Sequence[int]) -> Before | None:
        prefix = self.model.prefix
        if prefix is None:
            return None
        tokens, there = prefix.of_batch(self._batch(numbers))
        return Before(prefix.shape.split(tokens.to(self.model.lm.dtype)), there)

    def _batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = collate([self.rows[number] for number in numbers], left=True)
        return {name: tensor.to(self.model.lm.device) for name, tensor in batch.items()}
