"""The process that holds the language model: what it loads, whom it holds up meanwhile, and when it is not well."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from raypipe.engines.engine import Outcome, Scores
from raypipe.errors import AccessError, RaypipeError, UsageError
from raypipe.language.prompt import Prompt
from raypipe.serving.config import ServiceConfig
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
    WriteList,
    WrittenList,
)
from raypipe.serving.lm_replica import LmReplica
from raypipe.serving.queries import SummaryAnswer
from raypipe.storage.releases import Release, Releases
from tests.serving.lm_release import SHORT

KEY, TASK = ModelKey("lm", "recexplainer-h/1"), Generate(Prompt.of("?"))
ANSWER = SummaryAnswer(user_id=None, summaries={}, served={"release": "r", "night": None})


def test_a_key_is_read_as_it_was_written() -> None:
    keys = {
        "@lm": ModelKey("lm"),
        "recexplainer-h/1@lm": KEY,
        "7:lancer/2@org/lm:v1": ModelKey("org/lm:v1", "lancer/2", 7),
        "0:lancer/2@lm": ModelKey("lm", "lancer/2", 0),
        "a:b/2@lm": ModelKey("lm", "a:b/2"),
    }
    assert {str(key): ModelKey.parse(str(key)) for key in keys.values()} == keys


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
