"""A model whose numbers are damaged answers nothing, says so of every prompt it concerns, and the others' answers stay."""

from __future__ import annotations

import math

import pytest
import torch

from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome
from raypipe.engines.transformers import TransformersEngine
from raypipe.language.prompt import Prompt

PROMPTS = [Prompt.of(f"{start} Lily " * times) for start in ("Once", "a girl", "") for times in (1, 2, 5, 11)]
DAMAGED = [1, 3, 4, 11]
DECODINGS = [
    Decoding(max_new_tokens=20),
    Decoding(max_new_tokens=20, temperature=1),
    Decoding(max_new_tokens=20, beams=3),
]


@pytest.fixture
def built(random_lm: str, request: pytest.FixtureRequest) -> TransformersEngine:
    found = EngineConfig(lm=random_lm, device="cpu", threads=1, batch_tokens=getattr(request, "param", 30_000)).build()
    assert isinstance(found, TransformersEngine)
    return found


def damage(built: TransformersEngine, sound: list[Outcome]) -> str:
    """A word of which the model has no number from now on, and which none of these answers and no other prompt holds."""
    tokenizer = built.backbone.tokenizer
    used = {token for text in built.backbone.encode([prompt.text for prompt in PROMPTS]) for token in text}
    read = {character for outcome in sound for character in outcome.text}
    token, word = next(
        (token, word)
        for token in range(len(tokenizer))
        if token not in used and (word := tokenizer.decode([token])).isalpha() and word.isascii() and not {*word} & read
    )
    assert built.backbone.encode([word])[0][-1] == token
    forget(built, token)
    return word


def forget(built: TransformersEngine, token: int) -> None:
    """The token is read as no number. Its weights stay: they may also be those that it is written with."""

    def forgotten(_: torch.nn.Module, read: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        return embedded.masked_fill((read[0] == token)[..., None], math.nan)

    built.backbone.model.get_input_embeddings().register_forward_hook(forgotten)


def answers(
    built: TransformersEngine, prompts: list[Prompt], decoding: Decoding, choices: Choices | None = None
) -> list[Outcome]:
    return sorted(built.generate(prompts, decoding, choices), key=lambda outcome: outcome.index)


@pytest.mark.parametrize("built", [1, 300, 30_000], indirect=True)
@pytest.mark.parametrize("choices", [None, Choices(("a little girl", "Lily was", "a dog"), "; ", 2)])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_damaged_prompt_is_an_error_in_its_row_and_leaves_the_others_theirs(
    built: TransformersEngine, decoding: Decoding, choices: Choices | None
) -> None:
    expected = answers(built, PROMPTS, decoding, choices)
    mark = damage(built, expected)
    asked = [Prompt.of(f"{mark} {prompt.text}") if at in DAMAGED else prompt for at, prompt in enumerate(PROMPTS)]
    found = answers(built, asked, decoding, choices)
    for at, (outcome, sound) in enumerate(zip(found, expected, strict=True)):
        if at in DAMAGED:
            assert outcome.error is not None
            assert (outcome.error.kind, outcome.text, outcome.beams) == ("not_finite", "", ())
            assert "choose float32" in outcome.error.message
        else:
            assert (outcome.error, outcome.text) == (None, sound.text)


def test_an_answer_that_breaks_half_way_is_none(built: TransformersEngine) -> None:
    decoding = Decoding(max_new_tokens=20)
    *grown, whole = built.stream(PROMPTS[:1], decoding)
    # ASCII characters are tokens of their own: the last one that the answer holds none of before.
    half = grown[9].text
    character = next(each for each in whole.text[len(half) :] if each.isascii() and each not in half)
    forget(built, built.backbone.encode([character])[0][-1])
    (broken,) = built.generate(PROMPTS[:1], decoding)
    assert broken.error is not None
    assert (broken.error.kind, broken.text) == ("not_finite", "")
    assert 9 < broken.tokens_out < 20
    *_, last = built.stream(PROMPTS[:1], decoding)
    assert last == broken


def test_scores_of_a_damaged_prompt_are_none_and_no_decision(built: TransformersEngine) -> None:
    mark = damage(built, [])
    asked = [*PROMPTS[:3], Prompt.of(f"{mark} Lily")]
    found = sorted(built.score(asked, [("Yes", "No")] * 4), key=lambda scores: scores.index)
    assert [scores.error and scores.error.kind for scores in found] == [None, None, None, "not_finite"]
    assert [len(scores.logprobs) for scores in found] == [2, 2, 2, 0]
