"""Before every route: tokens, rates, sizes, deadlines; errors that tell nothing, and one audit line a request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from raypipe.serving.config import LimitOptions
from raypipe.serving.lm_handler import Event
from raypipe.serving.lm_routes import add_lm_routes
from raypipe.serving.middleware import PUBLIC_PATHS, RateLimiter, RequestMiddleware
from raypipe.storage.online import OnlineStoreDownError
from raypipe.storage.store import Store
from raypipe.storage.tokens import Token, Tokens, hash_of
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.serving.local_service import CountedRequests, LocalService


@pytest.fixture(scope="module")
def service(shared: str) -> LocalService:
    return LocalService(shared, limits={"body_bytes": 20_000, "history": 50, "count": 20, "queries": 3})


def test_every_route_but_health_asks_for_a_token(service: LocalService) -> None:
    revoked = Tokens(Store(service.config.workspace)).make("left", 10, 10)
    Tokens(Store(service.config.workspace)).revoke("left")
    service.backend.watcher.refresh_tokens()
    kinds = [(method, route.path) for route in service.api.routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(kinds) > 30
    assert {"/v1/rerank", "/v1/explain/stream", "/docs"} <= {path for _, path in kinds}
    kinds = [(method, path) for method, path in kinds if path not in PUBLIC_PATHS]
    wrong = ("Bearer wrong", f"Basic {service.secret}", f"Bearer {revoked}", f"Bearer {hash_of(service.secret)}")
    refused = [{}, *({"Authorization": told} for told in wrong)]
    for method, route in [*kinds, ("GET", "/nothing"), ("GET", "/v1/health/"), ("GET", "//v1/health")]:
        for headers in refused:
            answer = service.client.request(method, f"http://testserver{route}", headers=headers)
            assert answer.status_code == 401, route
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or answer.json()["error"]["code"] == "unauthorised"
    assert {service.client.get(path).status_code for path in PUBLIC_PATHS} == {200}
    with pytest.raises(WebSocketDisconnect) as ended, service.client.websocket_connect("/v1/recommend"):
        pass
    assert ended.value.code == 1008
    assert service.client.get("/v1/ready", headers={"content-length": "9" * 19}).status_code == 401


def test_a_revoked_token_is_refused_and_the_others_are_not(raypipe: Run, ready: str) -> None:
    service = LocalService(ready)
    made = raypipe("token", "--workspace", ready, "--name", "shop")
    secret = made.metrics["token"]
    assert "shown once" in made.stderr
    service.backend.watcher.refresh_tokens()
    assert service.get("release", secret).status_code == 200
    assert raypipe("token", "--workspace", ready).metrics == {"tokens": ["shop", "tests"]}
    assert raypipe("token", "--workspace", ready, "--revoke", "shop").code == 0
    service.backend.watcher.refresh_tokens()
    assert service.get("release", secret).status_code == 401
    assert service.get("release").status_code == 200
    assert raypipe("token", "--workspace", ready).metrics == {"tokens": ["tests"]}
    for options, told in (
        (("--name", "shop"), "There is a token shop already"),
        (("--name", "../x"), "is no name for a token"),
        (("--revoke", "nobody"), "There is no token nobody"),
        (("--revoke", "shop", "--name", "b"), "Both --name and --revoke"),
    ):
        ended = raypipe("token", "--workspace", ready, *options)
        assert ended.code == 2
        assert told in one_paragraph(ended.stderr)
    kept = "".join(path.read_text() for path in Path(ready).rglob("*.json"))
    assert hash_of(secret) in kept
    assert secret not in kept


def test_a_token_that_asks_too_often_is_told_when_to_come_back(ready: str) -> None:
    service = LocalService(ready)
    slow = Tokens(Store(ready)).make("slow", 0.5, 2)
    service.backend.watcher.refresh_tokens()
    assert [service.get("release", slow).status_code for _ in range(3)] == [200, 200, 429]
    refused = service.get("release", slow)
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert int(refused.headers["retry-after"]) in {1, 2}
    assert service.get("release").status_code == 200


def test_a_bucket_fills_again_at_its_rate() -> None:
    now = 100.0
    rates = RateLimiter(lambda: now)
    token = Token("a", "h", 2.0, 3, 0.0)
    assert [rates.wait_s(token) for _ in range(4)] == [0, 0, 0, 0.5]
    now += 1.0
    assert [rates.wait_s(token) for _ in range(3)] == [0, 0, 0.5]
    now += 1000.0
    assert [rates.wait_s(token) for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_batch_is_as_many_requests_as_it_has_queries(ready: str) -> None:
    service = LocalService(ready)
    slow = Tokens(Store(ready)).make("slow", 0.5, 4)
    service.backend.watcher.refresh_tokens()
    batch = {"queries": [{"user_id": f"u{number}"} for number in range(7)]}
    assert service.post("recommend/batch", batch, slow).status_code == 200
    refused = service.get("release", slow)
    assert refused.status_code == 429
    # Three are owed and one more is needed, at one in two seconds.
    assert int(refused.headers["retry-after"]) in {7, 8}


def test_what_is_too_much_is_refused_before_any_work(service: LocalService) -> None:
    cases = [
        ("recommend", {"history": ["i1"] * 51}, "history has 51, and 50 are the most."),
        ("recommend", {"history": ["i1"], "count": 21}, "count has 21, and 20 are the most."),
        ("recommend", {"history": ["i1"], "deny": ["i1"] * 51}, "deny has 51"),
        ("score", {"history": ["i1"], "items": ["i1"] * 21}, "items has 21"),
        ("recommend/batch", {"queries": [{"history": []}] * 4}, "A batch has at most 3 queries."),
        ("recommend/batch", {"queries": [{"history": ["i1"] * 51}]}, "history has 51"),
        ("recommend", {"history": ["i" * 300] * 100}, "A request has at most 20,000 bytes."),
    ]
    for route, body, told in cases:
        answer = service.post(route, body)
        assert answer.status_code == 413, body
        assert told in answer.json()["error"]["message"]

    def chunks():
        for _ in range(100):
            yield b"x" * 1000

    headers = {"Authorization": f"Bearer {service.secret}"}
    streamed = service.client.post("/v1/recommend", content=chunks(), headers=headers)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (413, "too_large")


def test_a_wrong_request_is_told_where_it_is_wrong_and_nothing_of_what_it_said(service: LocalService) -> None:
    cases = [
        ({}, "give user_id or history, one of the two"),
        ({"user_id": "u1", "history": []}, "give user_id or history, one of the two"),
        ({"user_id": "u1", "limit": 3}, "body.limit"),
        ({"user_id": ["secret-person"]}, "body.user_id"),
        ({"history": "secret-person"}, "body.history"),
        ({"history": [1, None, {}]}, "body.history.0"),
        ({"user_id": ""}, "body.user_id"),
        ({"user_id": "u1", "count": 0}, "body.count"),
        ({"user_id": "u1", "count": "secret-person"}, "body.count"),
    ]
    for body, told in cases:
        answer = service.post("recommend", body)
        assert answer.status_code == 422, body
        assert told in answer.json()["error"]["message"]
        assert "secret-person" not in answer.text
    headers = {"Authorization": f"Bearer {service.secret}"}
    assert service.client.post("/v1/recommend", content=b"\xff{", headers=headers).status_code in {400, 422}
    assert service.client.get("/v1/recommend", headers=headers).json()["error"]["code"] == "no_such_method"


def test_an_error_of_ours_tells_nothing_of_itself(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(queries: object) -> None:
        raise RuntimeError("the database password is hunter2")

    monkeypatch.setattr(service.backend.service, "answer", fail)
    answer = service.post("recommend", {"user_id": "u1"}, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert "hunter2" not in answer.text
    assert (answer.json()["request_id"], answer.headers["x-request-id"]) == ("mine-1", "mine-1")
    assert "mine-1" in caplog.text


def test_one_audit_line_a_request_without_personal_text(
    service: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raypipe.audit"):
        service.get("users/u7")
        service.post("recommend", {"history": ["i1", "a-private-title"]}, headers={"x-request-id": "bad id\t!"})
        service.client.get("/v1/users/u7")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "raypipe.audit"]
    assert [(line["token"], line["route"].split("{")[0], line["status"]) for line in lines] == [
        ("tests", "/v1/users/", 200),
        ("tests", "/v1/recommend", 200),
        (None, "none", 401),
    ]
    assert all(re.fullmatch("[0-9a-f]{32}", line["request_id"]) for line in lines)
    assert not re.search("u7|i1|private", json.dumps([{**line, "request_id": ""} for line in lines]))
    assert service.metrics.requests[-1] == ("none", 401, "unauthorised")


def test_requests_are_counted_by_what_became_of_them(ready: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = LocalService(ready, limits={"deadline_s": 0.2, "body_bytes": 20_000})

    def fail(version: str, users: object) -> None:
        raise OnlineStoreDownError("It is gone.")

    async def hang(query: object) -> None:
        await asyncio.sleep(60)

    async def break_down(query: object) -> None:
        raise RuntimeError

    async def not_ready(query: object) -> AsyncIterator[Event]:
        async def events() -> AsyncIterator[Event]:
            yield "decision", {"decision": "yes"}
            yield "error", {"code": "not_ready", "message": "It is gone."}

        return events()

    service.get("release")
    service.get("users/nobody")
    service.post("recommend", {"user_id": ["u1"]})
    service.post("recommend", {"history": ["i" * 300] * 100})
    with monkeypatch.context() as broken:
        broken.setattr(service.backend.service.store, "get", fail)
        service.post("recommend", {"user_id": "u1"})
        batch = service.post("recommend/batch", {"queries": [{"history": ["i1"]}, {"user_id": "u1"}]})
        assert [answer.get("code") for answer in batch.json()["answers"]] == [None, "store_down"]
    service.post("recommend/batch", {"queries": [{"user_id": "nobody"}]})
    monkeypatch.setattr(service.backend, "stream", not_ready)
    service.post("explain/stream", {"user_id": "u1", "item_id": "i1"})
    for answer in (hang, break_down):
        monkeypatch.setattr(service.backend, "answer", answer)
        service.post("recommend", {"user_id": "u1"})
    assert service.metrics.requests == [
        ("/v1/release", 200, "none"),
        ("/v1/users/{user_id:path}", 404, "no_such_user"),
        ("/v1/recommend", 422, "invalid"),
        ("none", 413, "too_large"),
        ("/v1/recommend", 503, "store_down"),
        ("/v1/recommend/batch", 200, "store_down"),
        ("/v1/recommend/batch", 200, "none"),
        ("/v1/explain/stream", 200, "not_ready"),
        ("/v1/recommend", 503, "deadline"),
        ("/v1/recommend", 500, "internal"),
    ]


async def _exchange(
    app: Callable, limits: LimitOptions, path: str = "/x", lm_paths: Collection[str] = ()
) -> tuple[int, dict[str, str], bytes]:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    secret = "s"
    tokens = {hash_of(secret): Token("t", hash_of(secret), 1, 1, 0.0)}
    scope = {"type": "http", "path": path, "method": "GET", "headers": [(b"authorization", b"Bearer s")]}
    await RequestMiddleware(app, lm_paths, lambda: tokens, limits, CountedRequests())(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_request_past_its_deadline_is_given_up_clearly() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    status, headers, body = asyncio.run(_exchange(never, LimitOptions(deadline_s=0.05)))
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "deadline"


def test_every_route_that_asks_the_language_model_has_the_time_that_words_take(service: LocalService) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    added = FastAPI(openapi_url=None)
    add_lm_routes(added, service.backend, service.config.limits)
    routes = {route.path for route in added.routes if isinstance(route, APIRoute)}
    assert {"/v1/next", "/v1/next/batch", "/v1/explain/stream", "/v1/summary"} <= routes
    limits, lm_paths = LimitOptions(deadline_s=0.02, words_s=60), service.api.state.lm_paths
    for path in (*sorted(routes), "/v1/recommend", "/v1/explanations"):
        status, _, _ = asyncio.run(_exchange(slow, limits, path, lm_paths))
        assert status == (200 if path in routes else 503), path


TEXT = st.text(max_size=40)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
HISTORY = st.lists(TEXT | st.sampled_from([f"i{n}" for n in range(1, 40)]), max_size=30)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    body=ANYTHING
    | st.fixed_dictionaries(
        {},
        optional={
            "user_id": ANYTHING,
            "history": HISTORY | ANYTHING,
            "count": st.integers(-5, 30) | ANYTHING,
            "only": ANYTHING,
            "deny": HISTORY | ANYTHING,
            "filter_seen": ANYTHING,
            "items": HISTORY,
        },
    )
    | st.fixed_dictionaries({"history": HISTORY, "deny": HISTORY, "count": st.integers(1, 20)}),
    route=st.sampled_from(["recommend", "score", "summary", "recommend/batch"]),
)
def test_no_request_whatever_it_says_is_an_error_of_ours(service: LocalService, body: object, route: str) -> None:
    # Lone surrogates are no UTF-8; JSON carries them escaped all the same.
    headers = {"Authorization": f"Bearer {service.secret}", "content-type": "application/json"}
    answer = service.client.post(f"/v1/{route}", content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code in {200, 400, 404, 413, 422}, answer.text
    if answer.status_code != 200:
        assert set(answer.json()) == {"error", "request_id"}
