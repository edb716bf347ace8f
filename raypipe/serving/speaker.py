"""The deployment of the language model, downstream of the one that takes requests, and how that one asks it.

A question names the weights it is for, the id of a multiplexed model: Ray Serve sends it to a process that has the adapter
already, where there is one. Questions for the same weights are answered together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raypipe.errors import RaypipeError
from raypipe.serving.batcher import Batcher
from raypipe.serving.config import ServiceConfig
from raypipe.serving.conversation import SoFar
from raypipe.serving.doors import shut_inner_door
from raypipe.serving.language import Failed, Job, Key, Language, Result, Task, Voice
from raypipe.serving.served import UnfitError, is_lasting
from raypipe.storage.releases import Releases
from raypipe.systems.explanations import Explanation

T = TypeVar("T")
_LOG = logging.getLogger("raypipe.serving")
_TRIES = 3
_TOLD = 32  # keys of which Ray Serve is told that this process has them; more than a release and the one before have
_PROOF_S = 600.0
_LOADED = Failed("not_ready", "The language model of the release cannot be loaded.")
_ASKED = Failed("not_ready", "The language model of the release cannot be asked.")
_BUSY = Failed("busy", "More is asked of the language model than it can answer: ask again later.")
_LATE = Failed("deadline", "The language model did not answer in time: ask again later.")
_GONE = Failed("not_ready", "The language model is being started: ask again later.")


class Speaker:
    """What Ray Serve runs."""

    def __init__(self, config: ServiceConfig) -> None:
        shut_inner_door()
        self.language = Language(config)
        self._answers, self._loads = ThreadPoolExecutor(1, "answers"), ThreadPoolExecutor(1, "loads")
        self.batcher = Batcher(self._batch, config.language.batching)
        # A process that is started under load has its weights before it is asked for the first time.
        releases = Releases(self.language.workspace.store)
        release = releases.named("served") or releases.named("champion")
        if release is not None and release.lm:
            try:
                self.language.load(Key(release.lm))
            except RaypipeError as error:
                _LOG.error("%s", error)

    async def ask(self, task: Task, until: float) -> Result:
        return await self._answer(Job(task, until), serve.get_multiplexed_model_id())

    async def stream(self, task: Task, until: float) -> AsyncIterator[SoFar | Result]:
        heard: asyncio.Queue[SoFar | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(so_far: Explanation) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, SoFar(so_far.decision, so_far.text))

        whole = asyncio.ensure_future(self._answer(Job(task, until, listen), serve.get_multiplexed_model_id()))
        whole.add_done_callback(lambda _: heard.put_nowait(None))
        try:
            while (so_far := await heard.get()) is not None:
                yield so_far
            yield whole.result()
        finally:
            whole.cancel()

    async def prove(self, release: str, catalogue: int) -> str:
        """Load all weights of a release, for a catalogue of this version, and ask them; the reason why it is unfit, or nothing.

        Raises RaypipeError for what may pass.
        """
        found = Releases(self.language.workspace.store).get(release)
        try:
            for key in self.language.keys(found, catalogue):
                voice = await self._load(str(key))
                await _aside(self._answers, partial(self.language.prove, key, voice))
        except RaypipeError as error:
            # Without adapters the language model is asked for nothing but summaries of given histories.
            if not found.adapters:
                return ""
            if is_lasting(error):
                return str(error)
            raise
        return ""

    async def _answer(self, job: Job, key: str) -> Result:
        try:
            # Loading may take minutes: others are answered meanwhile.
            voice = self.language.ready(Key.parse(key)) or await self._load(key)
        except RaypipeError as error:
            _LOG.error("%s", error)
            return _LOADED
        await self._told(key)
        return await self.batcher.ask((voice, job), key)

    async def _batch(self, key: str, asked: list[tuple[Voice, Job]]) -> list[Result]:
        voice, jobs = asked[0][0], [job for _, job in asked]
        try:
            return await _aside(self._answers, partial(self.language.answer, voice, jobs))
        except RaypipeError as error:
            _LOG.error("%s: %s", key, error)
            return [_ASKED] * len(jobs)

    @serve.multiplexed(max_num_models_per_replica=_TOLD)
    async def _told(self, key: str) -> str:
        """Lets Ray Serve know that this process has these weights; which are kept is for `Language` to say, as adapters share
        theirs."""
        return key

    async def _load(self, key: str) -> Voice:
        return await _aside(self._loads, partial(self.language.load, Key.parse(key)))


class Remote:
    """Implements `Speaking` with the deployment behind a handle.

    A question whose process dies is asked again of another one: answers depend on nothing but the question.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def ask(self, key: Key, task: Task, until: float) -> Result:
        handle = self._handle.options(multiplexed_model_id=str(key))
        for _ in range(_TRIES):
            try:
                async with asyncio.timeout(max(0.0, until - time.time())):
                    return await handle.ask.remote(task, until)
            except RayActorError:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
                return _failure(error)
        return _GONE

    async def stream(self, key: Key, task: Task, until: float) -> AsyncIterator[SoFar | Result]:
        handle = self._handle.options(multiplexed_model_id=str(key), stream=True)
        for _ in range(_TRIES):
            try:
                told = aiter(handle.stream.remote(task, until))
                while True:
                    yield await asyncio.wait_for(anext(told), max(0.0, until - time.time()))
            except StopAsyncIteration:
                return
            except RayActorError:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
                yield _failure(error)
                return
        yield _GONE

    def prove(self, release: str, catalogue: int) -> None:
        """Raises UnfitError where a release's language model or an adapter does not answer, and RaypipeError where that could not
        be found out. Not for an event loop."""
        try:
            reason = self._handle.prove.remote(release, catalogue).result(timeout_s=_PROOF_S)
        except (RayError, TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            told = str(error).strip().splitlines()[-1:]  # of another process, the last line is the error
            raise RaypipeError(
                f"The language model could not be proven: {type(error).__name__} {' '.join(told)}"
            ) from error
        if reason:
            raise UnfitError(reason, "What was served before stays.")


def _failure(error: Exception) -> Failed:
    if isinstance(error, BackPressureError):
        return _BUSY
    return _LATE if isinstance(error, TimeoutError) else _GONE


async def _aside(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
