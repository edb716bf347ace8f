"""The service without Ray: the same routes, guard and answers, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.testclient import TestClient

from raypipe.serving.api import build_api
from raypipe.serving.config import ServiceConfig
from raypipe.serving.conversation import Conversation, Event, SoFar
from raypipe.serving.guard import Guard
from raypipe.serving.language import Job, Key, Language, Result, Task
from raypipe.serving.queries import Condition, ExplainQuery, Standing, User, Users
from raypipe.serving.service import Answer, Query, RefusedQueryError, Service
from raypipe.serving.telling import Teller, Telling, TellQuery
from raypipe.serving.watch import Watch
from raypipe.storage.online import open_online_store
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.storage.tokens import Token, Tokens


class Counted:
    """Requests by route, status and code."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, str]] = []

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, status, code))


class Speaking:
    """The language model in this process."""

    def __init__(self, config: ServiceConfig) -> None:
        self.language = Language(config)

    async def ask(self, key: Key, task: Task, until: float) -> Result:
        (result,) = self.language.answer(self.language.load(key), [Job(task, until)])
        return result

    async def stream(self, key: Key, task: Task, until: float) -> AsyncIterator[SoFar | Result]:
        heard: list[SoFar] = []
        job = Job(task, until, lambda so_far: heard.append(SoFar(so_far.decision, so_far.text)))
        (result,) = self.language.answer(self.language.load(key), [job])
        for so_far in heard:
            yield so_far
        yield result

    def prove(self, release: str, catalogue: int) -> None:
        for key in self.language.keys(Releases(self.language.workspace.store).get(release), catalogue):
            self.language.prove(key, self.language.load(key))


class Direct:
    """A backend that answers at once, one query after the other."""

    def __init__(self, config: ServiceConfig) -> None:
        speaking = Speaking(config)
        self.watch = Watch(config, open_online_store(config.store, Store(config.workspace)), speaking.prove)
        self.service = Service(config, self.watch.store, lambda: self.watch.served, self.watch.record)
        self.conversation = Conversation(speaking, config.limits.words_s, config.language.at_once, self.questions)

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

    async def questions(self, queries: Sequence[TellQuery]) -> list[Any]:
        return Teller(self.watch.config, self.service).ask(queries)

    async def tell(self, query: TellQuery) -> Telling:
        return await self.conversation.tell(query)

    async def tell_all(self, queries: Sequence[TellQuery]) -> list[Telling | RefusedQueryError]:
        return await self.conversation.tell_all(queries)

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        return await self.conversation.stream(query)

    def standing(self) -> Standing:
        return self.watch.standing()

    async def health(self) -> Condition:
        return Condition(ok=True)

    async def readiness(self) -> Condition:
        return Condition(ok=True)


class Asked:
    """A client of one workspace's service, with a token."""

    def __init__(self, uri: str, token: str = "tests", **options: Any) -> None:
        self.config = ServiceConfig(workspace=uri, **options)
        self.backend = Direct(self.config)
        self.meter = Counted()
        self.secret = Tokens(Store(uri)).make(token, 1000, 1000)
        self.backend.watch.look()
        self.api = build_api(self.backend, self.config.limits)
        self.guard = Guard(self.api, self.api.state.words, self.tokens, self.config.limits, self.meter)
        self.client = TestClient(self.guard, raise_server_exceptions=False)

    def tokens(self) -> Mapping[str, Token]:
        return self.backend.watch.tokens

    def post(self, route: str, body: Any = None, secret: str | None = None, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {secret or self.secret}", **options.pop("headers", {})}
        return self.client.post(f"/v1/{route}", json=body, headers=headers, **options)

    def get(self, route: str, secret: str | None = None) -> Any:
        return self.client.get(f"/v1/{route}", headers={"Authorization": f"Bearer {secret or self.secret}"})
