"""Requests that are put into words, whoever holds the language model: asked, waited for, and told while they grow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raypipe.serving.language import Key, Result, Task
from raypipe.serving.queries import ExplainQuery
from raypipe.serving.service import RefusedQueryError
from raypipe.serving.telling import Question, Telling, TellQuery

Event = tuple[str, dict[str, Any]]
"""Name and data of a server-sent event."""


@dataclass(frozen=True)
class SoFar:
    """An explanation as far as it goes."""

    decision: str
    text: str


class Speaking(Protocol):
    """Answers tasks with a language model. What gets no answer until then (Unix seconds) fails."""

    async def ask(self, key: Key, task: Task, until: float) -> Result: ...

    def stream(self, key: Key, task: Task, until: float) -> AsyncIterator[SoFar | Result]:
        """The explanation as it grows, and at last its result."""
        ...


class Conversation:
    """`make` turns queries into questions as `Teller.ask` does, in a place where that holds up nobody; without `speaking`
    it makes none. Of one request's questions at most `at_once` are asked at a time: many at once would leave no room for
    anybody's, their own included."""

    def __init__(
        self,
        speaking: Speaking | None,
        wait_s: float,
        at_once: int,
        make: Callable[[Sequence[TellQuery]], Awaitable[list[Question | Telling | RefusedQueryError]]],
    ) -> None:
        self.speaking, self.wait_s, self.at_once, self.make = speaking, wait_s, at_once, make

    async def tell(self, query: TellQuery) -> Telling:
        """Raises RefusedQueryError for what gets no answer."""
        (found,) = await self.tell_all([query])
        if isinstance(found, RefusedQueryError):
            raise found
        return found

    async def tell_all(self, queries: Sequence[TellQuery]) -> list[Telling | RefusedQueryError]:
        """In their order, all of one release and night."""
        until = time.time() + self.wait_s
        questions = await self.make(queries)
        room = asyncio.Semaphore(self.at_once)
        return await asyncio.gather(*(self._told(question, until, room) for question in questions))

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]:
        """Events: `decision`, `text` (a piece), `again` (what was written is no answer, and is begun anew), and at the end
        `done` with the whole answer, or `error`. Raises RefusedQueryError for what cannot be asked."""
        until = time.time() + self.wait_s
        (question,) = await self.make([query])
        if isinstance(question, RefusedQueryError):
            raise question
        assert isinstance(question, Question)
        return self._events(question, until)

    async def _told(
        self, question: Question | Telling | RefusedQueryError, until: float, room: asyncio.Semaphore
    ) -> Telling | RefusedQueryError:
        if not isinstance(question, Question):
            return question
        assert self.speaking is not None
        try:
            async with room:
                result = await self.speaking.ask(question.key, question.task, until)
            return question.answer(result)
        except RefusedQueryError as problem:
            return problem

    async def _events(self, question: Question, until: float) -> AsyncIterator[Event]:
        assert self.speaking is not None
        told, decision = "", ""
        try:
            async for found in self.speaking.stream(question.key, question.task, until):
                if not isinstance(found, SoFar):
                    yield "done", question.answer(found).model_dump()
                    return
                if found.decision != decision:
                    decision = found.decision
                    yield "decision", {"decision": decision}
                if not found.text.startswith(told):
                    told = ""
                    yield "again", {}
                if found.text != told:
                    yield "text", {"text": found.text[len(told) :]}
                    told = found.text
        except RefusedQueryError as problem:
            yield "error", {"code": problem.code, "message": problem.message}
