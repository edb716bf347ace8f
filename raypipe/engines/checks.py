"""Checks of answers, and a second try for answers that fail them.

An answer is asked for again if it is empty, declines the task, does not end, is longer than anybody would read, or is
no text at all. The second try is sampled, at a temperature and with a seed of its own, so that a greedy model does not
repeat itself. An answer that still fails carries the reason as its error. All of this follows from the prompt and the
answer alone, never from the batch. An answer that is held to given texts is not checked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from raypipe.config import Config, shaping
from raypipe.engines.engine import Choices, Decoding, Engine, Outcome, OutcomeError, Piece, Scores
from raypipe.language.prompt import Prompt

# Errors that another try may mend; all others would come again.
_RETRIED = {"empty_output", "declined", "unended", "too_long", "malformed"}
_LOOP_WORDS, _LOOP_TIMES = 5, 4
# Control characters that are no space, and the replacement character for what could not be decoded.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufffd]")


class AnswerChecks(Config):
    """When an answer counts as none, and how often it is then asked for again."""

    retries: int = shaping(1, "second tries of an answer that is none", ge=0)
    temperature: float = shaping(0.7, "of a second try", ge=0)
    declines: tuple[str, ...] = shaping(
        ("I cannot", "I can't", "I can’t", "I'm sorry", "I’m sorry", "I am sorry", "I'm unable", "As an AI"),
        "beginnings of answers that decline the task, in any case",
    )
    most_characters: int = shaping(4000, "of an answer", ge=1)
    must_end: bool = shaping(False, "an answer that reached its token limit is none")

    def problem(self, outcome: Outcome, prompt: Prompt) -> OutcomeError | None:
        """Why the outcome is no answer to `prompt`; None if it is one."""
        if outcome.error is not None:
            return outcome.error
        text = outcome.text.strip()
        if not text:
            return OutcomeError("empty_output", "The model wrote nothing.")
        starts, longest = _folded(self.declines)
        if text[:longest].casefold().startswith(starts):
            return OutcomeError("declined", f"The model declined: {_shown(text)}.")
        if len(text) > self.most_characters:
            message = f"The answer has {len(text):,} characters, more than {self.most_characters:,}: {_shown(text)}."
            return OutcomeError("too_long", message)
        if self.must_end and outcome.finish_reason == "length":
            return OutcomeError("unended", f"The answer reached its token limit: {_shown(text)}.")
        # Characters that already stand in the prompt may be repeated: titles come in every state.
        if (signs := _NO_TEXT.findall(text)) and any(sign not in prompt.words for sign in signs):
            return OutcomeError("malformed", f"The answer holds what is no text: {_shown(text)}.")
        if _loops(text):
            return OutcomeError("malformed", f"The answer goes round in circles: {_shown(text)}.")
        return None


class CheckedEngine:
    """Checks the answers of an engine; implements `Engine`. Outcomes count the tokens and calls of all tries."""

    def __init__(self, engine: Engine, checks: AnswerChecks) -> None:
        self.engine, self.checks = engine, checks
        self.capabilities, self.context = engine.capabilities, engine.context

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        return self.engine.score(prompts, answers)

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        if choices is not None:
            yield from self.engine.generate(prompts, decoding, choices)
            return
        for outcome in self._checked(self.engine.generate, prompts, decoding):
            assert isinstance(outcome, Outcome)
            yield outcome

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        """As the engine's `stream`. An answer that is asked for again starts over."""
        return self._checked(self.engine.stream, prompts, decoding)

    def _checked(
        self,
        ask: Callable[[Sequence[Prompt], Decoding], Iterator[Piece | Outcome]],
        prompts: Sequence[Prompt],
        decoding: Decoding,
    ) -> Iterator[Piece | Outcome]:
        spent: dict[int, Outcome] = {}
        left: Sequence[int] = range(len(prompts))
        for attempt in range(self.checks.retries + 1):
            again: list[int] = []
            for outcome in ask([prompts[index] for index in left], self._decoding(decoding, attempt)):
                if isinstance(outcome, Piece):
                    yield replace(outcome, index=left[outcome.index])
                    continue
                whole = _added(outcome, left[outcome.index], spent[left[outcome.index]]) if attempt else outcome
                problem = self.checks.problem(whole, prompts[whole.index])
                if problem is None:
                    yield whole
                elif problem.kind in _RETRIED and attempt < self.checks.retries:
                    spent[whole.index] = whole
                    again.append(whole.index)
                else:
                    yield replace(whole, text="", beams=(), error=problem)
            left = sorted(again)
            if not left:
                return

    def _decoding(self, decoding: Decoding, attempt: int) -> Decoding:
        if not attempt:
            return decoding
        temperature = max(decoding.temperature, self.checks.temperature)
        return decoding.model_copy(update={"temperature": temperature, "seed": decoding.seed + attempt, "beams": 1})


def _added(outcome: Outcome, index: int, before: Outcome) -> Outcome:
    """The outcome as that of prompt number `index`, with the tokens and calls of an earlier try added."""
    return replace(
        outcome,
        index=index,
        tokens_in=outcome.tokens_in + before.tokens_in,
        tokens_out=outcome.tokens_out + before.tokens_out,
        calls=outcome.calls + before.calls,
    )


@lru_cache
def _folded(starts: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The beginnings with case folded, and how many characters of a text the longest of them needs."""
    return tuple(start.casefold() for start in starts), max(map(len, starts), default=0)


def _shown(text: str) -> str:
    return repr(text[:80])


def _loops(text: str) -> bool:
    """Whether the same five words in a row occur four times."""
    words = text.split()
    if len(words) < _LOOP_WORDS * _LOOP_TIMES:
        return False
    runs = Counter(tuple(words[at : at + _LOOP_WORDS]) for at in range(len(words) - _LOOP_WORDS + 1))
    return max(runs.values()) >= _LOOP_TIMES
