"""RecInterpreter (arXiv 2310.20487): a language model reads a recommender's hidden state in words.

Two exercises join them (section 3.3). Recovery: from one soft token of the state after a history, its last titles in order.
Residual: from two, the states before and after one event, the title of that event. For DreamRec the same reading of what lies
between two vectors puts a generated item into words (`oracle_prompt`). Templates of training and of tests are disjoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Text, Vectors
from raypipe.language.soft_prompts import SoftExample
from raypipe.metrics.recovery import recovered, recovered_places, rouge_l, titles_in, valid_ratio

SOURCE = "state"
SEPARATOR = "; "
_MARK = "{state}"

_RECOVERY = (
    "The history of this person is {state}. The films chosen, oldest first:",
    "{state} stands for what somebody chose. In order, that was:",
    "List the titles behind {state}, oldest first:",
)
_RECOVERY_TEST = ("Somebody's past is {state}. Name what was chosen, oldest first:",)
_RESIDUAL = (
    "Before: {state}. After: {state}. What was chosen in between is:",
    "A choice turned {state} into {state}. Its title:",
    "From {state} to {state} by choosing:",
)
_RESIDUAL_TEST = ("First {state}, then {state}. The one title chosen meanwhile:",)


class InterpreterPrompts(Config):
    """The templates, of which each mark {state} is one vector; those of the test are never trained on."""

    recovery: tuple[str, ...] = shaping(_RECOVERY, "one mark each", min_length=1)
    recovery_test: tuple[str, ...] = shaping(_RECOVERY_TEST, "one mark each", min_length=1)
    residual: tuple[str, ...] = shaping(_RESIDUAL, "two marks each", min_length=1)
    residual_test: tuple[str, ...] = shaping(_RESIDUAL_TEST, "two marks each", min_length=1)

    @model_validator(mode="after")
    def _marks_and_no_template_twice(self) -> InterpreterPrompts:
        for marks, templates in (
            (1, (*self.recovery, *self.recovery_test)),
            (2, (*self.residual, *self.residual_test)),
        ):
            for template in templates:
                if template.count(_MARK) != marks:
                    raise ValueError(f"the template {template!r} needs {_MARK} {marks} times")
            if len(set(templates)) < len(templates):
                raise ValueError("a template of the tests is one of the training's, or stands there twice")
        return self


class InterpreterConfig(Config):
    """What is read, from which states, and how they become tokens."""

    titles: int = shaping(10, "last events of a history that recovery names", ge=1)
    pool: Literal["last", "learned_positions"] = shaping(
        "last", "the state after the last event, or as released a learned sum of the states after each of these"
    )
    projector: Literal["linear", "mlp", "qformer"] = shaping("linear", "as published; the others for comparison")
    tokens: int = shaping(1, "tokens that a qformer makes of one state", ge=1)
    prompts: InterpreterPrompts = shaping(InterpreterPrompts)

    @property
    def projectors(self) -> dict[str, ProjectorConfig]:
        """By source of vectors; one projector reads the states of both exercises."""
        pool = "each" if self.pool == "last" else self.pool
        return {SOURCE: ProjectorConfig(kind=self.projector, pool=pool, positions=self.titles, tokens=self.tokens)}

    def vectors(self, states: NDArray[np.float32], events: int) -> Vectors:
        """What stands for a history of so many events in a prompt; `states` [≥ events, width], after each event."""
        first = events - 1 if self.pool == "last" else max(0, events - self.titles)
        return Vectors(np.ascontiguousarray(states[first:events]), SOURCE)

    def states_needed(self, events: int) -> range:
        """After how many events the states are needed that the two exercises at `events` are made of."""
        first = events if self.pool == "last" else events - self.titles + 1
        return range(max(1, first - 1), events + 1)


def recovery_prompt(template: str, state: Vectors) -> Prompt:
    return _filled(template, state)


def residual_prompt(template: str, before: Vectors, after: Vectors) -> Prompt:
    return _filled(template, before, after)


def oracle_prompt(template: str, before: Vectors, oracle: NDArray[np.float32]) -> Prompt:
    """The residual's prompt with a generated item vector [width] in the place of the state after (section 3.4)."""
    return _filled(template, before, Vectors(oracle[None], SOURCE))


