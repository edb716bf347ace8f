"""A search finds what trying everything finds, in any company, and prompts are read once for all of its beams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome
from raypipe.engines.transformers import TransformersEngine
from raypipe.language.prompt import Prompt
from raypipe.language.trie import answer_tokens
from tests.engines.plain import Plain

TITLES = ("Lily", "Lily and", "a girl", "a girl named Lily", "🎬", "Once; upon", "…", "time")
PROMPTS = [
    Prompt.of(text)
    for text in (
        "Once upon a time",
        "a little girl named Lily",
        "there",
        "was Lily there? " * 6,
        "upon a girl " * 3,
        "little Lily",
        "Lily was a little time",
        "Once there was a girl " * 9,
    )
]


def engine(lm: str, **settings: object) -> TransformersEngine:
    built = EngineConfig.model_validate({"lm": lm, "device": "cpu", "threads": 1, **settings}).build()
    assert isinstance(built, TransformersEngine)
    return built


def answers(
    built: TransformersEngine, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
) -> list[Outcome]:
    return sorted(built.generate(prompts, decoding, choices), key=lambda outcome: outcome.index)


def ending_often(lm: str, **settings: object) -> TransformersEngine:
    """An engine in which every tenth token ends an answer, as likely as all of them together."""
    found = engine(lm, **settings)
    found.backbone = replace(found.backbone, ends=tuple(range(0, 290, 10)))
    return found


def test_enough_beams_rank_all_choices_by_their_exact_probability(random_lm: str) -> None:
    plain = Plain(random_lm)
    built = engine(random_lm)
    tokens = [[*ids, 0] for ids in answer_tokens(plain.backbone, TITLES)]
    found = answers(built, PROMPTS, Decoding(beams=len(TITLES)), Choices(TITLES))
    for prompt, outcome in zip(PROMPTS, found, strict=True):
        (ids,) = plain.backbone.encode([prompt.text])
        exact = {number: plain.logprob(ids, answer) for number, answer in enumerate(tokens)}
        ranked = sorted(exact, key=lambda number: -exact[number])
        assert [beam.chosen for beam in outcome.beams] == [(number,) for number in ranked]
        assert [beam.text for beam in outcome.beams] == [TITLES[number] for number in ranked]
        assert [beam.logprob for beam in outcome.beams] == pytest.approx([exact[n] for n in ranked], abs=1e-4)
        best = outcome.beams[0]
        assert (outcome.text, outcome.chosen, outcome.finish_reason) == (best.text, best.chosen, "stop")
        assert (outcome.tokens_in, outcome.tokens_out) == (len(ids), sum(len(mine) - 1 for mine in tokens))
    assert len({outcome.text for outcome in found}) > 1


def test_lists_are_ranked_by_their_exact_probability(random_lm: str) -> None:
    plain, texts = Plain(random_lm), ("Lily", "girl", "time")
    choices = Choices(texts, most=2)
    lists = [(a,) for a in range(3)] + [(a, b) for a in range(3) for b in range(3) if a != b]
    found = answers(engine(random_lm), PROMPTS[:3], Decoding(beams=12), choices)
    for prompt, outcome in zip(PROMPTS, found, strict=False):
        (ids,) = plain.backbone.encode([prompt.text])
        tokens = answer_tokens(plain.backbone, [choices.text(chosen) for chosen in lists])
        exact = {mine: plain.logprob(ids, [*answer, 0]) for mine, answer in zip(lists, tokens, strict=True)}
        assert [beam.chosen for beam in outcome.beams] == sorted(exact, key=lambda mine: -exact[mine])
        assert [beam.logprob for beam in outcome.beams] == pytest.approx(sorted(exact.values(), reverse=True), abs=1e-4)


def searched(
    plain: Plain, prompt: Sequence[int], count: int, most: int, ends: set[int], deadly: int = -1
) -> list[tuple[float, tuple]]:
    """Beam search as it is written down: log-probability and tokens, those that ended first. Nothing follows a `deadly` token."""
    live, ended = [(0.0, ())], []
    for _ in range(most):
        grown = []
        for logprob, tokens in live:
            if deadly in tokens:
                continue
            told = plain.next_logprobs(prompt, tokens)[-1].tolist()
            ended.append((logprob + math.log(sum(math.exp(told[end]) for end in ends)), tokens))
            grown += [(logprob + more, (*tokens, token)) for token, more in enumerate(told) if token not in ends]
        live = sorted(grown, reverse=True)[:count]
        ended = sorted(ended, reverse=True)[:count]
    return [*ended, *live][:count]


@pytest.mark.parametrize("most", [1, 4])
def test_a_free_search_is_the_one_in_the_books(random_lm: str, most: int) -> None:
    plain, built = Plain(random_lm), ending_often(random_lm)
    found = answers(built, PROMPTS[:4], Decoding(beams=3, max_new_tokens=most))
    for prompt, outcome in zip(PROMPTS, found, strict=False):
        (ids,) = plain.backbone.encode([prompt.text])
        expected = searched(plain, ids, 3, most, set(range(0, 290, 10)))
        assert [beam.text for beam in outcome.beams] == plain.backbone.decode([tokens for _, tokens in expected])
        assert [beam.logprob for beam in outcome.beams] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_a_beam_whose_scores_are_no_numbers_ends_and_the_others_go_on(
    random_lm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, built = Plain(random_lm), ending_often(random_lm)
    ends = set(range(0, 290, 10))
    (ids,) = plain.backbone.encode([PROMPTS[0].text])
    first = plain.next_logprobs(ids, ())[-1].tolist()
    deadly = max(set(range(len(first))) - ends, key=first.__getitem__)
    forward = built.backbone.model.forward

    def broken(**given: torch.Tensor) -> object:
        told = forward(**given)
        if given["input_ids"].shape[1] == 1:
            told.logits[given["input_ids"][:, 0] == deadly] = math.nan
        return told

    monkeypatch.setattr(built.backbone.model, "forward", broken)
    (outcome,) = answers(built, PROMPTS[:1], Decoding(beams=3, max_new_tokens=4))
    expected = searched(plain, ids, 3, 4, ends, deadly)
    assert [beam.text for beam in outcome.beams] == plain.backbone.decode([tokens for _, tokens in expected])
    assert [beam.logprob for beam in outcome.beams] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_what_has_ended_stands_before_what_the_limit_cut(random_lm: str) -> None:
    (outcome,) = answers(engine(random_lm), PROMPTS[:1], Decoding(beams=3, max_new_tokens=4))
    assert (outcome.finish_reason, outcome.tokens_out, len(outcome.beams)) == ("length", 4 * 3, 3)
    assert list(outcome.beams) == sorted(outcome.beams, key=lambda beam: -beam.logprob)
    cut = answers(engine(random_lm), PROMPTS[:1], Decoding(beams=30, max_new_tokens=9), Choices(TITLES[:4], most=4))
    assert len({beam.chosen for beam in cut[0].beams}) == len(cut[0].beams)


@pytest.mark.parametrize("batch_tokens", [1, 300, 2000])
@pytest.mark.parametrize("choices", [None, Choices(TITLES), Choices(TITLES, most=3)])
def test_beams_in_a_batch_are_those_of_each_prompt_alone(
    random_lm: str, batch_tokens: int, choices: Choices | None
) -> None:
    decoding = Decoding(beams=4, max_new_tokens=25)
    alone = ending_often(random_lm) if choices is None else engine(random_lm)
    singles = [answers(alone, [prompt], decoding, choices)[0] for prompt in PROMPTS]
    together = ending_often(random_lm, batch_tokens=batch_tokens) if choices is None else engine(random_lm)
    found = answers(together, PROMPTS, decoding, choices)
    for single, outcome in zip(singles, found, strict=True):
        assert [beam.text for beam in outcome.beams] == [beam.text for beam in single.beams]
        assert [beam.logprob for beam in outcome.beams] == pytest.approx(
            [beam.logprob for beam in single.beams], abs=1e-4
        )
        assert replace(outcome, index=0, beams=()) == replace(single, beams=())
    assert answers(together, PROMPTS, decoding, choices) == found


def test_a_model_whose_cache_slides_searches_as_alone(sliding_lm: str) -> None:
    plain, built = Plain(sliding_lm), engine(sliding_lm)
    tokens = [[*ids, 0] for ids in answer_tokens(plain.backbone, TITLES)]
    found = answers(built, PROMPTS, Decoding(beams=len(TITLES)), Choices(TITLES))
    for prompt, outcome in zip(PROMPTS, found, strict=True):
        (ids,) = plain.backbone.encode([prompt.text])
        exact = [plain.logprob(ids, tokens[beam.chosen[0]]) for beam in outcome.beams]
        assert [beam.logprob for beam in outcome.beams] == pytest.approx(exact, abs=1e-4)
        assert exact == sorted(exact, reverse=True)


def test_a_prompt_is_read_once_for_all_beams_and_rows_stay_within_their_bound(
    random_lm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = engine(random_lm, batch_tokens=1200)
    read: list[tuple[int, int, int]] = []
    forward = built.backbone.model.forward

    def watched(**given: torch.Tensor) -> object:
        rows, tokens = given["input_ids"].shape
        read.append((rows, tokens, given["position_ids"].max().item()))
        return forward(**given)

    monkeypatch.setattr(built.backbone.model, "forward", watched)
    found = answers(built, PROMPTS, Decoding(beams=5, max_new_tokens=20))
    assert sum(rows for rows, tokens, _ in read if tokens > 1) == len(PROMPTS)
    assert max(rows * (last + 1) for rows, tokens, last in read if tokens == 1) <= 1200
    assert len(found) == len(PROMPTS)


def test_a_prompt_that_does_not_fit_is_an_error_in_its_row_only(random_lm: str) -> None:
    asked = [Prompt.of("Lily " * 600), PROMPTS[0], Prompt.of("")]
    long, short, empty = answers(engine(random_lm), asked, Decoding(beams=2, max_new_tokens=9))
    assert [outcome.error.kind if outcome.error else None for outcome in (long, short, empty)] == [
        "prompt_too_long",
        None,
        "unsupported_prompt",
    ]
    assert (long.text, long.beams, len(short.beams)) == ("", (), 2)


def test_beams_are_never_drawn_and_part_of_the_fingerprint() -> None:
    with pytest.raises(ValidationError, match="searched, not sampled"):
        Decoding(beams=2, temperature=0.5)
    assert Decoding().shaping_values() == {"max_new_tokens": 96, "temperature": 0.0, "seed": 0, "beams": 1}
    assert Decoding(beams=2).shaping_values() == {**Decoding().shaping_values(), "beams": 2}
