"""The client of the language model while its replicas are full, late, gone or dying in the middle of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raypipe.engines.engine import Outcome, Scores
from raypipe.errors import AccessError, RaypipeError, UsageError
from raypipe.language.prompt import Prompt
from raypipe.serving.config import LanguageOptions, LimitOptions, ServiceConfig
from raypipe.serving.lm_engines import (
    LATE,
    Failed,
    Generate,
    LmEngines,
    LoadedEngine,
    ModelKey,
    PendingTask,
    Rank,
    RankScores,
    Result,
    Task,
    WriteList,
    WrittenList,
)
from raypipe.serving.lm_handler import LmHandler, PartialExplanation
from raypipe.serving.lm_replica import LmReplica, ServeLmClient
from raypipe.serving.lm_requests import LmRequest
from raypipe.serving.queries import ExplainQuery, SummaryAnswer
from raypipe.serving.served import UnfitError, is_lasting
from raypipe.serving.service import RefusedQueryError
from raypipe.storage.releases import Release, Releases
from tests.serving.lm_release import SHORT

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


def test_a_key_is_read_as_it_was_written() -> None:
    keys = {
        "@lm": ModelKey("lm"),
        "recexplainer-h/1@lm": KEY,
        "7:lancer/2@org/lm:v1": ModelKey("org/lm:v1", "lancer/2", 7),
        "0:lancer/2@lm": ModelKey("lm", "lancer/2", 0),
        "a:b/2@lm": ModelKey("lm", "a:b/2"),
    }
    assert {str(key): ModelKey.parse(str(key)) for key in keys.values()} == keys


def test_who_is_full_late_or_gone_says_so() -> None:
    assert ask(raising(BackPressureError(1, 1))).code == "busy"
    assert ask(raising(DeploymentUnavailableError(None))).code == "not_ready"
    assert ask(slow, wait_s=0.05).code == "deadline"


class LmReplicaAlone(LmReplica):
    """Without Ray Serve, which is told nothing."""

    async def _announce(self, key: str) -> str:
        return key


@pytest.fixture
def replica(ready_lm: str, monkeypatch: pytest.MonkeyPatch) -> LmReplicaAlone:
    monkeypatch.setattr("raypipe.serving.lm_replica.disable_grpc_port", lambda: None)
    return LmReplicaAlone(ServiceConfig(workspace=ready_lm, language=SHORT))


def keys_of(replica: LmReplica) -> tuple[Release, dict[str, ModelKey]]:
    """The champion, and its keys by the name of the adapter."""
    release = Releases(replica.engines.workspace.store).named("champion")
    assert release is not None
    keys = replica.engines.keys(release, release.catalogue)
    return release, {key.adapter.partition("/")[0]: key for key in keys}


def test_weights_that_are_being_loaded_hold_up_no_others(
    replica: LmReplicaAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, keys = keys_of(replica)
    pending = PendingTask(Generate(Prompt.of("?")), time.time() + 60)
    go_on, load = threading.Event(), replica.engines.load

    def slowly(key: ModelKey) -> LoadedEngine:
        if key == keys["lancer"]:
            assert go_on.wait(60)
        return load(key)

    monkeypatch.setattr(replica.engines, "load", slowly)

    async def both() -> tuple[Result, Result]:
        waiting = asyncio.ensure_future(
            replica._answer(PendingTask(WriteList([3, 4], False), time.time() + 60), str(keys["lancer"]))
        )
        await asyncio.sleep(0.05)
        found = await asyncio.wait_for(replica._answer(pending, str(keys[""])), 30)
        assert not waiting.done()
        go_on.set()
        return found, await waiting

    words, written = asyncio.run(both())
    assert isinstance(words, Outcome)
    assert words.error is None
    assert isinstance(written, WrittenList)
    assert len(written.items) > 1


def test_an_engine_that_refuses_a_whole_batch_is_no_error_of_ours(
    replica: LmReplicaAlone, caplog: pytest.LogCaptureFixture
) -> None:
    _, keys = keys_of(replica)
    replica.engines.config = ServiceConfig(
        workspace=replica.engines.config.workspace, language={**SHORT, "answer_tokens": 1}
    )
    found = asyncio.run(replica._answer(PendingTask(WriteList([3, 4], False), time.time() + 60), str(keys["lancer"])))
    assert found == Failed("not_ready", "The language model of the release cannot be asked.")
    assert "The longest text takes" in caplog.text


def test_a_replica_whose_batch_hangs_is_not_well_until_it_ends(
    replica: LmReplicaAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, keys = keys_of(replica)
    begun, go_on, answer = threading.Event(), threading.Event(), replica.engines.answer

    def hang(loaded: LoadedEngine, tasks: list[PendingTask]) -> list[Result]:
        begun.set()
        assert go_on.wait(60)
        return answer(loaded, tasks)

    monkeypatch.setattr(replica.engines, "answer", hang)
    replica._stall_s = 0.2

    async def asked() -> None:
        await replica.check_health()
        waiting = asyncio.ensure_future(replica._answer(PendingTask(TASK, time.time() + 60), str(keys[""])))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="A batch has not ended"):
            await replica.check_health()
        go_on.set()
        assert isinstance(await waiting, Outcome)
        await replica.check_health()

    asyncio.run(asked())


def test_a_replica_whose_batches_fail_one_after_the_other_is_not_well(
    replica: LmReplicaAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, keys = keys_of(replica)
    answer, errors = replica.engines.answer, list[Exception]()

    def fail(loaded: LoadedEngine, tasks: list[PendingTask]) -> list[Result]:
        if errors:
            raise errors.pop()
        return answer(loaded, tasks)

    monkeypatch.setattr(replica.engines, "answer", fail)

    async def ask(*raised: Exception) -> None:
        for error in raised:
            errors.append(error)
            with contextlib.suppress(RuntimeError):
                await replica._answer(PendingTask(TASK, time.time() + 60), str(keys[""]))

    async def asked() -> None:
        broken = RuntimeError("CUDA error: an illegal memory access was encountered")
        await ask(broken, broken)
        await replica._answer(PendingTask(TASK, time.time() + 60), str(keys[""]))
        # What raypipe says of a request is no fault of the process.
        await ask(broken, broken, UsageError("Too long."), broken, broken)
        await replica.check_health()
        await ask(broken)
        with pytest.raises(RuntimeError, match="The last 3 batches failed"):
            await replica.check_health()

    asyncio.run(asked())


def test_a_check_tells_what_is_unfit_from_what_may_pass(
    replica: LmReplicaAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, _ = keys_of(replica)
    errors: list[RaypipeError] = [
        UsageError("The files are not those that were stored."),
        RaypipeError("The object store failed."),
        AccessError("No permission."),
    ]

    def fail(key: ModelKey) -> LoadedEngine:
        raise errors.pop(0)

    async def check() -> str:
        return await replica.check(release.hash, release.catalogue)

    assert asyncio.run(check()) == ""
    monkeypatch.setattr(replica.engines, "load", fail)
    assert asyncio.run(check()) == "The files are not those that were stored."
    with pytest.raises(RaypipeError, match="object store failed"):
        asyncio.run(check())
    with pytest.raises(AccessError, match="No permission"):
        asyncio.run(check())


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


def test_a_stream_ends_with_the_reason_where_it_cannot_go_on() -> None:
    async def events() -> list[Any]:
        async def refuse(queries: Any) -> list[Any]:
            def answer(result: Any) -> Any:
                raise RefusedQueryError(result.code, result.message)

            return [LmRequest(KEY, TASK, answer)]

        client = ServeLmClient(Handle(streaming(PartialExplanation("no", "be"), BackPressureError(1, 1))))  # type: ignore[arg-type]
        lm_handler = LmHandler(client, 30.0, 1, refuse)
        return [event async for event in await lm_handler.stream(ExplainQuery(user_id="u1"))]

    assert [name for name, _ in asyncio.run(events())] == ["decision", "text", "error"]


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

    def answer(result: Result) -> SummaryAnswer:
        if isinstance(result, Failed):
            raise RefusedQueryError(result.code, result.message)
        return ANSWER

    async def build(queries: Any) -> list[Any]:
        return [LmRequest(KEY, TASK, answer) for _ in queries]

    most = LimitOptions().queries
    lm_handler = LmHandler(Full(), 30.0, options.at_once, build)
    found = asyncio.run(lm_handler.answer_all([ExplainQuery(user_id="u1")] * most))
    assert found == [ANSWER] * most
    # Two batches of each replica: one is computed while the next one waits.
    assert max(sent) == 2 * options.batching.size == 64


def test_ranking_that_nobody_waits_for_any_more_is_not_begun() -> None:
    class Slow:
        """Stands for an engine that takes a while for each prompt."""

        def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
            for index in range(len(prompts)):
                time.sleep(0.02)
                yield Scores(index, (0.0, -1.0))

    task = Rank([Prompt.of("Is it chosen?")] * 10, ("yes", "no"))
    until = time.time() + 0.1
    engines = LmEngines.__new__(LmEngines)
    found = engines.answer(LoadedEngine(Slow()), [PendingTask(task, until) for _ in range(4)])  # type: ignore[arg-type]
    assert isinstance(found[0], RankScores)
    assert found[0].yes == pytest.approx([1 / (1 + math.exp(-1))] * 10)
    assert found[1:] == [LATE] * 3
