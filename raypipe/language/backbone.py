"""Loading a causal language model from any checkpoint in Hugging Face layout, and tokenising text for it.

Only safetensors weights are read, and no code from a checkpoint is ever run. Not covered: quantised weights, and
models that take no `position_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from raypipe.errors import UsageError
from raypipe.language.checkpoint import resolve_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenises text as a model was taught to read it.

    A mark inside a text, such as `</s>` in a title, is tokenised as words: it ends no turn and no answer. The only
    special tokens are those that the tokenizer itself puts around a text, and those of its chat template.
    """

    tokenizer: Any

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole prompts as the model reads them; as a user's turn if the tokenizer has a chat template."""
        if not texts:
            return []
        if self.tokenizer.chat_template is None:
            return self._read(texts, add_special_tokens=True)
        return [ids for ids, _ in self.encode_pieces([[text] for text in texts])]

    def encode_pieces(self, prompts: Sequence[Sequence[str | int]]) -> list[tuple[list[int], list[int]]]:
        """Token ids of prompts that are given in pieces, each tokenised by itself.

        A piece that is a number reserves that many places, with id 0. Also returns where each such run of places begins.
        """
        before, after = self._frame
        # All pieces in one call: one call per piece took most of the time of preparing a training.
        texts = list(dict.fromkeys(piece for pieces in prompts for piece in pieces if isinstance(piece, str)))
        known = dict(zip(texts, self.tokens_of(texts), strict=True))
        found = []
        for pieces in prompts:
            ids, starts = [*before], []
            for piece in pieces:
                if isinstance(piece, int):
                    starts.append(len(ids))
                    ids += [0] * piece
                else:
                    ids += known[piece]
            found.append((ids + after, starts))
        return found

    def continued(self, prompt: str, text: str) -> list[int]:
        """The tokens of a text that continues a prompt; empty if prompt and text share a token."""
        if self.tokenizer.chat_template is None:
            start, whole = self.encode([prompt, prompt + text])
        else:
            turn = self._as_user_turn(prompt)
            start, whole = self.tokenizer([turn, turn + text], add_special_tokens=False)["input_ids"]
        return whole[len(start) :] if whole[: len(start)] == start else []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens that each text takes inside a prompt, without chat wrapping and special tokens."""
        return [len(ids) for ids in self.tokens_of(texts)]

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The text of each answer, without special tokens and outer whitespace."""
        return [text.strip() for text in self.tokenizer.batch_decode(list(answers), skip_special_tokens=True)]

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts within a prompt or an answer."""
        return self._read(texts, add_special_tokens=False)

    def _read(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False}
        return self.tokenizer(list(texts), split_special_tokens=True, **options)["input_ids"]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a prompt: those of the user's turn if there is a chat template.

        Raises UsageError if the template does not write what the user says exactly once.
        """
        if self.tokenizer.chat_template is None:
            return self.tokenizer("")["input_ids"], []
        mark = "\u241f"
        parts = self._as_user_turn(mark).split(mark)
        if len(parts) != 2:
            raise UsageError(
                f"The tokenizer's chat template writes what the user says {len(parts) - 1} times.",
                "Name a checkpoint whose template writes it once.",
            )
        # The template has already written the special tokens, as text.
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return before, after

    def _as_user_turn(self, text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class Backbone(PromptTokenizer):
    """A loaded model with its tokenizer.

    `context` is the largest number of tokens of prompt and answer together; `ends` are the tokens that end an answer.
    """

    model: nn.Module
    device: torch.device
    context: int
    ends: tuple[int, ...]

    def twin(self, own: Literal["nothing", "embeddings", "everything"] = "nothing") -> Backbone:
        """A backbone with the same weights in separate modules.

        What is put into the twin's modules, such as LoRA, is not in this one's. The weights named by `own` are copies
        that may be changed: the embedding table and the head, or every weight.
        """
        kept: list[Any] = [*self.model.buffers()]
        if own == "embeddings":
            model: Any = self.model
            apart = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
            kept += [weight for weight in model.parameters() if not any(weight is other for other in apart)]
        elif own == "nothing":
            kept += self.model.parameters()
        return replace(self, model=deepcopy(self.model, {id(tensor): tensor for tensor in kept}))


def load_backbone(ref: str, dtype: Literal["float32", "bfloat16"] = "float32", device: str = "auto") -> Backbone:
    """Load the model at a folder or hub name, in evaluation mode on `device` ("auto": a GPU if there is one).

    Raises UsageError if there is no such checkpoint, if it is not a causal language model, or if it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = resolve_checkpoint(ref)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[dtype], local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers raises whatever its parsers do; all of it means: not readable as a model
        problem = f"{ref!r} cannot be read as a causal language model: {error}"
        raise UsageError(
            problem, "Name a checkpoint with tokenizer that transformers knows without code of its own."
        ) from error
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return Backbone(
        tokenizer, model.to(place).eval(), place, _context(model.config, tokenizer), _ends(model, tokenizer)
    )


def load_tokenizer(ref: str) -> PromptTokenizer:
    """Load the tokenizer of the checkpoint at a folder or hub name, without the model's weights.

    Raises UsageError as `load_backbone` does.
    """
    from transformers import AutoTokenizer

    folder = resolve_checkpoint(ref)
    try:
        return PromptTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # as above
        raise UsageError(
            f"{ref!r} has no tokenizer that can be read: {error}",
            "Name a checkpoint with tokenizer that transformers knows.",
        ) from error


def read_context(ref: str) -> int:
    """The largest number of tokens of prompt and answer together, for the checkpoint at a folder or hub name.

    Reads no weights. Raises UsageError as `load_backbone` does.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(ref).tokenizer
    try:
        config = AutoConfig.from_pretrained(resolve_checkpoint(ref), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise UsageError(f"{ref!r} cannot be read: {error}", "Name a checkpoint that transformers knows.") from error
    return _context(config, tokenizer)


def _context(config: Any, tokenizer: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(limit or 10**9, tokenizer.model_max_length)


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    named = model.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return tuple(sorted(ends - {None}))
