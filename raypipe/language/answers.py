"""Answers that a model is asked to choose between, as its tokenizer spells them after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from raypipe.language.backbone import PromptTokenizer
from raypipe.language.trie import answer_tokens


def telling_beginnings(tokenizer: PromptTokenizer, prompt: str, answers: Sequence[str]) -> list[str]:
    """The beginning of each answer up to the token that no other has there: mostly its first, which often is all of it.

    A softmax over these tokens' logits is the choice. Raises ValueError where an answer is the beginning of another, and where
    the tokenizer spells one in another way after the prompt's last token than by itself.
    """
    ids = answer_tokens(tokenizer, answers)
    for answer, mine in zip(answers, ids, strict=True):
        if tokenizer.continued(prompt, f" {answer}") != mine:
            raise ValueError(f"The tokenizer spells {answer!r} in another way after the prompt than by itself.")
    alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False)))
    starts = [mine[: alike + 1] for mine in ids]
    beginnings = tokenizer.decode(starts)
    if len({tuple(start) for start in starts}) < len(answers) or min(map(len, starts)) == alike:
        raise ValueError(f"The tokenizer cannot tell {' and '.join(map(repr, answers))} apart where they begin.")
    if answer_tokens(tokenizer, beginnings) != starts:
        raise ValueError(f"The tokenizer spells no beginning of {' and '.join(map(repr, answers))} by itself.")
    return beginnings
