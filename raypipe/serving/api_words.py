"""The routes that ask the language model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from raypipe.serving.backend import FAILURES, Backend, answers_of, check_queries, check_query
from raypipe.serving.config import LimitOptions
from raypipe.serving.conversation import Event
from raypipe.serving.queries import (
    ExplainAnswers,
    ExplainBatch,
    Explained,
    ExplainQuery,
    Failure,
    InterpretAnswers,
    InterpretBatch,
    Interpreted,
    InterpretQuery,
    Named,
    NamedAnswers,
    Next,
    NextAnswers,
    NextBatch,
    NextQuery,
    OracleBatch,
    OracleQuery,
    RerankAnswers,
    RerankBatch,
    Reranked,
    RerankQuery,
    ResidualBatch,
    ResidualQuery,
    Summaries,
    SummaryAnswers,
    SummaryBatch,
    SummaryQuery,
)
from raypipe.serving.telling import Telling, TellQuery

_UNTOLD: dict[int | str, dict[str, Any]] = {**FAILURES, 404: {"model": Failure}, 409: {"model": Failure}}


def add_words(app: FastAPI, backend: Backend, limits: LimitOptions) -> None:
    @app.post("/v1/explain", response_model=Explained, responses=_UNTOLD)
    async def explain(query: ExplainQuery) -> Telling:
        """Whether an item fits a user or a history, and why, in words."""
        return await _tell(backend, limits, query)

    @app.post("/v1/explain/batch", response_model=ExplainAnswers, responses=_UNTOLD)
    async def explain_batch(batch: ExplainBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post(
        "/v1/explain/stream",
        response_class=StreamingResponse,
        responses={**_UNTOLD, 200: {"content": {"text/event-stream": {}}}},
    )
    async def explain_stream(query: ExplainQuery) -> StreamingResponse:
        """The same, told while it grows, as server-sent events: `decision`, `text` (a piece), `again` (what was told so far is
        no answer, and begins anew), and at the end `done` with the whole answer, or `error`."""
        check_query(limits, query)
        return StreamingResponse(_sent(await backend.stream(query)), media_type="text/event-stream")

    @app.post("/v1/interpret", response_model=Interpreted, responses=_UNTOLD)
    async def interpret(query: InterpretQuery) -> Telling:
        """The titles a language model reads from the recommender's state."""
        return await _tell(backend, limits, query)

    @app.post("/v1/interpret/batch", response_model=InterpretAnswers, responses=_UNTOLD)
    async def interpret_batch(batch: InterpretBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post("/v1/residual", response_model=Named, responses=_UNTOLD)
    async def residual(query: ResidualQuery) -> Telling:
        """The last title, read from the states before and after it."""
        return await _tell(backend, limits, query)

    @app.post("/v1/residual/batch", response_model=NamedAnswers, responses=_UNTOLD)
    async def residual_batch(batch: ResidualBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post("/v1/oracle", response_model=Named, responses=_UNTOLD)
    async def oracle(query: OracleQuery) -> Telling:
        """What the recommender would have next, as a title."""
        return await _tell(backend, limits, query)

    @app.post("/v1/oracle/batch", response_model=NamedAnswers, responses=_UNTOLD)
    async def oracle_batch(batch: OracleBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post("/v1/rerank", response_model=Reranked, responses=_UNTOLD)
    async def rerank(query: RerankQuery) -> Telling:
        """Items, or the recommender's best, in the order of a language model."""
        return await _tell(backend, limits, query)

    @app.post("/v1/rerank/batch", response_model=RerankAnswers, responses=_UNTOLD)
    async def rerank_batch(batch: RerankBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post("/v1/next", response_model=Next, responses=_UNTOLD)
    async def next_items(query: NextQuery) -> Telling:
        """What is chosen next, as a language model writes it, taken for items of the catalogue."""
        return await _tell(backend, limits, query)

    @app.post("/v1/next/batch", response_model=NextAnswers, responses=_UNTOLD)
    async def next_items_batch(batch: NextBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)

    @app.post("/v1/summary", response_model=Summaries, responses=_UNTOLD)
    async def summary(query: SummaryQuery) -> Telling:
        """What the night wrote of a user, or what is written of a history now."""
        return await _tell(backend, limits, query)

    @app.post("/v1/summary/batch", response_model=SummaryAnswers, responses=_UNTOLD)
    async def summary_batch(batch: SummaryBatch) -> dict[str, list[Any]]:
        """Many at a time, all of one release and night."""
        return await _tell_all(backend, limits, batch.queries)


async def _tell(backend: Backend, limits: LimitOptions, query: TellQuery) -> Telling:
    check_query(limits, query)
    return await backend.tell(query)


async def _tell_all(backend: Backend, limits: LimitOptions, queries: Sequence[TellQuery]) -> dict[str, list[Any]]:
    check_queries(limits, queries)
    return answers_of(await backend.tell_all(queries))


async def _sent(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for name, data in events:
        yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
