"""Prompts as token ids, for engines that run a model in this process: what fits goes on, what does not is an outcome."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.engines.engine import Decoding, Outcome, OutcomeError
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.prompt import Prompt


def encode_prompts(
    tokenizer: PromptTokenizer, prompts: Sequence[Prompt], decoding: Decoding, context: int
) -> tuple[dict[int, list[int]], list[Outcome]]:
    """The token ids of the prompts that can be answered, by index in order, and the outcomes of the others."""
    readable = [index for index, prompt in enumerate(prompts) if not prompt.has_vectors]
    encoded = dict(zip(readable, tokenizer.encode([prompts[i].text for i in readable]), strict=True))
    refused = []
    for index in range(len(prompts)):
        tokens = encoded.get(index)
        if (error := _refusal(tokens, decoding, context)) is not None:
            refused.append(Outcome(index, tokens_in=len(tokens or ()), error=error))
            encoded.pop(index, None)
    return encoded, refused


def _refusal(tokens: list[int] | None, decoding: Decoding, context: int) -> OutcomeError | None:
    if tokens is None:
        return OutcomeError("unsupported_prompt", "This engine reads text only.")
    if not tokens:
        return OutcomeError("unsupported_prompt", "The prompt holds no token.")
    if len(tokens) + decoding.max_new_tokens > context:
        message = f"{len(tokens)} tokens and {decoding.max_new_tokens} of answer exceed the context of {context}."
        return OutcomeError("prompt_too_long", message)
    return None
