"""The service without Ray: the same routes, middleware and answers, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.testclient import TestClient

from raypipe.serving.api import build_api
from raypipe.serving.config import ServiceConfig
from raypipe.serving.lm_engines import LmEngines, ModelKey, PendingTask, Result, Task
from raypipe.serving.lm_handler import Event, LmHandler, PartialExplanation
from raypipe.serving.lm_requests import LmAnswer, LmQuery, LmRequestBuilder
from raypipe.serving.middleware import RequestMiddleware
from raypipe.serving.queries import ExplainQuery, HealthStatus, ReleaseStatus, User, Users
from raypipe.serving.release_watcher import ReleaseWatcher
from raypipe.serving.service import Answer, Query, RefusedQueryError, Service
from raypipe.storage.online import open_online_store
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.storage.tokens import Token, Tokens


class CountedRequests:
    """Requests by route, status and code."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, str]] = []

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, status, code))


class LocalLmClient:
    """The language model in this process."""

    def __init__(self, config: ServiceConfig) -> None:
        self.engines = LmEngines(config)

    async def ask(self, key: ModelKey, task: Task, until: float) -> Result:
        (result,) = self.engines.answer(self.engines.load(key), [PendingTask(task, until)])
        return result

    async def stream(self, key: ModelKey, task: Task, until: float) -> AsyncIterator[PartialExplanation | Result]:
        updates: list[PartialExplanation] = []
        pending = PendingTask(
            task, until, lambda so_far: updates.append(PartialExplanation(so_far.decision, so_far.text))
        )
        (result,) = self.engines.answer(self.engines.load(key), [pending])
        for so_far in updates:
            yield so_far
        yield result

    def check(self, release: str, catalogue: int) -> None:
        for key in self.engines.keys(Releases(self.engines.workspace.store).get(release), catalogue):
            self.engines.check(key, self.engines.load(key))


class LocalBackend:
    """A backend that answers at once, one query after the other."""

    def __init__(self, config: ServiceConfig) -> None:
        client = LocalLmClient(config)
        self.watcher = ReleaseWatcher(config, open_online_store(config.store, Store(config.workspace)), client.check)
        self.service = Service(config, self.watcher.store, lambda: self.watcher.served, self.watcher.record)
        self.lm_handler = LmHandler(client, config.limits.words_s, config.language.at_once, self.build_lm_requests)

    async def answer(self, query: Query) -> Answer:
        (answer,) = self.service.answer([query])
        if isinstance(answer, RefusedQueryError):
            raise answer
        return answer

    async def answer_all(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        return self.service.answer(queries)

    async def user(self, user_id: str) -> User:
        return self.service.user(user_id)

    def some_users(self) -> Users:
        return self.service.some_users()

    async def build_lm_requests(self, queries: Sequence[LmQuery]) -> list[Any]:
        return LmRequestBuilder(self.watcher.config, self.service).build(queries)

    async def answer_with_lm(self, query: LmQuery) -> LmAnswer:
        return await self.lm_handler.answer(query)

    async def answer_all_with_lm(self, queries: Sequence[LmQuery]) -> list[LmAnswer | RefusedQueryError]:
        return await self.lm_handler.answer_all(queries)

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        return await self.lm_handler.stream(query)

    def release_status(self) -> ReleaseStatus:
        return self.watcher.release_status()

    async def health(self) -> HealthStatus:
        return HealthStatus(ok=True)

    async def readiness(self) -> HealthStatus:
        return HealthStatus(ok=True)


class LocalService:
    """A client of one workspace's service, with a token."""

    def __init__(self, uri: str, token: str = "tests", **options: Any) -> None:
        self.config = ServiceConfig(workspace=uri, **options)
        self.backend = LocalBackend(self.config)
        self.metrics = CountedRequests()
        self.secret = Tokens(Store(uri)).make(token, 1000, 1000)
        self.backend.watcher.refresh_tokens()
        self.backend.watcher.poll()
        self.api = build_api(self.backend, self.config.limits)
        self.middleware = RequestMiddleware(
            self.api, self.api.state.lm_paths, self.tokens, self.config.limits, self.metrics
        )
        self.client = TestClient(self.middleware, raise_server_exceptions=False)

    def tokens(self) -> Mapping[str, Token]:
        return self.backend.watcher.tokens

    def post(self, route: str, body: Any = None, secret: str | None = None, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {secret or self.secret}", **options.pop("headers", {})}
        return self.client.post(f"/v1/{route}", json=body, headers=headers, **options)

    def get(self, route: str, secret: str | None = None) -> Any:
        return self.client.get(f"/v1/{route}", headers={"Authorization": f"Bearer {secret or self.secret}"})
