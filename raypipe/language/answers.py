"""Answers that a model is asked to choose between, as its tokenizer spells them after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.language.backbone import PromptTokenizer
from raypipe.language.trie import answer_tokens


def telling_beginnings(tokenizer: PromptTokenizer, prompt: str, answers: Sequence[str]) -> list[str]:
    """The beginning of each answer that is its first token, the whole answer where it has no other; all are different.

    Where they stand after a prompt, a softmax over these tokens' logits is the choice. Raises ValueError where answers begin
    alike, and where the tokenizer spells one in another way after the prompt's last token than by itself.
    """
    ids = answer_tokens(tokenizer, answers)
    for answer, mine in zip(answers, ids, strict=True):
        if tokenizer.continued(prompt, f" {answer}") != mine:
            raise ValueError(f"The tokenizer spells {answer!r} in another way after the prompt than by itself.")
    firsts = [mine[:1] for mine in ids]
    beginnings = tokenizer.decode(firsts)
    if len({first[0] for first in firsts}) < len(answers) or answer_tokens(tokenizer, beginnings) != firsts:
        raise ValueError(f"The tokenizer cannot tell {' and '.join(map(repr, answers))} apart by their first tokens.")
    return beginnings
