"""The interface of what answers requests, and the checks of a request before it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request

from raypipe.serving.config import LimitOptions
from raypipe.serving.lm_handler import Event
from raypipe.serving.lm_requests import LmAnswer, LmQuery
from raypipe.serving.queries import (
    ExplainQuery,
    Failure,
    HealthStatus,
    Problem,
    RecommendQuery,
    ReleaseStatus,
    RerankQuery,
    ScoreQuery,
    User,
    UserOrHistory,
    Users,
)
from raypipe.serving.service import Answer, Code, Query, RefusedQueryError

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure} for status in (400, 401, 413, 422, 429, 500, 503)
}
"""Failures that any route may answer with, by HTTP status."""


STATUS: dict[Code, int] = {
    "no_such_user": 404,
    "no_such_value": 422,
    "no_such_item": 422,
    "nothing_known": 422,
    "no_answer": 422,
    "no_adapter": 409,
    "no_language_model": 409,
    "too_much": 413,
    "busy": 503,
    "deadline": 503,
    "store_down": 503,
    "not_ready": 503,
    "internal": 500,
}
"""HTTP status of a query that gets no answer, by its code."""


class Backend(Protocol):
    """Answers queries. Raises RefusedQueryError for a query that gets no answer."""

    async def answer(self, query: Query) -> Answer: ...

    async def answer_all(self, queries: Sequence[Query]) -> list[Answer | RefusedQueryError]:
        """Answers in the order of the queries, all of one release and night."""
        ...

    async def user(self, user_id: str) -> User: ...

    def some_users(self) -> Users: ...

    async def answer_with_lm(self, query: LmQuery) -> LmAnswer: ...

    async def answer_all_with_lm(self, queries: Sequence[LmQuery]) -> list[LmAnswer | RefusedQueryError]:
        """Answers in the order of the queries, all of one release and night."""
        ...

    async def stream(self, query: ExplainQuery) -> AsyncIterator[Event]: ...

    def release_status(self) -> ReleaseStatus: ...

    async def health(self) -> HealthStatus:
        """Whether the model answers, which asking it finds out."""
        ...

    async def readiness(self) -> HealthStatus:
        """Whether all that requests need is available, the online store included."""
        ...


def note_failure(request: Request, codes: Sequence[Code]) -> None:
    """Note a failure of the service among `codes`, for `RequestMiddleware` to count, if the HTTP answer began well.

    It is the first code whose status is 500 or above.
    """
    if mine := [code for code in codes if STATUS[code] >= 500]:
        request.state.code = mine[0]


def check_query(limits: LimitOptions, query: UserOrHistory) -> None:
    """Check a query against the limits. Raises RefusedQueryError if it asks for too much."""
    asked = {"history": (len(query.history or ()), limits.history)}
    if isinstance(query, RecommendQuery):
        asked |= {"count": (query.count, limits.count), "deny": (len(query.deny), limits.history)}
    elif isinstance(query, ScoreQuery):
        asked |= {"items": (len(query.items), limits.count)}
    elif isinstance(query, RerankQuery):
        asked |= {"items": (len(query.items or ()), limits.ranked), "count": (query.count, limits.ranked)}
    for name, (found, most) in asked.items():
        if found > most:
            raise RefusedQueryError("too_much", f"{name} has {found:,}, and {most:,} are the most.")


def check_queries(limits: LimitOptions, queries: Sequence[UserOrHistory], charge: Callable[[int], None]) -> None:
    """Check a batch, each query as `check_query` does, and charge the token for every query beyond the first.

    The request itself was charged for the first one. Raises RefusedQueryError if the batch or a query asks for too
    much.
    """
    if len(queries) > limits.queries:
        raise RefusedQueryError("too_much", f"A batch has at most {limits.queries:,} queries.")
    charge(len(queries) - 1)
    for query in queries:
        check_query(limits, query)


def answers_of(request: Request, answers: Sequence[Any]) -> dict[str, list[Any]]:
    """The body of a batch's answer. A query that gets no answer has its problem in place of one."""
    note_failure(request, [answer.code for answer in answers if isinstance(answer, RefusedQueryError)])
    return {
        "answers": [
            Problem(code=answer.code, message=answer.message) if isinstance(answer, RefusedQueryError) else answer
            for answer in answers
        ]
    }
