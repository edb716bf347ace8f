"""Answers queries with the language model through any client: builds requests, waits for them, and streams answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raypipe.serving.lm_engines import ModelKey, Result, Task
from raypipe.serving.lm_requests import LmAnswer, LmQuery, LmRequest
from raypipe.serving.queries import ExplainQuery
from raypipe.serving.service import RefusedQueryError

Event = tuple[str, dict[str, Any]]
"""Name and data of a server-sent event."""


@dataclass(frozen=True)
class PartialExplanation:
    """An explanation as far as it is written."""

    decision: str
    text: str


class LmClient(Protocol):
    """Answers tasks with a language model. A task without an answer by `until` (Unix seconds) fails."""

    async def ask(self, key: ModelKey, task: Task, until: float) -> Result: ...

    def stream(self, key: ModelKey, task: Task, until: float) -> AsyncIterator[PartialExplanation | Result]:
        """Yield the explanation as it grows, and its result last."""
        ...


class LmHandler:
    """Answers queries with the language model.

    `build` makes requests of queries as `LmRequestBuilder.build` does, without holding up the event loop; without
    `client` it makes none. One HTTP request has at most `at_once` requests in flight: more would leave no room for
    other requests, nor for its own.
    """

    def __init__(
        self,
        client: LmClient | None,
        wait_s: float,
        at_once: int,
        build: Callable[[Sequence[LmQuery]], Awaitable[list[LmRequest | LmAnswer | RefusedQueryError]]],
    ) -> None:
        self.client, self.wait_s, self.at_once, self.build = client, wait_s, at_once, build

    async def answer(self, query: LmQuery) -> LmAnswer:
        """Answer one query. Raises RefusedQueryError if it gets no answer."""
        (found,) = await self.answer_all([query])
        if isinstance(found, RefusedQueryError):
            raise found
        return found

    async def answer_all(self, queries: Sequence[LmQuery]) -> list[LmAnswer | RefusedQueryError]:
        """Answers in the order of the queries, all of one release and night."""
        until = time.time() + self.wait_s
        requests = await self.build(queries)
        slots = asyncio.Semaphore(self.at_once)
        return await asyncio.gather(*(self._answer(request, until, slots) for request in requests))

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        """The events of a growing explanation, the last of which is `done` with the whole answer, or `error`.

        Before that come `decision`, `text` (a piece), and `again` (the text so far is no answer, and starts over).
        Raises RefusedQueryError if the query cannot be asked.
        """
        until = time.time() + self.wait_s
        (request,) = await self.build([query])
        if isinstance(request, RefusedQueryError):
            raise request
        assert isinstance(request, LmRequest)
        return self._events(request, until)

    async def _answer(
        self, request: LmRequest | LmAnswer | RefusedQueryError, until: float, slots: asyncio.Semaphore
    ) -> LmAnswer | RefusedQueryError:
        if not isinstance(request, LmRequest):
            return request
        assert self.client is not None
        try:
            async with slots:
                result = await self.client.ask(request.key, request.task, until)
            return request.answer(result)
        except RefusedQueryError as problem:
            return problem

    async def _events(self, request: LmRequest, until: float) -> AsyncIterator[Event]:
        assert self.client is not None
        sent, decision = "", ""
        try:
            async for found in self.client.stream(request.key, request.task, until):
                if not isinstance(found, PartialExplanation):
                    yield "done", request.answer(found).model_dump()
                    return
                if found.decision != decision:
                    decision = found.decision
                    yield "decision", {"decision": decision}
                if not found.text.startswith(sent):
                    sent = ""
                    yield "again", {}
                if found.text != sent:
                    yield "text", {"text": found.text[len(sent) :]}
                    sent = found.text
        except RefusedQueryError as problem:
            yield "error", {"code": problem.code, "message": problem.message}
