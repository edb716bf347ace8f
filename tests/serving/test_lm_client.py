"""The client of the language model while its replicas are full, late, gone or dying in the middle of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raypipe.engines.engine import Outcome
from raypipe.errors import RaypipeError
from raypipe.language.prompt import Prompt
from raypipe.serving.config import LanguageOptions, LimitOptions
from raypipe.serving.lm_engines import (
    Failed,
    Generate,
    ModelKey,
    Result,
    Task,
)
from raypipe.serving.lm_handler import LmHandler, PartialExplanation
from raypipe.serving.lm_replica import ServeLmClient
from raypipe.serving.lm_requests import LmRequest
from raypipe.serving.queries import ExplainQuery, SummaryAnswer
from raypipe.serving.served import UnfitError, is_lasting
from raypipe.serving.service import RefusedQueryError

KEY, TASK = ModelKey("lm", "recexplainer-h/1"), Generate(Prompt.of("?"))
ANSWER = SummaryAnswer(user_id=None, summaries={}, served={"release": "r", "night": None})


class Handle:
    """Stands for a handle of Ray Serve: each call meets the next of these, an error or what is streamed before one."""

    def __init__(self, *behaviours: Any) -> None:
        self.left = list(behaviours)
        self.sent: list[dict[str, Any]] = []

    def options(self, **options: Any) -> Handle:
        self.sent.append(options)
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


def streaming(*parts: Any) -> Callable[[], AsyncIterator[Any]]:
    async def many() -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return many


async def slow() -> None:
    await asyncio.sleep(60)


def ask(*behaviours: Any, wait_s: float = 30.0) -> Any:
    return asyncio.run(ServeLmClient(Handle(*behaviours)).ask(KEY, TASK, time.time() + wait_s))  # type: ignore[arg-type]


def test_a_request_whose_replica_dies_is_sent_again() -> None:
    died, outcome = raising(ActorDiedError()), Outcome(0, "words")
    assert ask(died, died, answering(outcome)) == outcome
    assert ask(died, died, died) == Failed("not_ready", "The language model is being started: ask again later.")
    handle = Handle(answering(outcome))
    asyncio.run(ServeLmClient(handle).ask(KEY, TASK, time.time() + 30))  # type: ignore[arg-type]
    assert handle.sent == [{"multiplexed_model_id": "recexplainer-h/1@lm"}]


def test_who_is_full_late_or_gone_says_so() -> None:
    assert ask(raising(BackPressureError(1, 1))).code == "busy"
    assert ask(raising(DeploymentUnavailableError(None))).code == "not_ready"
    assert ask(slow, wait_s=0.05).code == "deadline"


def failed_there() -> RayTaskError:
    """What a handle raises where a batch has raised."""
    told = "Traceback (most recent call last):\nRuntimeError: CUDA error"
    return RayTaskError("ask", told, RuntimeError("CUDA error")).as_instanceof_cause()


def answer_of(result: Result) -> SummaryAnswer:
    if isinstance(result, Failed):
        raise RefusedQueryError(result.code, result.message)
    return ANSWER


async def build(queries: Any) -> list[Any]:
    return [LmRequest(KEY, TASK, answer_of) for _ in queries]


def test_a_task_at_which_the_language_model_fails_has_no_answer_and_takes_none_from_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert ask(raising(failed_there())) == Failed("internal", "The language model failed at this.")
    assert "CUDA error" in caplog.text

    handle = Handle(answering(Outcome(0, "words")), raising(failed_there()), answering(Outcome(0, "words")))
    lm_handler = LmHandler(ServeLmClient(handle), 30.0, 8, build)  # type: ignore[arg-type]
    found = asyncio.run(lm_handler.answer_all([ExplainQuery(user_id="u1")] * 3))
    assert [getattr(one, "code", "") for one in found] == ["", "internal", ""]


def test_a_check_that_could_not_be_made_is_no_reason_against_a_release() -> None:
    class CheckHandle:
        check = property(lambda self: self)

        def __init__(self, outcome: Any) -> None:
            self.outcome = outcome

        def remote(self, *_: Any) -> Any:
            return self

        def result(self, timeout_s: float) -> str:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

    ServeLmClient(CheckHandle("")).check("r", 1)  # type: ignore[arg-type]
    with pytest.raises(UnfitError, match="does not answer"):
        ServeLmClient(CheckHandle("It does not answer.")).check("r", 1)  # type: ignore[arg-type]
    for error in (ActorDiedError(), TimeoutError(), BackPressureError(1, 1)):
        with pytest.raises(RaypipeError, match="could not be checked") as raised:
            ServeLmClient(CheckHandle(error)).check("r", 1)  # type: ignore[arg-type]
        assert not is_lasting(raised.value)


def test_an_answer_that_dies_in_the_middle_is_begun_anew() -> None:
    """With the same words: they follow from the request alone."""
    pieces = [PartialExplanation("yes", "be"), PartialExplanation("yes", "because")]
    outcome = Outcome(0, "because it fits")

    async def events() -> list[Any]:
        client = ServeLmClient(
            Handle(
                streaming(*pieces, ActorDiedError()),
                streaming(*pieces, PartialExplanation("yes", "because it fits"), outcome),
            )  # type: ignore[arg-type]
        )

        async def build(queries: Any) -> list[Any]:
            return [LmRequest(KEY, TASK, lambda result: ANSWER)]

        lm_handler = LmHandler(client, 30.0, 1, build)
        return [event async for event in await lm_handler.stream(ExplainQuery(user_id="u1"))]

    assert asyncio.run(events()) == [
        ("decision", {"decision": "yes"}),
        ("text", {"text": "be"}),
        ("text", {"text": "cause"}),
        ("again", {}),
        ("text", {"text": "be"}),
        ("text", {"text": "cause"}),
        ("text", {"text": " it fits"}),
        ("done", ANSWER.model_dump()),
    ]


@pytest.mark.parametrize(("error", "code"), [(BackPressureError(1, 1), "busy"), (failed_there(), "internal")])
def test_a_stream_ends_with_the_reason_where_it_cannot_go_on(error: Exception, code: str) -> None:
    async def events() -> list[Any]:
        async def refuse(queries: Any) -> list[Any]:
            def answer(result: Any) -> Any:
                raise RefusedQueryError(result.code, result.message)

            return [LmRequest(KEY, TASK, answer)]

        client = ServeLmClient(Handle(streaming(PartialExplanation("no", "be"), error)))  # type: ignore[arg-type]
        lm_handler = LmHandler(client, 30.0, 1, refuse)
        return [event async for event in await lm_handler.stream(ExplainQuery(user_id="u1"))]

    told = asyncio.run(events())
    assert [name for name, _ in told] == ["decision", "text", "error"]
    assert told[-1][1]["code"] == code


def test_the_requests_of_a_large_batch_leave_room_for_themselves() -> None:
    options = LanguageOptions()
    sent: list[int] = []

    class Full:
        """Takes as much as the deployment: what its replicas work on, and what waits for one."""

        async def ask(self, key: ModelKey, task: Task, until: float) -> Result:
            sent.append(sent[-1] + 1 if sent else 1)
            try:
                if sent[-1] > options.replicas * options.ongoing + options.queued:
                    return Failed("busy", "More is asked than it can answer.")
                await asyncio.sleep(0.01)
                return Outcome(0, "words")
            finally:
                sent.append(sent[-1] - 1)

        def stream(self, key: ModelKey, task: Task, until: float) -> AsyncIterator[PartialExplanation | Result]:
            raise NotImplementedError

    most = LimitOptions().queries
    lm_handler = LmHandler(Full(), 30.0, options.at_once, build)
    found = asyncio.run(lm_handler.answer_all([ExplainQuery(user_id="u1")] * most))
    assert found == [ANSWER] * most
    # Two batches of each replica: one is computed while the next one waits.
    assert max(sent) == 2 * options.batching.size == 64
