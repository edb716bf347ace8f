"""An answer that is held to given texts is one of them, the one that the model itself prefers word by word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome
from raypipe.engines.transformers import TransformersEngine
from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt
from raypipe.language.trie import answer_tokens
from tests.engines.plain import Plain

HOSTILE = ("A", "A;", "A; B", "B", " ", "…", "🎬 映画", "</s>", "A B", "B; A", "<pad>", "Lily", "Lily Lily")
PROMPTS = [Prompt.of(f"{start} Lily " * times) for start in ("Once", "a girl", "") for times in (1, 2, 5, 11)]


def engine(lm: str, **settings: object) -> TransformersEngine:
    built = EngineConfig.model_validate({"lm": lm, "device": "cpu", "threads": 1, **settings}).build()
    assert isinstance(built, TransformersEngine)
    return built


def answers(
    built: TransformersEngine, choices: Choices, decoding: Decoding, prompts: Sequence[Prompt] = PROMPTS
) -> list[Outcome]:
    return sorted(built.generate(prompts, decoding, choices), key=lambda outcome: outcome.index)


# The real model begins what follows a strange prompt with the only capital letter.
@pytest.mark.parametrize(("lm", "different"), [("stories", 1), ("random_lm", 3)])
def test_greedy_answers_are_the_best_next_tokens_of_some_text(
    lm: str, different: int, request: pytest.FixtureRequest
) -> None:
    lm = request.getfixturevalue(lm)
    plain = Plain(lm)
    end = plain.backbone.ends[0]
    spelled = {(*ids, end): text for ids, text in zip(answer_tokens(plain.backbone, HOSTILE), HOSTILE, strict=True)}
    found = answers(engine(lm), Choices(HOSTILE), Decoding())
    for prompt, outcome in zip(PROMPTS, found, strict=True):
        (ids,) = plain.backbone.encode([prompt.text])
        tokens: tuple[int, ...] = ()
        while tokens not in spelled:
            told = plain.next_logprobs(ids, tokens)[-1]
            after = {way[len(tokens)] for way in spelled if way[: len(tokens)] == tokens}
            tokens = (*tokens, max(after, key=lambda token: told[token]))
        assert (outcome.text, outcome.tokens_out) == (spelled[tokens], len(tokens) - 1)
        assert (outcome.chosen, outcome.finish_reason) == ((HOSTILE.index(outcome.text),), "stop")
    assert len({outcome.text for outcome in found}) >= different


@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("most", [1, 4])
def test_answers_stay_among_the_choices_and_no_list_repeats_a_text(
    random_lm: str, most: int, temperature: float
) -> None:
    choices, decoding = Choices(HOSTILE, most=most), Decoding(temperature=temperature, max_new_tokens=90)
    found = answers(engine(random_lm, batch_tokens=700), choices, decoding)
    for outcome in found:
        assert 1 <= len(outcome.chosen) <= most
        assert len(set(outcome.chosen)) == len(outcome.chosen)
        assert (outcome.text, outcome.finish_reason) == (choices.text(outcome.chosen), "stop")
    alone = engine(random_lm)
    assert answers(alone, choices, decoding) == found
    assert [answers(alone, choices, decoding, [prompt])[0].text for prompt in PROMPTS] == [o.text for o in found]


def test_a_list_of_everything_ends(random_lm: str) -> None:
    texts = ("A", "A B", "B")
    found = answers(engine(random_lm), Choices(texts, most=50), Decoding(temperature=30.0))
    assert all(outcome.finish_reason == "stop" for outcome in found)
    assert max(len(outcome.chosen) for outcome in found) == 3


def test_a_list_that_the_limit_cuts_keeps_its_whole_texts(random_lm: str) -> None:
    texts = tuple(f"{word} {number}" for number in range(40) for word in ("Lily", "girl"))
    choices = Choices(texts, most=80)
    found = answers(engine(random_lm), choices, Decoding(max_new_tokens=12, temperature=2.0))
    assert "length" in {outcome.finish_reason for outcome in found}
    for outcome in found:
        assert outcome.chosen
        assert outcome.text == choices.text(outcome.chosen)


def test_texts_that_do_not_fit_into_an_answer_are_refused_before_work_starts(random_lm: str) -> None:
    built = engine(random_lm)
    choices = Choices(("A", "Lily " * 9))
    with pytest.raises(UsageError, match="The longest text takes") as told:
        next(built.generate(PROMPTS, Decoding(max_new_tokens=9), choices))
    needed = int(told.value.remedy.split()[3])
    assert answers(built, choices, Decoding(max_new_tokens=needed))[0].finish_reason == "stop"


def test_any_end_mark_ends_a_choice(random_lm: str) -> None:
    built = engine(random_lm)
    others = tuple(range(100, 130))
    built.backbone = replace(built.backbone, ends=(0, *others))
    plain = Plain(random_lm)
    (ids,) = plain.backbone.encode([PROMPTS[0].text])
    (answer,) = answer_tokens(plain.backbone, ["A"])
    (outcome,) = answers(built, Choices(("A", "B")), Decoding(beams=2), PROMPTS[:1])
    told = plain.next_logprobs(ids, answer)
    expected = plain.logprob(ids, answer) + float(told[-1, [0, *others]].logsumexp(0))
    assert {beam.text: beam.logprob for beam in outcome.beams}["A"] == pytest.approx(expected, abs=1e-4)
    assert answers(built, Choices(("A", "B")), Decoding())[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("texts", "separator", "most", "told"),
    [
        ((), "; ", 1, "none is empty"),
        (("A", ""), "; ", 1, "none is empty"),
        (("A", "B", "A"), "; ", 1, "given twice"),
        (("A",), "", 2, "separator"),
        (("A",), "; ", 0, "one text"),
    ],
)
def test_choices_that_are_none_are_refused(texts: tuple[str, ...], separator: str, most: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Choices(texts, separator, most)
