"""Scores are the log-probabilities of a plain forward pass, and a prompt is read once for all of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from raypipe.engines import scoring
from raypipe.engines.engine import EngineConfig, Scores
from raypipe.engines.transformers import TransformersEngine
from raypipe.language.prompt import Prompt
from raypipe.language.trie import answer_tokens
from tests.engines.plain import Plain

PROMPTS = [Prompt.of(f"{start} Lily " * times) for start in ("Once", "a girl", "") for times in (1, 2, 5, 11)]
ANSWERS = [
    ["Lily", "a girl", "Lily was a little girl named 🎬", " ", "there; was"][: 1 + place % 5]
    for place in range(len(PROMPTS))
]


def engine(lm: str, **settings: object) -> TransformersEngine:
    built = EngineConfig.model_validate({"lm": lm, "device": "cpu", "threads": 1, **settings}).build()
    assert isinstance(built, TransformersEngine)
    return built


def scores(
    built: TransformersEngine, prompts: Sequence[Prompt] = PROMPTS, answers: Sequence[Sequence[str]] = ANSWERS
) -> list[Scores]:
    return sorted(built.score(prompts, answers), key=lambda scores: scores.index)


@pytest.mark.parametrize("lm", ["stories", "random_lm", "sliding_lm"])
@pytest.mark.parametrize("batch_tokens", [1, 400, 30_000])
def test_scores_are_those_of_a_plain_forward_in_float64(
    lm: str, batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(lm)
    plain = Plain(folder)
    for prompt, answers, found in zip(PROMPTS, ANSWERS, scores(engine(folder, batch_tokens=batch_tokens)), strict=True):
        (ids,) = plain.backbone.encode([prompt.text])
        expected = [plain.logprob(ids, answer) for answer in answer_tokens(plain.backbone, answers)]
        assert found.logprobs == pytest.approx(expected, abs=1e-4)
        assert (found.tokens_in, found.error) == (len(ids), None)


def test_few_logits_at_a_time_change_no_score(random_lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine(random_lm)
    found = scores(built)
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 1)
    for one, other in zip(scores(built), found, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_prompt_is_read_once_and_answers_of_one_token_cost_nothing_more(
    stories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = engine(stories)
    read: list[int] = []
    forward = built.backbone.model.forward

    def watched(**given: torch.Tensor) -> object:
        read.append(given["input_ids"].shape[1])
        return forward(**given)

    monkeypatch.setattr(built.backbone.model, "forward", watched)
    words = [f" {word}" for word in ("time", "girl", "was", "she", "yes", "no")]
    prompt = Prompt.of("Once upon a")
    short = [word for word in (word.strip() for word in words) if len(answer_tokens(built.backbone, [word])[0]) == 1]
    (one,) = scores(built, [prompt], [short or ["a"]])
    assert len(read) == (1 if short else 2)
    read.clear()
    (several,) = scores(built, [prompt], [["time", "time there was"]])
    assert len(read) == 2
    assert read[0] == one.tokens_in
    assert several.logprobs[1] < several.logprobs[0]


@pytest.mark.parametrize("lm", ["stories", "sliding_lm"])
@pytest.mark.parametrize("batch_tokens", [1, 400, 30_000])
def test_questions_that_begin_alike_have_the_scores_they_have_alone(
    lm: str, batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    users = [f"Once upon a time there was a girl {'who had a red ball ' * length}" for length in (1, 4, 2)]
    asked = [Prompt.of(user + end) for end in ("and", "and a park", "in", "and a very big dog") for user in users]
    answers = [["Lily", "a little girl", "yes"][: 1 + place % 3] for place in range(len(asked))]
    built = engine(request.getfixturevalue(lm), batch_tokens=batch_tokens)
    for prompt, mine, found in zip(asked, answers, scores(built, asked, answers), strict=True):
        (alone,) = scores(built, [prompt], [mine])
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_what_the_questions_about_one_user_share_is_read_once(stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine(stories)
    read: list[int] = []
    forward = built.backbone.model.forward

    def watched(**given: torch.Tensor) -> object:
        read.append(given["input_ids"].numel())
        return forward(**given)

    users = [f"{name} had a red ball and liked to play in the park with it" for name in ("Lily", "Tom", "The dog")]
    asked = [Prompt.of(f"{user} and {end}") for user in users for end in ("a", "b", "c", "d", "e")]
    lengths = [len(ids) for ids in built.backbone.encode([prompt.text for prompt in asked])]
    monkeypatch.setattr(built.backbone.model, "forward", watched)
    scores(built, asked, [["yes"]] * len(asked))
    assert sum(read) <= sum(lengths[::5]) + 3 * len(asked) < sum(lengths) / 2


def test_a_prompt_that_does_not_fit_is_an_error_in_its_row_only(random_lm: str) -> None:
    asked = [Prompt.of("Lily " * 600), PROMPTS[0], Prompt.of("")]
    long, short, empty = scores(engine(random_lm), asked, [["A"], ["A", "B"], ["A"]])
    assert [found.error.kind if found.error else None for found in (long, short, empty)] == [
        "prompt_too_long",
        None,
        "unsupported_prompt",
    ]
    assert (long.logprobs, len(short.logprobs)) == ((), 2)


def test_the_context_holds_the_prompt_and_its_longest_answer(random_lm: str) -> None:
    built = engine(random_lm)
    (room,) = (len(ids) for ids in answer_tokens(built.backbone, ["Lily was a girl"]))
    (known,) = scores(built, PROMPTS[:1], [["A"]])
    exact, narrow = (engine(random_lm, context=known.tokens_in + room - less) for less in (0, 1))
    assert scores(exact, PROMPTS[:1], [["A", "Lily was a girl"]])[0].error is None
    assert scores(narrow, PROMPTS[:1], [["A", "Lily was a girl"]])[0].error is not None


@pytest.mark.parametrize("answers", [[], [[]], [["A", ""]], [["A"], ["B"]]])
def test_a_prompt_without_answers_is_a_mistake_of_the_caller(random_lm: str, answers: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="score"):
        list(engine(random_lm).score(PROMPTS[:1], answers))


def test_no_prompts_are_no_scores(random_lm: str) -> None:
    assert scores(engine(random_lm), [], []) == []
