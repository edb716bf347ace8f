"""The deployment of the language model, and the client by which the deployment that takes HTTP requests asks it.

A request names its weights by the id of a multiplexed model. Ray Serve sends it to a replica that has the adapter
already, if there is one. Requests for the same weights are answered together.
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
from raypipe.serving.grpc_port import disable_grpc_port
from raypipe.serving.lines import log_as_json
from raypipe.serving.lm_engines import Failed, LmEngines, LoadedEngine, ModelKey, PendingTask, Result, Task
from raypipe.serving.lm_handler import PartialExplanation
from raypipe.serving.served import UnfitError, is_lasting
from raypipe.storage.releases import Releases
from raypipe.systems.explanations import Explanation

T = TypeVar("T")
_LOG = logging.getLogger("raypipe.serving")
_TRIES = 3
_MOST_FAILURES = 3  # batches in a row until the process counts as broken: a device that failed once fails for good
_MOST_KEYS = 32  # most weights that Ray Serve knows this replica has; a release and the one before have fewer
_CHECK_S = 600.0
_LOAD_FAILED = Failed("not_ready", "The language model of the release cannot be loaded.")
_TASK_FAILED = Failed("not_ready", "The language model of the release cannot be asked.")
_BUSY = Failed("busy", "More is asked of the language model than it can answer: ask again later.")
_TIMED_OUT = Failed("deadline", "The language model did not answer in time: ask again later.")
_UNAVAILABLE = Failed("not_ready", "The language model is being started: ask again later.")
_FAILED = Failed("internal", "The language model failed at this.")


class LmReplica:
    """What Ray Serve runs as the deployment `language`."""

    def __init__(self, config: ServiceConfig) -> None:
        disable_grpc_port()
        log_as_json("language")
        self.engines = LmEngines(config)
        self._answers, self._loads = ThreadPoolExecutor(1, "answers"), ThreadPoolExecutor(1, "loads")
        self.batcher = Batcher(self._batch, config.language.batching)
        self._stall_s = config.language.stall_s
        self._begun: float | None = None  # when the running batch began, in monotonic seconds
        self._failures = 0
        # A replica that is started under load must have its weights before its first request.
        releases = Releases(self.engines.workspace.store)
        release = releases.named("served") or releases.named("champion")
        if release is not None and release.lm:
            try:
                self.engines.load(ModelKey(release.lm))
            except RaypipeError as error:
                _LOG.error("%s", error)

    async def ask(self, task: Task, until: float) -> Result:
        return await self._answer(PendingTask(task, until), serve.get_multiplexed_model_id())

    async def stream(self, task: Task, until: float) -> AsyncIterator[PartialExplanation | Result]:
        updates: asyncio.Queue[PartialExplanation | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(so_far: Explanation) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, PartialExplanation(so_far.decision, so_far.text))

        whole = asyncio.ensure_future(self._answer(PendingTask(task, until, listen), serve.get_multiplexed_model_id()))
        whole.add_done_callback(lambda _: updates.put_nowait(None))
        try:
            while (so_far := await updates.get()) is not None:
                yield so_far
            yield whole.result()
        finally:
            whole.cancel()

    async def check(self, release: str, catalogue: int) -> str:
        """Load all weights of a release, for this version of the catalogue, and ask each of them something.

        Returns the reason why the release is unfit, or an empty text. Raises RaypipeError for a failure that may pass.
        """
        found = Releases(self.engines.workspace.store).get(release)
        try:
            for key in self.engines.keys(found, catalogue):
                loaded = await self._load(str(key))
                await _in_thread(self._answers, partial(self.engines.check, key, loaded))
        except RaypipeError as error:
            # Without adapters the language model only writes summaries of given histories: the release is fit without
            # it.
            if not found.adapters:
                return ""
            if is_lasting(error):
                return str(error)
            raise
        return ""

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica if this raises."""
        if self._begun is not None and (running_s := time.monotonic() - self._begun) > self._stall_s:
            raise RuntimeError(f"A batch has not ended for {running_s:.0f} s.")
        if self._failures >= _MOST_FAILURES:
            raise RuntimeError(f"The last {self._failures} batches failed.")

    async def _answer(self, pending: PendingTask, key: str) -> Result:
        try:
            # Loading may take minutes; other requests are answered meanwhile.
            loaded = self.engines.get(ModelKey.parse(key)) or await self._load(key)
        except RaypipeError as error:
            _LOG.error("%s", error)
            return _LOAD_FAILED
        await self._announce(key)
        return await self.batcher.ask((loaded, pending), key)

    async def _batch(self, key: str, asked: list[tuple[LoadedEngine, PendingTask]]) -> list[Result]:
        loaded, tasks = asked[0][0], [pending for _, pending in asked]
        self._begun = time.monotonic()
        try:
            answers = await _in_thread(self._answers, partial(self.engines.answer, loaded, tasks))
        except RaypipeError as error:
            _LOG.error("%s: %s", key, error)
            answers = [_TASK_FAILED] * len(tasks)
        except Exception:
            self._failures += 1
            raise
        finally:
            self._begun = None
        self._failures = 0
        return answers

    @serve.multiplexed(max_num_models_per_replica=_MOST_KEYS)
    async def _announce(self, key: str) -> str:
        """Tell Ray Serve that this replica has these weights.

        `LmEngines` decides which weights are kept, since adapters share those of their language model.
        """
        return key

    async def _load(self, key: str) -> LoadedEngine:
        return await _in_thread(self._loads, partial(self.engines.load, ModelKey.parse(key)))


