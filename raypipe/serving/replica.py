"""The replica: what Ray Serve runs. HTTP ends here, tokens are checked here, and the model is asked here, in batches."""

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
from raypipe.serving.conversation import Conversation, Event
from raypipe.serving.doors import shut_inner_door
from raypipe.serving.guard import AUDIT, Guard
from raypipe.serving.metrics import ServingMetrics
from raypipe.serving.queries import Condition, ExplainQuery, Standing, User, Users
from raypipe.serving.served import UnfitError, check
from raypipe.serving.service import Answer, Query, RefusedQueryError, Service
from raypipe.serving.speaker import Remote
from raypipe.serving.telling import Teller, Telling, TellQuery
from raypipe.serving.watch import Watch
from raypipe.storage.online import OnlineStoreDownError, open_online_store
from raypipe.storage.store import Store

T = TypeVar("T")
_THREADS = 2  # of what is done aside; health has one of its own, so that what waits for a store keeps no replica from being well
# Batches that take no longer than this as a rule are answered where requests are taken: handed to another thread, the two wait for
# each other's turn at the interpreter. Measured on two cores, at 350 requests a second: p50 20 ms so, and 2,658 ms handed over. A
# batch of 64 takes some 20 ms there; were that too long already, a backlog would make itself last.
_SHORT_S = 0.1
_LEARNT = 0.2  # of a batch's seconds, in what is the rule
_HEALTH_S = 1.0
_AUDIT_BYTES = 50_000_000


class Replica:
    """Implements `Backend`."""

    def __init__(self, config: ServiceConfig, language: DeploymentHandle | None = None) -> None:
        shut_inner_door()
        keep_heap_small()
        self.config = config
        torch.set_num_threads(config.replicas.threads)
        _log_audit(config.audit)
        self.store = open_online_store(config.store, Store(config.workspace))
        speaking = Remote(language) if language is not None else None
        self.watch = Watch(config, self.store, speaking.prove if speaking is not None else _unproven)
        self.service = Service(config, self.store, lambda: self.watch.served, self.watch.record)
        teller = Teller(config, self.service)
        self.conversation = Conversation(
            speaking,
            config.limits.words_s,
            config.language.at_once,
            lambda queries: self._aside(lambda: teller.ask(queries)),
        )
        self.metrics = ServingMetrics()
        self.threads = ThreadPoolExecutor(_THREADS, "answers")
        self.health_thread = ThreadPoolExecutor(1, "health")
        self._health = (0.0, Condition(ok=True))
        self._asking = asyncio.Lock()
        self._batch_s = 0.0
        self.batcher = Batcher(self._batch, config.batching)
        self.watch.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        api = build_api(self, self.config.limits)
        return Guard(api, api.state.words, lambda: self.watch.tokens, self.config.limits, self.metrics)

    async def answer(self, query: Query) -> Answer:
        answer = await self.batcher.ask(query)
        if isinstance(answer, RefusedQueryError):
            raise answer
        return answer

    async def answer_all(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        self.metrics.batch(len(queries))
        return await self._aside(lambda: self.service.answer(queries))

    async def user(self, user_id: str) -> User:
        return await self._aside(lambda: self.service.user(user_id))

    def some_users(self) -> Users:
        return self.service.some_users()

    async def tell(self, query: TellQuery) -> Telling:
        return await self.conversation.tell(query)

    async def tell_all(self, queries: Sequence[TellQuery]) -> list[Telling | RefusedQueryError]:
        return await self.conversation.tell_all(queries)

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        return await self.conversation.stream(query)

    def standing(self) -> Standing:
        return self.watch.standing()

    async def health(self) -> Condition:
        # Nobody needs a token to ask, so that asking often must not cost more than asking once.
        async with self._asking:
            asked, condition = self._health
            if time.monotonic() - asked > _HEALTH_S:
                condition = await asyncio.get_running_loop().run_in_executor(self.health_thread, self._examine)
                self._health = (time.monotonic(), condition)
        return condition

    async def readiness(self) -> Condition:
        return await self._aside(self._look_up)

    async def check_health(self) -> None:
        """For Ray Serve, which replaces a replica that raises here."""
        served = self.watch.served
        self.metrics.served(served.target.release, served.target.night, served.since, len(self.watch.refused))
        condition = await self.health()
        if not condition.ok:
            raise RuntimeError(condition.reason)

    async def _batch(self, key: str, queries: list[Query]) -> list[Answer | RefusedQueryError]:
        self.metrics.batch(len(queries))

        def answer() -> list[Answer | RefusedQueryError]:
            started = time.monotonic()
            answers = self.service.answer(queries)
            self._batch_s += _LEARNT * (time.monotonic() - started - self._batch_s)
            return answers

        return answer() if self._batch_s < _SHORT_S else await self._aside(answer)

    async def _aside(self, work: Callable[[], T]) -> T:
        """Off the event loop, which has to take requests meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def _examine(self) -> Condition:
        try:
            check(self.watch.served)
        except UnfitError as error:
            logging.getLogger("raypipe.serving").error("%s", error)
            return Condition(ok=False, reason="The model does not answer as it should.")
        return Condition(ok=True)

    def _look_up(self) -> Condition:
        version = self.watch.served.target.version
        try:
            if not version:
                return Condition(ok=False, reason="No night is loaded: requests by history alone are answered.")
            self.store.get(version, [""])
        except OnlineStoreDownError:
            return Condition(
                ok=False, reason="The online store does not answer: requests by history alone are answered."
            )
        return Condition(ok=True)


def _unproven(release: str, catalogue: int) -> None:
    """Without a language model there is none to prove."""


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
