"""What asks the language model while its processes are full, late, gone or dying in the middle of a sentence."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raypipe.engines.engine import Outcome
from raypipe.errors import AccessError, RaypipeError, UsageError
from raypipe.language.prompt import Prompt
from raypipe.serving.config import LanguageOptions, LimitOptions, ServiceConfig
from raypipe.serving.conversation import Conversation, SoFar
from raypipe.serving.language import Continue, Continued, Failed, Job, Key, Result, Task, Voice, Write
from raypipe.serving.queries import ExplainQuery, Summaries
from raypipe.serving.served import UnfitError, is_lasting
from raypipe.serving.service import RefusedQueryError
from raypipe.serving.speaker import Remote, Speaker
from raypipe.serving.telling import Question
from raypipe.storage.releases import Release, Releases
from tests.serving.spoken import SHORT

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


class Alone(Speaker):
    """Without Ray Serve, which is told nothing."""

    async def _told(self, key: str) -> str:
        return key


@pytest.fixture
def alone(speaking: str, monkeypatch: pytest.MonkeyPatch) -> Alone:
    monkeypatch.setattr("raypipe.serving.speaker.shut_inner_door", lambda: None)
    return Alone(ServiceConfig(workspace=speaking, language=SHORT))


def keys_of(speaker: Speaker) -> tuple[Release, dict[str, Key]]:
    """The champion, and its keys by the name of the adapter."""
    release = Releases(speaker.language.workspace.store).named("champion")
    assert release is not None
    keys = speaker.language.keys(release, release.catalogue)
    return release, {key.adapter.partition("/")[0]: key for key in keys}


def test_weights_that_are_being_loaded_hold_up_no_others(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    _, keys = keys_of(alone)
    job = Job(Write(Prompt.of("?")), time.time() + 60)
    go_on, load = threading.Event(), alone.language.load

    def slowly(key: Key) -> Voice:
        if key == keys["lancer"]:
            assert go_on.wait(60)
        return load(key)

    monkeypatch.setattr(alone.language, "load", slowly)

    async def both() -> tuple[Result, Result]:
        waiting = asyncio.ensure_future(
            alone._answer(Job(Continue([3, 4], False), time.time() + 60), str(keys["lancer"]))
        )
        await asyncio.sleep(0.05)
        found = await asyncio.wait_for(alone._answer(job, str(keys[""])), 30)
        assert not waiting.done()
        go_on.set()
        return found, await waiting

    words, written = asyncio.run(both())
    assert isinstance(words, Outcome)
    assert words.error is None
    assert isinstance(written, Continued)
    assert len(written.items) > 1


def test_an_engine_that_refuses_a_whole_batch_is_no_error_of_ours(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    _, keys = keys_of(alone)
    alone.language.config = ServiceConfig(
        workspace=alone.language.config.workspace, language={**SHORT, "answer_tokens": 1}
    )
    found = asyncio.run(alone._answer(Job(Continue([3, 4], False), time.time() + 60), str(keys["lancer"])))
    assert found == Failed("not_ready", "The language model of the release cannot be asked.")
    assert "The longest text takes" in caplog.text


def test_a_proof_tells_what_is_unfit_from_what_may_pass(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    release, _ = keys_of(alone)
    errors: list[RaypipeError] = [
        UsageError("The files are not those that were stored."),
        RaypipeError("The object store failed."),
        AccessError("No permission."),
    ]

    def fail(key: Key) -> Voice:
        raise errors.pop(0)

    async def prove() -> str:
        return await alone.prove(release.hash, release.catalogue)

    assert asyncio.run(prove()) == ""
    monkeypatch.setattr(alone.language, "load", fail)
    assert asyncio.run(prove()) == "The files are not those that were stored."
    with pytest.raises(RaypipeError, match="object store failed"):
        asyncio.run(prove())
    with pytest.raises(AccessError, match="No permission"):
        asyncio.run(prove())


def test_a_proof_that_could_not_be_made_is_no_reason_against_a_release() -> None:
    class Handle:
        prove = property(lambda self: self)

        def __init__(self, outcome: Any) -> None:
            self.outcome = outcome

        def remote(self, *_: Any) -> Any:
            return self

        def result(self, timeout_s: float) -> str:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

    Remote(Handle("")).prove("r", 1)  # type: ignore[arg-type]
    with pytest.raises(UnfitError, match="does not answer"):
        Remote(Handle("It does not answer.")).prove("r", 1)  # type: ignore[arg-type]
    for error in (ActorDiedError(), TimeoutError(), BackPressureError(1, 1)):
        with pytest.raises(RaypipeError, match="could not be proven") as raised:
            Remote(Handle(error)).prove("r", 1)  # type: ignore[arg-type]
        assert not is_lasting(raised.value)


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

        conversation = Conversation(speaking, 30.0, 1, make)
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
        conversation = Conversation(speaking, 30.0, 1, refuse)
        return [event async for event in await conversation.stream(ExplainQuery(user_id="u1"))]

    assert [name for name, _ in asyncio.run(events())] == ["decision", "text", "error"]


def test_the_questions_of_a_large_batch_leave_room_for_themselves() -> None:
    options = LanguageOptions()
    asked: list[int] = []

    class Full:
        """Takes as much as the deployment: what its processes work on, and what waits for one."""

        async def ask(self, key: Key, task: Task, until: float) -> Result:
            asked.append(asked[-1] + 1 if asked else 1)
            try:
                if asked[-1] > options.replicas * options.ongoing + options.queued:
                    return Failed("busy", "More is asked than it can answer.")
                await asyncio.sleep(0.01)
                return Outcome(0, "words")
            finally:
                asked.append(asked[-1] - 1)

        def stream(self, key: Key, task: Task, until: float) -> AsyncIterator[SoFar | Result]:
            raise NotImplementedError

    def answer(result: Result) -> Summaries:
        if isinstance(result, Failed):
            raise RefusedQueryError(result.code, result.message)
        return TOLD

    async def make(queries: Any) -> list[Any]:
        return [Question(KEY, TASK, answer) for _ in queries]

    most = LimitOptions().queries
    conversation = Conversation(Full(), 30.0, options.at_once, make)
    found = asyncio.run(conversation.tell_all([ExplainQuery(user_id="u1")] * most))
    assert found == [TOLD] * most
    # Two batches of each process: one is computed while the next one waits.
    assert max(asked) == 2 * options.batching.size == 64
