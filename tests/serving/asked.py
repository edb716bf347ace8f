"""The service without Ray: the same routes, guard and answers, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.testclient import TestClient

from raypipe.serving.api import build_api
from raypipe.serving.config import ServiceConfig
from raypipe.serving.guard import Guard
from raypipe.serving.queries import Condition, Standing, Summaries, User
from raypipe.serving.service import Answer, Query, RefusedQueryError, Service
from raypipe.serving.watch import Watch
from raypipe.storage.online import open_online_store
from raypipe.storage.store import Store
from raypipe.storage.tokens import Token, Tokens


class Counted:
    """Requests by route and status."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, status))


class Direct:
    """A backend that answers at once, one query after the other."""

    def __init__(self, config: ServiceConfig) -> None:
        self.watch = Watch(config, open_online_store(config.store, Store(config.workspace)))
        self.service = Service(config, self.watch.store, lambda: self.watch.served, self.watch.record)

    async def answer(self, query: Query) -> Answer:
        (answer,) = self.service.answer([query])
        if isinstance(answer, RefusedQueryError):
            raise answer
        return answer

    async def answer_all(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        return self.service.answer(queries)

    async def user(self, user_id: str) -> User:
        return self.service.user(user_id)

    async def summaries(self, user_id: str) -> Summaries:
        return self.service.summaries(user_id)

    def standing(self) -> Standing:
        served = self.watch.served
        return Standing(
            release=served.target.release,
            recommender=served.recommender_name,
            items=served.recommender.items,
            night=served.target.night or None,
            night_in_force=self.watch.night_in_force,
            since=served.since,
            refused=self.watch.refused,
        )

    async def health(self) -> Condition:
        return Condition(ok=True)

    async def readiness(self) -> Condition:
        return Condition(ok=True)


class Asked:
    """A client of one workspace's service, with a token."""

    def __init__(self, uri: str, **options: Any) -> None:
        self.config = ServiceConfig(workspace=uri, **options)
        self.backend = Direct(self.config)
        self.meter = Counted()
        self.secret = Tokens(Store(uri)).make("tests", 1000, 1000)
        self.backend.watch.look()
        api = build_api(self.backend, self.config.limits)
        guard = Guard(api, self.tokens, self.config.limits, self.meter)
        self.client = TestClient(guard, raise_server_exceptions=False)

    def tokens(self) -> Mapping[str, Token]:
        return self.backend.watch.tokens

    def post(self, route: str, body: Any = None, secret: str | None = None, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {secret or self.secret}", **options.pop("headers", {})}
        return self.client.post(f"/v1/{route}", json=body, headers=headers, **options)

    def get(self, route: str, secret: str | None = None) -> Any:
        return self.client.get(f"/v1/{route}", headers={"Authorization": f"Bearer {secret or self.secret}"})
