"""What is no answer is asked for again and then is an error in its row; what is one is never touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from raypipe.engines.checks import AnswerChecks, CheckedEngine
from raypipe.engines.echo import EchoEngine
from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome, OutcomeError
from raypipe.language.prompt import Prompt


class Scripted(EchoEngine):
    """Answers each prompt by the next of its lines."""

    def __init__(self, scripts: dict[str, list[Outcome | str]]) -> None:
        super().__init__()
        self.scripts = {prompt: list(lines) for prompt, lines in scripts.items()}
        self.asked: list[tuple[tuple[str, ...], Decoding]] = []

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        self.asked.append((tuple(prompt.text for prompt in prompts), decoding))
        for index, prompt in reversed(list(enumerate(prompts))):
            line = self.scripts[prompt.text].pop(0)
            if isinstance(line, str):
                yield Outcome(index, line, 10, 3, "stop")
            else:
                yield Outcome(index, line.text, 10, 3, line.finish_reason, line.error)


def answers(engine: Scripted, **checks: object) -> list[Outcome]:
    checked = CheckedEngine(engine, AnswerChecks.model_validate(checks))
    found = list(checked.generate([Prompt.of(prompt) for prompt in engine.scripts], Decoding(seed=5)))
    return sorted(found, key=lambda outcome: outcome.index)


def test_answers_pass_untouched() -> None:
    engine = Scripted({"a": ["  Likes Drama. \n"], "b": ["Mag 映画 🎬."], "c": ["yes " * 15]})
    assert [outcome.text for outcome in answers(engine)] == ["  Likes Drama. \n", "Mag 映画 🎬.", "yes " * 15]
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (" \n ", "empty_output"),
        ("I'm sorry, but I can't help with that.", "declined"),
        ("As an AI, I have no taste.", "declined"),
        ("word " * 801, "too_long"),
        ("Likes \ufffd\ufffd.", "malformed"),
        ("Likes \x07.", "malformed"),
        ("and she likes more films " * 4, "malformed"),
        (Outcome(0, "Likes Drama and", finish_reason="length"), "unended"),
    ],
)
def test_what_is_no_answer_is_asked_for_again_and_then_an_error(bad: Outcome | str, kind: str) -> None:
    engine = Scripted({"good": ["Fine."], "mended": [bad, "Better."], "hopeless": [bad, bad]})
    good, mended, hopeless = answers(engine, must_end=True)
    assert (good.text, good.calls, good.tokens_in) == ("Fine.", 1, 10)
    assert (mended.text, mended.error, mended.calls, mended.tokens_in, mended.tokens_out) == ("Better.", None, 2, 20, 6)
    assert hopeless.error is not None
    assert (hopeless.error.kind, hopeless.text, hopeless.calls) == (kind, "", 2)
    (first, decoding), (second, again) = engine.asked
    assert (len(first), second) == (3, ("mended", "hopeless"))
    assert (decoding.temperature, decoding.seed) == (0, 5)
    assert (again.temperature, again.seed) == (0.7, 6)


def test_what_another_try_would_not_change_is_not_tried() -> None:
    error = OutcomeError("prompt_too_long", "too long")
    engine = Scripted({"a": [Outcome(0, error=error)]})
    (outcome,) = answers(engine, retries=3)
    assert (outcome.error, outcome.calls) == (error, 1)


def test_an_unended_answer_is_one_unless_said_otherwise() -> None:
    engine = Scripted({"a": [Outcome(0, "Likes Drama and", finish_reason="length")]})
    assert answers(engine)[0].error is None


def test_what_stands_in_the_prompt_may_be_repeated() -> None:
    engine = Scripted({"title: B\ufffdb": ["Likes B\ufffdb."]})
    assert answers(engine)[0].error is None


def test_a_second_try_is_drawn_and_not_searched() -> None:
    engine = Scripted({"a": ["", "Fine."]})
    (outcome,) = CheckedEngine(engine, AnswerChecks()).generate([Prompt.of("a")], Decoding(beams=3))
    assert (outcome.text, outcome.calls) == ("Fine.", 2)
    assert [(decoding.beams, decoding.temperature) for _, decoding in engine.asked] == [(3, 0), (1, 0.7)]


def test_what_is_chosen_or_scored_is_not_checked(random_lm: str) -> None:
    engine = EngineConfig(lm=random_lm, device="cpu").build()
    checked = CheckedEngine(engine, AnswerChecks())
    (outcome,) = checked.generate([Prompt.of("a")], Decoding(), Choices(("I'm sorry",)))
    assert (outcome.text, outcome.error, outcome.calls) == ("I'm sorry", None, 1)
    asked = [Prompt.of("a")], [["yes", "no"]]
    assert list(checked.score(*asked)) == list(engine.score(*asked))
