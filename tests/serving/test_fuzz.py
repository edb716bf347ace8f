"""Requests that nobody in their right mind would send: none is an error of ours, and none leaves anything behind."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
import unicodedata

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.serving.lm_release import SHORT
from tests.serving.local_service import LocalService

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = ("recommend", "score", "explain", "interpret", "residual", "oracle", "summary", "rerank", "next")
MIB = 2**20


@pytest.fixture(scope="module")
def service(shared_lm: str) -> LocalService:
    return LocalService(shared_lm, language=SHORT, limits={"history": 200_000, "body_bytes": 20 * MIB})


def test_every_route_answers_as_its_description_says(service: LocalService) -> None:
    headers = {"Authorization": f"Bearer {service.secret}"}
    described = schemathesis.openapi.from_asgi("/openapi.json", service.middleware, headers=headers)
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask_anything(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS)

        ask_anything()


def histories() -> list[object]:
    """Of every script, of any length, and of what is no history."""
    rng = random.Random(0)
    letters = [chr(code) for code in range(0x20, 0x30000, 97) if unicodedata.category(chr(code)) != "Cs"]
    scripts = [["".join(rng.sample(letters, 6)) for _ in range(8)] for _ in range(12)]
    known = [f"i{n}" for n in range(1, CHAIN_ITEMS + 1)]
    mixed = [[*rng.choices(known, k=5), *one] for one in scripts]
    lengths = [rng.choices(known, k=length) for length in (0, 1, 2, 7, 100, 5_000)]
    unfit = ["i1", 7, None, {"i1": 1}, [[]], [None], [1.5], ["\ud800"], ["\x00"], ["i1" * 300], [""], [True], [{}]]
    return [*scripts, *mixed, *lengths, *unfit]


def ask(service: LocalService, route: str, history: object) -> int:
    body: dict[str, object] = {"history": history}
    if route == "score":
        body["items"] = ["i1", "\U0001f642"]
    headers = {"Authorization": f"Bearer {service.secret}", "content-type": "application/json"}
    answer = service.client.post(f"/v1/{route}", content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code in {200, 413, 422}, (route, answer.text[:500])
    return int(answer.status_code)


@pytest.mark.parametrize("route", ROUTES)
def test_no_history_is_an_error_of_ours(service: LocalService, route: str) -> None:
    statuses = {ask(service, route, history) for history in histories()}
    assert statuses >= {200, 422}
    # Who has seen everything is recommended nothing that could be explained or put in order.
    assert ask(service, route, [f"i{n % 40}" for n in range(100_000)]) == (
        422 if route in {"explain", "rerank"} else 200
    )


def test_histories_leave_nothing_behind(service: LocalService) -> None:
    fuzz = histories()

    def round_of_requests() -> int:
        for history in fuzz:
            ask(service, "recommend", history)
            ask(service, "score", history)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        round_of_requests()
        before = round_of_requests()
        after = [round_of_requests() for _ in range(3)][-1]
    finally:
        tracemalloc.stop()
    assert after - before < MIB / 2
