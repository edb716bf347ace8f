"""Encodes prompts as token ids, for engines that run a model in this process; prompts that do not fit are outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raypipe.engines.engine import Outcome, OutcomeError
from raypipe.language.adapters import AdapterCard
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.prefixes import PREFIX, split_prefix
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import Encoded, encode


def encode_prompts(
    tokenizer: PromptTokenizer,
    prompts: Sequence[Prompt],
    room: Sequence[int],
    context: int,
    adapter: AdapterCard | None = None,
) -> tuple[dict[int, Encoded], list[Outcome]]:
    """The prompts that can be answered, by index in order, and the outcomes of the others.

    `room` is the most tokens of each prompt's answer. Only an adapter reads vectors. With an adapter the words are
    encoded in the pieces that a prompt is made of, as in training.
    """
    prefix = None if adapter is None else adapter.config.prefix
    bare = prefix is None or not prefix.vectors
    whole = [bare and not prompt.has_vectors and (adapter is None or len(prompt.segments) == 1) for prompt in prompts]
    plain = np.flatnonzero(whole).tolist()
    ids = tokenizer.encode([prompts[index].text for index in plain])
    encoded = {index: Encoded(mine, []) for index, mine in zip(plain, ids, strict=True)}
    refused = []
    standing = prefix.knowledge if prefix is not None and bare else 0  # tokens before every prompt
    for index, prompt in enumerate(prompts):
        error = None
        if not whole[index]:
            if adapter is None:
                error = OutcomeError("unsupported_prompt", "This engine reads text only: it has no adapter.")
            else:
                try:
                    encoded[index] = _encoded(tokenizer, prompt, adapter)
                except ValueError as problem:
                    error = OutcomeError("unsupported_prompt", str(problem))
        tokens = encoded[index].length + standing if index in encoded else 0
        error = error or _refusal(tokens, room[index], context)
        if error is not None:
            refused.append(Outcome(index, tokens_in=tokens, error=error))
            encoded.pop(index, None)
    return dict(sorted(encoded.items())), refused


def _encoded(tokenizer: PromptTokenizer, prompt: Prompt, adapter: AdapterCard) -> Encoded:
    """Encode a prompt for an adapter.

    Raises ValueError if the prompt holds vectors that the adapter does not read, or lacks some that it does read.
    """
    config, widths = adapter.config, adapter.widths
    prefix, rest = split_prefix(prompt)
    most = 0 if config.prefix is None else config.prefix.vectors
    if prefix is None and most:
        raise ValueError("The adapter reads a prefix of vectors, and the prompt does not begin with one.")
    if prefix is None:
        return encode(tokenizer, prompt, config.projectors, widths)
    if not most:
        raise ValueError("There is no prefix of vectors.")
    if prefix.values.shape[1] != widths[PREFIX]:
        raise ValueError(f"A prefix's vectors are {widths[PREFIX]} wide, and not {prefix.values.shape[1]}.")
    last = Vectors(prefix.values[-most:], PREFIX)
    return replace(encode(tokenizer, rest, config.projectors, widths), prefix=last)


def _refusal(tokens: int, room: int, context: int) -> OutcomeError | None:
    if not tokens:
        return OutcomeError("unsupported_prompt", "The prompt holds no token.")
    if tokens + room > context:
        message = f"{tokens} tokens and {room} of answer exceed the context of {context}."
        return OutcomeError("prompt_too_long", message)
    return None
