"""Candidates in the order of a release's language model: the order of batch, for whoever asks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Run
from tests.made import LENGTH
from tests.pipeline.small_logs import CHAIN_ITEMS, newest
from tests.serving.lm_release import SHORT
from tests.serving.local_service import LocalService
from tests.serving.test_lm_routes import history_of


@pytest.fixture(scope="module")
def service(shared_lm: str) -> LocalService:
    return LocalService(shared_lm, language=SHORT, limits={"ranked": 20})


def batch(raypipe: Run, uri: str, *options: str) -> list[dict[str, Any]]:
    """The rows that `rerank` leaves."""
    ended = raypipe("rerank", "--workspace", uri, *options)
    assert ended.code == 0, ended.stderr
    rows = [row for row in newest(uri, "recommendations").to_pylist() if row["variant"] == "rerank-sasrec"]
    assert len(rows) > 30
    return rows


def is_order_of(answer: dict[str, Any], row: dict[str, Any]) -> bool:
    items, scores = zip(*((item["item_id"], item["score"]) for item in answer["items"]), strict=True)
    assert scores == pytest.approx(row["scores"], rel=1e-5)
    return list(items) == [f"i{item}" for item in row["items"]]


@pytest.mark.usefixtures("ray_cluster")
def test_batch_and_online_put_lists_in_the_same_order(raypipe: Run, service: LocalService) -> None:
    """G7, in float32: of everybody, by user and by history, alone and together, with and without summaries."""
    uri = service.config.workspace
    rows = batch(raypipe, uri)
    asks = [{"user_id": row["user_id"], "count": LENGTH} for row in rows]
    together = service.post("rerank/batch", {"queries": asks}).json()["answers"]
    assert all(is_order_of(answer, row) for answer, row in zip(together, rows, strict=True))
    lists = {row["user_id"]: row for row in newest(uri, "recommendations").to_pylist() if row["variant"][:4] == "reco"}
    assert sum(row["items"] != lists[row["user_id"]]["items"] for row in rows) > 10, "it is the recommender's order"
    for row in rows[:5]:
        items = [f"i{item}" for item in sorted(row["items"])]
        for who in ({"user_id": row["user_id"]}, {"history": history_of(uri, row["user_id"])}):
            alone = service.post("rerank", {**who, "items": items}).json()
            assert is_order_of(alone, row)
            assert (alone["adapter"], alone["known"]) == ("trsr", "user_id" in who)

    summarised = batch(raypipe, uri, "--summaries", "hierarchical")
    assert [row["scores"] for row in summarised] != [row["scores"] for row in rows]
    shown = LocalService(uri, "shown", language={**SHORT, "ranking": "hierarchical"})
    together = shown.post("rerank/batch", {"queries": asks}).json()["answers"]
    assert all(is_order_of(answer, row) for answer, row in zip(together, summarised, strict=True))


def test_what_is_not_in_the_catalogue_is_last(service: LocalService) -> None:
    answer = service.post("rerank", {"history": ["i3", "gone"], "items": ["new", "i9", "i4"]}).json()
    assert {item["item_id"] for item in answer["items"][:2]} == {"i4", "i9"}
    assert answer["items"][0]["score"] > answer["items"][1]["score"]
    assert answer["items"][2] == {"item_id": "new", "title": "", "score": None}
    assert (answer["unknown_items"], answer["items"][0]["title"][:6]) == (1, "Title ")


def test_what_cannot_be_put_in_order_is_told(service: LocalService, ready: str) -> None:
    cases = [
        ({"user_id": "stranger"}, 404, "no_such_user"),
        ({"history": []}, 422, "nothing_known"),
        ({"history": ["unheard of"]}, 422, "nothing_known"),
        ({"history": ["i1"], "items": ["unheard of"]}, 422, "no_such_item"),
        ({"history": ["i1"], "items": []}, 422, "invalid"),
        ({"history": ["i1"], "items": ["i2"] * 21}, 413, "too_much"),
        ({"history": ["i1"], "count": 21}, 413, "too_much"),
        ({"history": ["i1"], "adapter": "recexplainer-h"}, 409, "no_adapter"),
        ({"history": [f"i{n}" for n in range(1, CHAIN_ITEMS + 1)]}, 422, "no_such_item"),
    ]
    for body, status, code in cases:
        answer = service.post("rerank", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), body
    silent = LocalService(service.config.workspace, "silent", language={**SHORT, "replicas": 0})
    assert silent.post("rerank", {"history": ["i1"]}).json()["error"]["code"] == "no_language_model"
    assert LocalService(ready).post("rerank", {"history": ["i1"]}).json()["error"]["code"] == "no_adapter"
