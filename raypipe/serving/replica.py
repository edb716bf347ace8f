"""The replica that Ray Serve runs. It takes HTTP requests, checks their tokens, and asks the model in batches."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TypeVar

import torch
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from raypipe.runtime.memory import keep_heap_small
from raypipe.serving.api import build_api
from raypipe.serving.batcher import Batcher
from raypipe.serving.config import ServiceConfig
from raypipe.serving.grpc_port import disable_grpc_port
from raypipe.serving.lines import log_as_json
from raypipe.serving.lm_handler import Event, LmHandler
from raypipe.serving.lm_replica import ServeLmClient
from raypipe.serving.lm_requests import LmAnswer, LmQuery, LmRequestBuilder
from raypipe.serving.metrics import ServingMetrics
from raypipe.serving.middleware import AUDIT, RequestMiddleware
from raypipe.serving.queries import ExplainQuery, HealthStatus, ReleaseStatus, User, Users
from raypipe.serving.release_watcher import ReleaseWatcher
from raypipe.serving.served import UnfitError, check
from raypipe.serving.service import Answer, Query, RefusedQueryError, Service
from raypipe.storage.online import OnlineStoreDownError, open_online_store
from raypipe.storage.store import Store

T = TypeVar("T")
# Threads for work off the event loop. Health has a thread of its own, so that a replica whose threads wait for a store
# still counts as healthy.
_THREADS = 2
# If batches usually take less than this, they are answered in the event loop, which also takes requests. In another
# thread, the two would wait for each other's turn at the interpreter. Measured on two cores, at 350 requests a second:
# p50 20 ms in the loop, and 2,658 ms in another thread. A batch of 64 takes some 20 ms there; with a limit below that,
# a backlog would keep itself up.
_SHORT_S = 0.1
_LEARNT = 0.2  # weight of the newest batch in the running average of a batch's seconds
_HEALTH_S = 1.0
_AUDIT_BYTES = 50_000_000


class Replica:
    """Implements `Backend`."""

    def __init__(self, config: ServiceConfig, lm: DeploymentHandle | None = None) -> None:
        disable_grpc_port()
        log_as_json("recommender")
        keep_heap_small()
        self.config = config
        torch.set_num_threads(config.replicas.threads)
        _log_audit(config.audit)
        self.store = open_online_store(config.store, Store(config.workspace))
        lm_client = ServeLmClient(lm) if lm is not None else None
        self.watcher = ReleaseWatcher(config, self.store, lm_client.check if lm_client is not None else _no_lm)
        self.service = Service(config, self.store, lambda: self.watcher.served, self.watcher.record)
        builder = LmRequestBuilder(config, self.service)
        self.lm_handler = LmHandler(
            lm_client,
            config.limits.words_s,
            config.language.at_once,
            lambda queries: self._in_thread(lambda: builder.build(queries)),
        )
        self.metrics = ServingMetrics()
        self.threads = ThreadPoolExecutor(_THREADS, "answers")
        self.health_thread = ThreadPoolExecutor(1, "health")
        self._health = (0.0, HealthStatus(ok=True))
        self._health_lock = asyncio.Lock()
        self._batch_s = 0.0
        self.batcher = Batcher(self._batch, config.batching)
        self.watcher.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        api = build_api(self, self.config.limits)
        return RequestMiddleware(api, api.state.lm_paths, lambda: self.watcher.tokens, self.config.limits, self.metrics)

    async def answer(self, query: Query) -> Answer:
        answer = await self.batcher.ask(query)
        if isinstance(answer, RefusedQueryError):
            raise answer
        return answer

    async def answer_all(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        self.metrics.batch(len(queries))
        return await self._in_thread(lambda: self.service.answer(queries))

    async def user(self, user_id: str) -> User:
        return await self._in_thread(lambda: self.service.user(user_id))

    def some_users(self) -> Users:
        return self.service.some_users()

    async def answer_with_lm(self, query: LmQuery) -> LmAnswer:
        return await self.lm_handler.answer(query)

    async def answer_all_with_lm(self, queries: Sequence[LmQuery]) -> list[LmAnswer | RefusedQueryError]:
        return await self.lm_handler.answer_all(queries)

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        return await self.lm_handler.stream(query)

    def release_status(self) -> ReleaseStatus:
        return self.watcher.release_status()

    async def health(self) -> HealthStatus:
        # Asking needs no token, so asking often must not cost more than asking once.
        async with self._health_lock:
            asked, health = self._health
            if time.monotonic() - asked > _HEALTH_S:
                health = await asyncio.get_running_loop().run_in_executor(self.health_thread, self._check_model)
                self._health = (time.monotonic(), health)
        return health

    async def readiness(self) -> HealthStatus:
        return await self._in_thread(self._check_store)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica if this raises."""
        self.metrics.served(self.watcher.release_status())
        health = await self.health()
        if not health.ok:
            raise RuntimeError(health.reason)

    async def _batch(self, key: str, queries: list[Query]) -> list[Answer | RefusedQueryError]:
        self.metrics.batch(len(queries))

        def answer() -> list[Answer | RefusedQueryError]:
            started = time.monotonic()
            answers = self.service.answer(queries)
            self._batch_s += _LEARNT * (time.monotonic() - started - self._batch_s)
            return answers

        return answer() if self._batch_s < _SHORT_S else await self._in_thread(answer)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in another thread, as the event loop has to take requests meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def _check_model(self) -> HealthStatus:
        try:
            check(self.watcher.served)
        except UnfitError as error:
            logging.getLogger("raypipe.serving").error("%s", error)
            return HealthStatus(ok=False, reason="The model does not answer as it should.")
        return HealthStatus(ok=True)

    def _check_store(self) -> HealthStatus:
        version = self.watcher.served.target.version
        try:
            if not version:
                return HealthStatus(ok=False, reason="No night is loaded: requests by history alone are answered.")
            self.store.get(version, [""])
        except OnlineStoreDownError:
            return HealthStatus(
                ok=False, reason="The online store does not answer: requests by history alone are answered."
            )
        return HealthStatus(ok=True)


def _no_lm(release: str, catalogue: int) -> None:
    """Check nothing: there is no language model."""


def _log_audit(folder: str | None) -> None:
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path / f"audit-{os.getpid()}.jsonl", maxBytes=_AUDIT_BYTES, backupCount=4)
    handler.setFormatter(logging.Formatter("%(message)s"))
    AUDIT.handlers = [handler]
    AUDIT.setLevel(logging.INFO)
    AUDIT.propagate = False
