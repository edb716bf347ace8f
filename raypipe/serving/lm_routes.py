"""The routes that ask the language model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from raypipe.serving.backend import FAILURES, Backend, answers_of, check_queries, check_query, note_failure
from raypipe.serving.config import LimitOptions
from raypipe.serving.lm_handler import Event
from raypipe.serving.lm_requests import LmAnswer, LmQuery
from raypipe.serving.queries import (
    ExplainAnswer,
    ExplainAnswers,
    ExplainBatch,
    ExplainQuery,
    Failure,
    InterpretAnswer,
    InterpretAnswers,
    InterpretBatch,
    InterpretQuery,
    NextAnswer,
    NextAnswers,
    NextBatch,
    NextQuery,
    OracleBatch,
    OracleQuery,
    RerankAnswer,
    RerankAnswers,
    RerankBatch,
    RerankQuery,
    ResidualBatch,
    ResidualQuery,
    SummaryAnswer,
    SummaryAnswers,
    SummaryBatch,
    SummaryQuery,
    TitleAnswer,
    TitleAnswers,
)

_LM_FAILURES: dict[int | str, dict[str, Any]] = {**FAILURES, 404: {"model": Failure}, 409: {"model": Failure}}


def add_lm_routes(app: FastAPI, backend: Backend, limits: LimitOptions) -> None:
    @app.post("/v1/explain", response_model=ExplainAnswer, responses=_LM_FAILURES)
    async def explain(query: ExplainQuery) -> LmAnswer:
        """Explain in words whether an item fits a user or a history, and why."""
        return await _answer(backend, limits, query)

    @app.post("/v1/explain/batch", response_model=ExplainAnswers, responses=_LM_FAILURES)
    async def explain_batch(request: Request, batch: ExplainBatch) -> dict[str, list[Any]]:
        """Explain for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post(
        "/v1/explain/stream",
        response_class=StreamingResponse,
        responses={**_LM_FAILURES, 200: {"content": {"text/event-stream": {}}}},
    )
    async def explain_stream(request: Request, query: ExplainQuery) -> StreamingResponse:
        """Explain as `/v1/explain` does, and stream the explanation while it grows, as server-sent events.

        The events are `decision`, `text` (a piece), `again` (the text so far is no answer, and starts over), and at the
        end `done` with the whole answer, or `error`.
        """
        check_query(limits, query)
        return StreamingResponse(_server_sent(request, await backend.stream(query)), media_type="text/event-stream")

    @app.post("/v1/interpret", response_model=InterpretAnswer, responses=_LM_FAILURES)
    async def interpret(query: InterpretQuery) -> LmAnswer:
        """Read the titles of the history from the recommender's state, with a language model."""
        return await _answer(backend, limits, query)

    @app.post("/v1/interpret/batch", response_model=InterpretAnswers, responses=_LM_FAILURES)
    async def interpret_batch(request: Request, batch: InterpretBatch) -> dict[str, list[Any]]:
        """Read titles for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post("/v1/residual", response_model=TitleAnswer, responses=_LM_FAILURES)
    async def residual(query: ResidualQuery) -> LmAnswer:
        """Read the last title of the history from the states before and after it, with a language model."""
        return await _answer(backend, limits, query)

    @app.post("/v1/residual/batch", response_model=TitleAnswers, responses=_LM_FAILURES)
    async def residual_batch(request: Request, batch: ResidualBatch) -> dict[str, list[Any]]:
        """Read the last title for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post("/v1/oracle", response_model=TitleAnswer, responses=_LM_FAILURES)
    async def oracle(query: OracleQuery) -> LmAnswer:
        """Name what the recommender expects next, by the title that a language model reads from the oracle vector."""
        return await _answer(backend, limits, query)

    @app.post("/v1/oracle/batch", response_model=TitleAnswers, responses=_LM_FAILURES)
    async def oracle_batch(request: Request, batch: OracleBatch) -> dict[str, list[Any]]:
        """Name what comes next for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post("/v1/rerank", response_model=RerankAnswer, responses=_LM_FAILURES)
    async def rerank(query: RerankQuery) -> LmAnswer:
        """Put given items, or the recommender's best ones, in the order of a language model."""
        return await _answer(backend, limits, query)

    @app.post("/v1/rerank/batch", response_model=RerankAnswers, responses=_LM_FAILURES)
    async def rerank_batch(request: Request, batch: RerankBatch) -> dict[str, list[Any]]:
        """Put items in order for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post("/v1/next", response_model=NextAnswer, responses=_LM_FAILURES)
    async def next_items(query: NextQuery) -> LmAnswer:
        """Let a language model write what is chosen next, and match what it writes to items of the catalogue."""
        return await _answer(backend, limits, query)

    @app.post("/v1/next/batch", response_model=NextAnswers, responses=_LM_FAILURES)
    async def next_items_batch(request: Request, batch: NextBatch) -> dict[str, list[Any]]:
        """Write the next items for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)

    @app.post("/v1/summary", response_model=SummaryAnswer, responses=_LM_FAILURES)
    async def summary(query: SummaryQuery) -> LmAnswer:
        """Give the night's summaries of a user, or summarise a history now with the language model."""
        return await _answer(backend, limits, query)

    @app.post("/v1/summary/batch", response_model=SummaryAnswers, responses=_LM_FAILURES)
    async def summary_batch(request: Request, batch: SummaryBatch) -> dict[str, list[Any]]:
        """Give or write summaries for many users or histories at a time, all with the same release and night."""
        return await _answer_all(request, backend, limits, batch.queries)


async def _answer(backend: Backend, limits: LimitOptions, query: LmQuery) -> LmAnswer:
    check_query(limits, query)
    return await backend.answer_with_lm(query)


async def _answer_all(
    request: Request, backend: Backend, limits: LimitOptions, queries: Sequence[LmQuery]
) -> dict[str, list[Any]]:
    check_queries(limits, queries, request.state.charge)
    return answers_of(request, await backend.answer_all_with_lm(queries))


async def _server_sent(request: Request, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for name, data in events:
        if name == "error":
            note_failure(request, [data["code"]])
        yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
