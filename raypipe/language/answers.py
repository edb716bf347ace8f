"""Answers that a model is asked to choose between, as its tokenizer spells them after a prompt.

Not covered, and refused: tokenizers that put a space before every text, such as Llama 2's. They spell an answer by
itself with one space more than after a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from raypipe.language.backbone import PromptTokenizer
from raypipe.language.trie import answer_tokens


def telling_beginnings(tokenizer: PromptTokenizer, prompt: str, answers: Sequence[str]) -> list[str]:
    """The beginning of each answer up to the first token in which the answers differ.

    That is mostly its first token, which often is the whole answer. The beginning is longer if it would not be a text
    by itself. A softmax over the likelihoods of these beginnings is the choice. Raises ValueError if an answer is the
    beginning of another, if the tokenizer spells an answer differently after the prompt's last token than by itself, or
    if it spells no beginning of an answer by itself.
    """
    ids = answer_tokens(tokenizer, answers)
    for answer, mine in zip(answers, ids, strict=True):
        if tokenizer.continued(prompt, f" {answer}") != mine:
            raise ValueError(f"The tokenizer spells {answer!r} in another way after the prompt than by itself.")
    alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False)))
    if min(map(len, ids)) == alike:
        raise ValueError(f"The tokenizer cannot tell {' and '.join(map(repr, answers))} apart where they begin.")
    return [_beginning(tokenizer, mine, alike + 1) for mine in ids]


def _beginning(tokenizer: PromptTokenizer, ids: Sequence[int], least: int) -> str:
    """The shortest text made of the first `least` tokens or more; a lone space or part of a character is not a text."""
    for count in range(least, len(ids) + 1):
        (text,) = tokenizer.decode([ids[:count]])
        if text and answer_tokens(tokenizer, [text]) == [list(ids[:count])]:
            return text
    raise ValueError(f"The tokenizer spells no beginning of {tokenizer.decode([ids])[0]!r} by itself.")
