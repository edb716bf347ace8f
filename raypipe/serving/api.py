"""The HTTP interface: routes under /v1, their limits and their errors. A `Backend` answers them."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from raypipe import __version__
from raypipe.serving.backend import FAILURES, STATUS, Backend, answers_of, check_queries, check_query
from raypipe.serving.config import LimitOptions
from raypipe.serving.lm_routes import add_lm_routes
from raypipe.serving.middleware import failure
from raypipe.serving.page import add_page
from raypipe.serving.queries import (
    Failure,
    HealthStatus,
    RecommendAnswer,
    RecommendAnswers,
    RecommendBatch,
    RecommendQuery,
    ReleaseStatus,
    ScoreAnswer,
    ScoreAnswers,
    ScoreBatch,
    ScoreQuery,
    User,
    Users,
)
from raypipe.serving.service import Answer, RefusedQueryError
from raypipe.serving.swagger import OPENAPI_PATH, add_swagger

_CODES = {404: "no_such_route", 405: "no_such_method", 413: "too_large", 400: "bad_request"}
_SHOWN_PROBLEMS = 5

UserPath = Annotated[str, Path(min_length=1, max_length=512)]


def build_api(backend: Backend, limits: LimitOptions) -> FastAPI:
    """Build the routes; `RequestMiddleware` goes around them. `state.lm_paths` are those that ask a language model."""
    app = FastAPI(
        title="raypipe",
        version=__version__,
        description="Recommendations of a release, for the users of a night or for any history.",
        openapi_url=OPENAPI_PATH,
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
    )

    @app.post("/v1/recommend", response_model=RecommendAnswer)
    async def recommend(query: RecommendQuery) -> Answer:
        """Recommend the best items for a user or a history."""
        check_query(limits, query)
        return await backend.answer(query)

    @app.post("/v1/recommend/batch", response_model=RecommendAnswers)
    async def recommend_batch(request: Request, batch: RecommendBatch) -> dict[str, list[Any]]:
        """Recommend for many users or histories at a time, all with the same release and night."""
        check_queries(limits, batch.queries, request.state.charge)
        return answers_of(request, await backend.answer_all(batch.queries))

    @app.post("/v1/score", response_model=ScoreAnswer)
    async def score(query: ScoreQuery) -> Answer:
        """Score given items for a user or a history with the recommender."""
        check_query(limits, query)
        return await backend.answer(query)

    @app.post("/v1/score/batch", response_model=ScoreAnswers)
    async def score_batch(request: Request, batch: ScoreBatch) -> dict[str, list[Any]]:
        """Score items for many users or histories at a time, all with the same release and night."""
        check_queries(limits, batch.queries, request.state.charge)
        return answers_of(request, await backend.answer_all(batch.queries))

    @app.get("/v1/users")
    async def users() -> Users:
        """List some users of the night, to look around with."""
        return backend.some_users()

    @app.get("/v1/users/{user_id:path}", responses={404: {"model": Failure}})
    async def user(user_id: UserPath) -> User:
        """Show what the night knows of a user: history, summaries and its list of recommendations."""
        return await backend.user(user_id)

    others = len(app.routes)
    add_lm_routes(app, backend, limits)
    app.state.lm_paths = frozenset(route.path for route in app.routes[others:] if isinstance(route, APIRoute))
    add_page(app)

    @app.get("/v1/release")
    async def release() -> ReleaseStatus:
        """Show what is served, and since when."""
        return backend.release_status()

    @app.get("/v1/health", responses={503: {"model": HealthStatus}})
    async def health() -> JSONResponse:
        """Check that the model answers, by running it. This is the one route under /v1 that needs no token."""
        return _health(await backend.health())

    @app.get("/v1/ready", responses={503: {"model": HealthStatus}})
    async def ready() -> JSONResponse:
        """Check that requests by user id can be answered too, which takes the online store."""
        return _health(await backend.readiness())

    add_swagger(app, without_token="/v1/health")
    app.add_exception_handler(RefusedQueryError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed_inside)
    return app


def _health(health: HealthStatus) -> JSONResponse:
    return JSONResponse(health.model_dump(), 200 if health.ok else 503)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedQueryError)
    status = STATUS[error.code]
    headers = {"retry-after": "1"} if status == 503 else None
    return _failed(request, status, error.code, error.message, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer where the request is wrong, without the value found there: it may be personal, and of any length."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    problems = [
        f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"[:200] for one in islice(found, _SHOWN_PROBLEMS)
    ]
    shown = "; ".join(problems) + ("; …" if len(found) > _SHOWN_PROBLEMS else "")
    return _failed(request, 422, "invalid", shown)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "error")
    headers = dict(error.headers) if error.headers else None
    return _failed(request, error.status_code, code, str(error.detail), headers)


async def _failed_inside(request: Request, error: Exception) -> JSONResponse:
    """Answer 500 without a reason. `RequestMiddleware`, which gets the exception next, writes it to the log."""
    return _failed(request, 500, "internal", "The service failed; the request id names it in the log.")


def _failed(
    request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    request.state.code = code  # for `RequestMiddleware`, which counts it
    return JSONResponse(failure(request.state.request_id, code, message), status, headers)