def examples(
    items: Sequence[int],
    states: NDArray[np.float32],
    titles: Sequence[str],
    config: InterpreterConfig,
    positions: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[SoftExample]:
    """Both exercises at each of `positions`, numbers of events of one history read so far (from 1; residual from 2).

    `items` are the history's item indices (1…n), `states` [events, width] those after each event, `titles` by index − 1.
    """
    prompts = config.prompts
    for events in positions:
        after = config.vectors(states, events)
        template = prompts.recovery[rng.integers(len(prompts.recovery))]
        yield SoftExample(recovery_prompt(template, after), recovery_answer(items[:events], titles, config))
        if events > 1:
            template = prompts.residual[rng.integers(len(prompts.residual))]
            before = config.vectors(states, events - 1)
            yield SoftExample(residual_prompt(template, before, after), titles[items[events - 1] - 1])


def recovery_answer(items: Sequence[int], titles: Sequence[str], config: InterpreterConfig) -> str:
    """The titles that recovery asks for, oldest first."""
    return SEPARATOR.join(titles[item - 1] for item in items[-config.titles :])


@dataclass(frozen=True)
class Reading:
    """One user to be asked about: the states before and after the last event, the titles behind, and the last one."""

    before: Vectors
    after: Vectors
    history: list[str]
    title: str

    @staticmethod
    def of(
        items: Sequence[int], states: NDArray[np.float32], titles: Sequence[str], config: InterpreterConfig
    ) -> Reading:
        events = len(items)
        history = [titles[item - 1] for item in items[-config.titles :]]
        return Reading(config.vectors(states, events - 1), config.vectors(states, events), history, history[-1])


def questions(readings: Sequence[Reading], config: InterpreterConfig, control: str = "") -> list[Prompt]:
    """Recovery of every reading and then residual, by the test's templates in turn.

    Controls: with "shuffled states" everybody is asked with the next one's, with "no states" with the words alone.
    """
    asked = [*readings[1:], *readings[:1]] if control == "shuffled states" else readings
    recovery, residual = config.prompts.recovery_test, config.prompts.residual_test
    prompts = [recovery_prompt(recovery[at % len(recovery)], mine.after) for at, mine in enumerate(asked)]
    prompts += [residual_prompt(residual[at % len(residual)], mine.before, mine.after) for at, mine in enumerate(asked)]
    return [without_states(prompt) for prompt in prompts] if control == "no states" else prompts


def figures(answers: Sequence[str], readings: Sequence[Reading], known: Collection[str]) -> dict[str, float]:
    """Of answers in the order of `questions`."""
    count = len(readings)
    return {
        **recovery_figures(answers[:count], [mine.history for mine in readings], known),
        **residual_figures(answers[count:], [mine.title for mine in readings], known),
    }


def without_states(prompt: Prompt) -> Prompt:
    """A control: the words of the prompt alone."""
    return Prompt.of("".join(segment.text for segment in prompt.segments if isinstance(segment, Text)))


def recovery_figures(
    answers: Sequence[str], histories: Sequence[Sequence[str]], known: Collection[str]
) -> dict[str, float]:
    """Of answers to recovery, beside the titles asked for, oldest first: means over users.

    `recovery` the share of the titles named, `recovery by place 1` that of the newest event and so on, `order` the share of
    answers that are exactly the titles in order, `valid` the share of what is named that the catalogue has, `rouge_l`.
    """
    named = [titles_in(answer, known, SEPARATOR) for answer in answers]
    figures = {
        "recovery": [recovered(mine, history) for mine, history in zip(named, histories, strict=True)],
        "order": [float(mine == list(history)) for mine, history in zip(named, histories, strict=True)],
        "valid": [valid_ratio(mine, known) for mine in named],
        "rouge_l": [
            rouge_l(answer, SEPARATOR.join(history)) for answer, history in zip(answers, histories, strict=True)
        ],
    }
    places = [recovered_places(mine, history)[::-1] for mine, history in zip(named, histories, strict=True)]
    for place in range(max(map(len, places), default=0)):
        found = [float(mine[place]) for mine in places if place < len(mine)]
        figures[f"recovery by place {place + 1}"] = found
    return {name: float(np.mean(values)) if values else 0.0 for name, values in figures.items()}


def residual_figures(answers: Sequence[str], titles: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Of answers to residual: `residual` the share that are the title exactly, `residual valid` that are any title."""
    given = [answer.strip().removesuffix(".") if answer.strip() not in known else answer.strip() for answer in answers]
    right = [mine == title for mine, title in zip(given, titles, strict=True)]
    return {
        "residual": float(np.mean(right)) if right else 0.0,
        "residual valid": float(np.mean([mine in known for mine in given])) if given else 0.0,
    }


def _filled(template: str, *states: Vectors) -> Prompt:
    pieces = template.split(_MARK)
    segments: list[str | Vectors] = []
    for text, state in zip(pieces, [*states, None], strict=True):
        segments += [text] if text else []
        segments += [state] if state is not None else []
    return Prompt.of(*segments)
