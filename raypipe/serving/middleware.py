"""The middleware before every route: it checks token, rate, size and deadline, and writes an audit line.

The audit line holds no personal text. The middleware is plain ASGI, so that a body is counted while it arrives and a
stream is passed on as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raypipe.serving import page, swagger
from raypipe.serving.config import LimitOptions
from raypipe.storage.tokens import Token, hash_of

AUDIT = logging.getLogger("raypipe.audit")
_LOG = logging.getLogger("raypipe.serving")
HEALTH_PATH = "/v1/health"
PUBLIC_PATHS = frozenset({HEALTH_PATH, *page.FILES, swagger.DOCS_PATH, swagger.OPENAPI_PATH, *swagger.FILES})
"""Routes that need no token: health, and the pages into which a user types one, which hold no data."""
UNAUTHORISED = "unauthorised", "Send a valid token: Authorization: Bearer TOKEN."
"""Code and message of every 401."""
_GRACE_S = 2.0  # A request to the language model times out by itself first, with its own message.
_TOO_LARGE = "A request has at most {:,} bytes."
_SIZE = re.compile(r"[0-9]{1,18}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMetrics(Protocol):
    """Counts requests. `code` is that of a failure, else `none`."""

    def request(self, route: str, status: int, code: str, seconds: float) -> None: ...


class RateLimiter:
    """A bucket of requests for each token: it holds `burst` requests and refills at `requests_per_s`.

    Every replica counts by itself. A batch counts as many requests as it has queries. It is accepted if one request is
    left; the token then owes the rest, and waits the longer for its next request.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def wait_s(self, token: Token) -> float:
        """Take one request and return 0 if the token may ask now, else return the seconds until it may."""
        now = self._clock()
        left, then = self._left.get(token.sha256, (float(token.burst), now))
        left = min(float(token.burst), left + (now - then) * token.requests_per_s)
        allowed = left >= 1
        self._left[token.sha256] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / token.requests_per_s

    def charge(self, token: Token, queries: int) -> None:
        """Take so many more `queries` from a token that was allowed to ask."""
        left, then = self._left[token.sha256]
        self._left[token.sha256] = (left - queries, then)


class RequestMiddleware:
    """ASGI middleware around the routes.

    `tokens` returns the tokens that are valid now, by hash; `lm_paths` are the paths that ask the language model.
    """

    def __init__(
        self,
        app: ASGIApp,
        lm_paths: Collection[str],
        tokens: Callable[[], Mapping[str, Token]],
        limits: LimitOptions,
        metrics: RequestMetrics,
    ) -> None:
        self.app, self.lm_paths, self.tokens, self.limits, self.metrics = app, lm_paths, tokens, limits, metrics
        self.limiter = RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # No other kind of route exists. Left unanswered, the connection would count as an error of the server.
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        started = time.monotonic()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0
        wait_s = self.limits.deadline_s
        if scope["path"] in self.lm_paths:
            wait_s = self.limits.words_s + _GRACE_S

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(request_id)]
            await send(message)

        token: Token | None = None
        try:
            token = self._token(headers)
            refusal = self._refusal(scope, headers, token)
            if refusal is not None:
                state["code"] = refusal[1]
                await _refuse(send_with_headers, request_id, *refusal)
                return
            if token is not None:
                state["charge"] = partial(self.limiter.charge, token)
            async with asyncio.timeout(wait_s):
                await self.app(scope, _limited(receive, self.limits.body_bytes), send_with_headers)
        except TimeoutError:
            state.setdefault("code", "deadline")
            if not status:
                message = f"No answer within {wait_s:g} s: ask again later."
                await _refuse(send_with_headers, request_id, 503, "deadline", message, 1)
        except Exception:
            # The traceback goes to the log only.
            _LOG.exception("request %s failed", request_id)
            state["code"] = "internal"
            if not status:
                await _refuse(
                    send_with_headers,
                    request_id,
                    500,
                    "internal",
                    "The service failed; the request id names it in the log.",
                )
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.request(route, status, state.get("code", "none"), seconds)
            line = {
                "time": round(time.time(), 3),
                "request_id": request_id,
                "token": token.name if token is not None else None,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
            }
            AUDIT.info(json.dumps(line))

    def _token(self, headers: Mapping[str, str]) -> Token | None:
        kind, _, secret = headers.get("authorization", "").partition(" ")
        return self.tokens().get(hash_of(secret.strip())) if kind.lower() == "bearer" else None

    def _refusal(
        self, scope: Scope, headers: Mapping[str, str], token: Token | None
    ) -> tuple[int, str, str, float] | None:
        """Status, code, message and seconds to wait if the request is refused, else None."""
        if scope["path"] not in PUBLIC_PATHS:
            if token is None:
                return 401, *UNAUTHORISED, 0
            if wait := self.limiter.wait_s(token):
                return 429, "too_many_requests", f"The token {token.name} asks too often.", wait
        size = headers.get("content-length", "0")
        if not _SIZE.fullmatch(size) or int(size) > self.limits.body_bytes:
            return 413, "too_large", _TOO_LARGE.format(self.limits.body_bytes), 0
        return None


def _limited(receive: Receive, most: int) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            # FastAPI passes on no other exception that is raised while it reads a body.
            raise HTTPException(413, _TOO_LARGE.format(most))
        return message

    return limited


def _request_id(headers: Mapping[str, str]) -> str:
    """The caller's own request id if it is fit for a log line, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _headers(request_id: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


async def _refuse(send: Send, request_id: str, status: int, code: str, message: str, retry_after_s: float = 0) -> None:
    body = json.dumps(failure(request_id, code, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after_s:
        headers.append((b"retry-after", str(math.ceil(retry_after_s)).encode()))
    # The client may have disconnected.
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def failure(request_id: str, code: str, message: str) -> dict[str, Any]:
    """The body of an answer that reports a failure."""
    return {"error": {"code": code, "message": message}, "request_id": request_id}
