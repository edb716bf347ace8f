"""Answers are told apart by the tokens that really follow a prompt, or the tokenizer is refused."""

from __future__ import annotations

import pytest

from raypipe.language.answers import telling_beginnings
from raypipe.language.backbone import PromptTokenizer, load_backbone
from raypipe.language.builtin import train_tokenizer
from raypipe.language.trie import answer_tokens

PROMPT = "Does it fit? Answer:"


def tokenizer(*values: str) -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer([PROMPT] * 3, [*values], [], 400))


def test_answers_of_one_token_tell_themselves() -> None:
    mine = tokenizer("yes", "no")
    assert telling_beginnings(mine, PROMPT, ("yes", "no")) == ["yes", "no"]
    whole = mine.encode([f"{PROMPT} yes"])[0]
    assert whole == [*mine.encode([PROMPT])[0], *answer_tokens(mine, ["yes"])[0]]


def test_of_longer_ones_what_they_differ_in_tells() -> None:
    mine = tokenizer()  # spells them by letters, of which the first is a space
    assert telling_beginnings(mine, PROMPT, ("yes", "no")) == ["y", "n"]
    (yes, no) = answer_tokens(mine, ["y", "n"])
    assert yes[:-1] == no[:-1]


def test_a_lone_space_is_no_beginning() -> None:
    """Where one answer's first token is a space, and the other's a space and a letter, they differ in it."""
    mine = PromptTokenizer(train_tokenizer([PROMPT, *[" y"] * 9], [], [], 400))
    (yes, no) = answer_tokens(mine, ["yes", "no"])
    assert len(yes) < 4
    assert mine.decode([no[:1]]) == [""]
    assert telling_beginnings(mine, PROMPT, ("yes", "no")) == ["y", "n"]


def test_answers_that_begin_alike_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot tell 'yes' and 'yesterday' apart"):
        telling_beginnings(tokenizer(), PROMPT, ("yes", "yesterday"))


def test_a_tokenizer_that_joins_the_answer_to_the_prompt_is_refused() -> None:
    joining = tokenizer()
    joining.tokenizer.add_tokens([": yes"])
    with pytest.raises(ValueError, match="another way"):
        telling_beginnings(joining, PROMPT, ("yes", "no"))


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused(stories: str) -> None:
    """Its answers would be learnt, and scored, with a space more than the prompt is followed by."""
    backbone = load_backbone(stories, device="cpu")
    (yes,) = answer_tokens(backbone, ["yes"])
    assert yes[1:] == backbone.continued(PROMPT, " yes")
    with pytest.raises(ValueError, match="another way"):
        telling_beginnings(backbone, PROMPT, ("yes", "no"))
