"""What asks the language model while its processes are full, late, gone or dying in the middle of a sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raypipe.engines.engine import Outcome
from raypipe.language.prompt import Prompt
from raypipe.serving.conversation import Conversation, SoFar
from raypipe.serving.language import Failed, Key, Write
from raypipe.serving.queries import ExplainQuery, Summaries
from raypipe.serving.service import RefusedQueryError
from raypipe.serving.speaker import Remote
from raypipe.serving.telling import Question

KEY, TASK = Key("lm", "recexplainer-h/1"), Write(Prompt.of("?"))
TOLD = Summaries(user_id=None, summaries={}, served={"release": "r", "night": None})


class Processes:
    """Stands for a handle of Ray Serve: each call meets the next of these, an error or what is told before one."""

    def __init__(self, *behaviours: Any) -> None:
        self.left = list(behaviours)
        self.asked: list[dict[str, Any]] = []

    def options(self, **options: Any) -> Processes:
        self.asked.append(options)
        return self

    ask = property(lambda self: self)
    stream = property(lambda self: self)

    def remote(self, *_: Any) -> Any:
        behaviour = self.left.pop(0)
        return behaviour()


def raising(error: Exception) -> Callable[[], Any]:
    async def one() -> None:
        raise error

    return one


def answering(value: Any) -> Callable[[], Any]:
    async def one() -> Any:
        return value

    return one


def telling(*parts: Any) -> Callable[[], AsyncIterator[Any]]:
    async def many() -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return many


async def slow() -> None:
    await asyncio.sleep(60)


def ask(*behaviours: Any, wait_s: float = 30.0) -> Any:
    return asyncio.run(Remote(Processes(*behaviours)).ask(KEY, TASK, time.time() + wait_s))  # type: ignore[arg-type]


def test_a_question_whose_process_dies_is_asked_again() -> None:
    died, outcome = raising(ActorDiedError()), Outcome(0, "words")
    assert ask(died, died, answering(outcome)) == outcome
    assert ask(died, died, died) == Failed("not_ready", "The language model is being started: ask again later.")
    processes = Processes(answering(outcome))
    asyncio.run(Remote(processes).ask(KEY, TASK, time.time() + 30))  # type: ignore[arg-type]
    assert processes.asked == [{"multiplexed_model_id": "recexplainer-h/1@lm"}]


def test_a_key_is_read_as_it_was_written() -> None:
    keys = {
        "@lm": Key("lm"),
        "recexplainer-h/1@lm": KEY,
        "7:lancer/2@org/lm:v1": Key("org/lm:v1", "lancer/2", 7),
        "0:lancer/2@lm": Key("lm", "lancer/2", 0),
        "a:b/2@lm": Key("lm", "a:b/2"),
    }
    assert {str(key): Key.parse(str(key)) for key in keys.values()} == keys


def test_who_is_full_late_or_gone_says_so() -> None:
    assert ask(raising(BackPressureError(1, 1))).code == "busy"
    assert ask(raising(DeploymentUnavailableError(None))).code == "not_ready"
    assert ask(slow, wait_s=0.05).code == "deadline"


def test_a_sentence_that_dies_in_the_middle_is_begun_anew() -> None:
    """With the same words: they follow from the question alone."""
    pieces = [SoFar("yes", "be"), SoFar("yes", "because")]
    outcome = Outcome(0, "because it fits")

    async def events() -> list[Any]:
        speaking = Remote(
            Processes(telling(*pieces, ActorDiedError()), telling(*pieces, SoFar("yes", "because it fits"), outcome))  # type: ignore[arg-type]
        )

        async def make(queries: Any) -> list[Any]:
            return [Question(KEY, TASK, lambda result: TOLD)]

        conversation = Conversation(speaking, 30.0, make)
        return [event async for event in await conversation.stream(ExplainQuery(user_id="u1"))]

    assert asyncio.run(events()) == [
        ("decision", {"decision": "yes"}),
        ("text", {"text": "be"}),
        ("text", {"text": "cause"}),
        ("again", {}),
        ("text", {"text": "be"}),
        ("text", {"text": "cause"}),
        ("text", {"text": " it fits"}),
        ("done", TOLD.model_dump()),
    ]


def test_a_stream_ends_with_the_reason_where_it_cannot_go_on() -> None:
    async def events() -> list[Any]:
        async def refuse(queries: Any) -> list[Any]:
            def answer(result: Any) -> Any:
                raise RefusedQueryError(result.code, result.message)

            return [Question(KEY, TASK, answer)]

        speaking = Remote(Processes(telling(SoFar("no", "be"), BackPressureError(1, 1))))  # type: ignore[arg-type]
        conversation = Conversation(speaking, 30.0, refuse)
        return [event async for event in await conversation.stream(ExplainQuery(user_id="u1"))]

    assert [name for name, _ in asyncio.run(events())] == ["decision", "text", "error"]