class ServeLmClient:
    """Asks the deployment through its handle; implements `LmClient`.

    A request whose replica dies is sent again to another one, since answers depend on nothing but the request.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def ask(self, key: ModelKey, task: Task, until: float) -> Result:
        handle = self._handle.options(multiplexed_model_id=str(key))
        for _ in range(_TRIES):
            try:
                async with asyncio.timeout(max(0.0, until - time.time())):
                    return await handle.ask.remote(task, until)
            except RayActorError:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayError) as error:
                return _failure(error)
        return _UNAVAILABLE

    async def stream(self, key: ModelKey, task: Task, until: float) -> AsyncIterator[PartialExplanation | Result]:
        handle = self._handle.options(multiplexed_model_id=str(key), stream=True)
        for _ in range(_TRIES):
            try:
                stream = aiter(handle.stream.remote(task, until))
                while True:
                    yield await asyncio.wait_for(anext(stream), max(0.0, until - time.time()))
            except StopAsyncIteration:
                return
            except RayActorError:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayError) as error:
                yield _failure(error)
                return
        yield _UNAVAILABLE

    def check(self, release: str, catalogue: int) -> None:
        """Check that a release's language model and adapters answer. It blocks: do not call it in an event loop.

        Raises UnfitError if one of them does not answer, and RaypipeError if that could not be found out.
        """
        try:
            reason = self._handle.check.remote(release, catalogue).result(timeout_s=_CHECK_S)
        except (RayError, TimeoutError, BackPressureError, DeploymentUnavailableError) as error:
            last_line = str(error).strip().splitlines()[-1:]  # the error itself, below another process's traceback
            raise RaypipeError(
                f"The language model could not be checked: {type(error).__name__} {' '.join(last_line)}"
            ) from error
        if reason:
            raise UnfitError(reason, "What was served before stays.")


def _failure(error: Exception) -> Failed:
    if isinstance(error, BackPressureError):
        return _BUSY
    if isinstance(error, TimeoutError):
        return _TIMED_OUT
    if isinstance(error, DeploymentUnavailableError):
        return _UNAVAILABLE
    # The error was raised in the replica. Raised here, it would fail a whole HTTP batch for one of its queries, and end
    # a stream without a word.
    _LOG.error("the language model failed: %s", error)
    return _FAILED


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
