"""Answers over HTTP: equal to the tables, to the model, and clear about what cannot be answered."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.guided import GuidedOptions
from raypipe.recommenders.sequences import Sequences
from raypipe.storage.models import Models
from raypipe.storage.nights import Nights
from raypipe.storage.online import open_online_store
from raypipe.storage.store import Store
from tests.conftest import Run, need_redis_client
from tests.made import LENGTH, MODEL, make_ready
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_LENGTH, CHAIN_USERS, newest
from tests.serving.local_service import LocalService

TOLD = ("explain", "interpret", "residual", "oracle", "summary", "rerank", "next")


@pytest.fixture(scope="module")
def service(shared: str) -> LocalService:
    return LocalService(shared)


def ids(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def rows(uri: str | Path, table: str) -> dict[str, dict[str, Any]]:
    return {row["user_id"]: row for row in newest(str(uri), table).to_pylist()}


def history_of(uri: str | Path, user: str) -> list[str]:
    return [f"i{item}" for item in rows(uri, "histories")[user]["items"]]


def test_everybody_is_recommended_what_the_night_recommends(service: LocalService, ready_once: Path) -> None:
    listed = rows(ready_once, "recommendations")
    assert len(listed) == CHAIN_USERS
    queries = [{"user_id": user, "count": LENGTH} for user in listed]
    together = service.post("recommend/batch", {"queries": queries}).json()["answers"]
    for (user, row), answer in zip(listed.items(), together, strict=True):
        alone = service.post("recommend", {"user_id": user, "count": LENGTH}).json()
        history = service.post("recommend", {"history": history_of(ready_once, user), "count": LENGTH}).json()
        assert (alone["basis"], alone["known"], history["known"]) == ("model", True, False)
        for found in (alone, history, answer):
            assert [item["item_id"] for item in found["items"]] == [f"i{item}" for item in row["items"]]
            scores = np.array([item["score"] for item in found["items"]], np.float32)
            # The order of summation differs with the batch: by a few units in the last of float32's 24 bits.
            np.testing.assert_allclose(scores, row["scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_states", [True, False])
def test_a_model_that_knows_users_gives_them_the_nights_lists(raypipe: Run, tmp_path: Path, with_states: bool) -> None:
    uri = str(tmp_path / "guided")
    make_ready(uri, MODEL.model_copy(update={"guided": GuidedOptions(scores="made up")}))
    if not with_states:
        night = Nights(Store(uri)).current()
        assert night is not None
        tables = {name: version for name, version in night.tables.items() if name != "hidden_states"}
        Nights(Store(uri)).publish(replace(night, tables=tables))
    assert raypipe("online", "--workspace", uri).metrics["states"] == CHAIN_USERS * with_states
    guided = LocalService(uri)
    listed = rows(uri, "recommendations")
    queries = [{"user_id": user, "count": LENGTH} for user in listed]
    answers = guided.post("recommend/batch", {"queries": queries}).json()["answers"]
    for row, answer in zip(listed.values(), answers, strict=True):
        assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in row["items"]]
    # Who only has the same history is somebody else.
    same = [{"history": history_of(uri, user), "count": LENGTH} for user in listed]
    others = guided.post("recommend/batch", {"queries": same}).json()["answers"]
    assert sum(one["items"] != other["items"] for one, other in zip(answers, others, strict=True)) > CHAIN_USERS / 2


def test_a_history_is_answered_by_the_model_itself(service: LocalService, ready_once: Path) -> None:
    store = Store(str(ready_once))
    model = Models(store).newest("sasrec")
    assert model is not None
    recommender, _ = load_recommender(store.local_path(f"{model.folder}/checkpoint"))
    history = [3, 4, 5, 6]
    scores = recommender.score(recommender.encode(Sequences.of([history])))[0].detach()
    given = [f"i{item}" for item in history]
    answer = service.post("score", {"history": given, "items": ["i7", "i1", "nothing", "i30"]}).json()
    assert [item["item_id"] for item in answer["items"]] == ["i7", "i1", "nothing", "i30"]
    found = [item["score"] for item in answer["items"]]
    assert found[2] is None
    np.testing.assert_allclose([found[0], found[1], found[3]], scores[[7, 1, 30]].numpy(), rtol=1e-5)
    everything = service.post("recommend", {"history": given, "count": CHAIN_ITEMS, "filter_seen": False})
    scores[0] = -torch.inf
    assert ids(everything) == [f"i{item}" for item in scores.topk(CHAIN_ITEMS).indices.tolist()]


def test_filters_hold_for_the_one_who_asked_alone(service: LocalService) -> None:
    history = ["i3", "i4", "i5"]
    plain = ids(service.post("recommend", {"history": history, "count": 4}))
    assert not set(plain) & set(history)
    denied = {"history": history, "count": 4, "deny": [plain[0], "unheard of"]}
    war = {"history": history, "count": 30, "only": {"genre": "War"}}
    seen = {"history": history, "count": 30, "filter_seen": False}
    wrong = {"history": history, "only": {"genre": "Poetry"}}
    batch = [{"history": history, "count": 4}, denied, war, wrong, seen]
    answers = service.post("recommend/batch", {"queries": batch}).json()["answers"]
    lists = [[item["item_id"] for item in answer.get("items", [])] for answer in answers]
    assert lists[0] == plain
    assert lists[1][:3] == plain[1:]
    assert set(lists[2]) == {f"i{n}" for n in range(1, CHAIN_ITEMS + 1) if (n - 1) % 5 == 2} - set(history)
    assert answers[3] == {
        "code": "no_such_value",
        "message": "No item has 'Poetry' in its attribute 'genre'; values are compared exactly.",
    }
    assert len(lists[4]) == CHAIN_ITEMS
    refused = service.post("recommend", wrong)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_such_value")


def test_who_is_not_known_gets_what_is_popular(service: LocalService, ready_once: Path) -> None:
    events = [item for row in rows(ready_once, "histories").values() for item in row["items"]]
    counts = np.bincount(events, minlength=CHAIN_ITEMS + 1)
    best = [f"i{item}" for item in np.argsort(-counts, kind="stable")[:3]]
    for who in ({"user_id": "stranger"}, {"history": []}, {"history": ["unheard of", "🙂"]}):
        answer = service.post("recommend", {**who, "count": 3}).json()
        assert (answer["basis"], answer["known"]) == ("popular", False)
        assert answer["unknown_items"] == len(who.get("history", []))
        assert [item["score"] for item in answer["items"]] == [None] * 3
        assert [item["item_id"] for item in answer["items"]] == best
    filtered = service.post("recommend", {"user_id": "stranger", "count": 30, "only": {"genre": "War"}}).json()
    assert {(int(item["item_id"][1:]) - 1) % 5 for item in filtered["items"]} == {2}
    scores = service.post("score", {"user_id": "stranger", "items": ["i1"]}).json()
    assert scores["items"] == [{"item_id": "i1", "score": None}]


def test_a_user_is_shown_as_the_night_left_them(service: LocalService, ready_once: Path) -> None:
    found = service.get("users/u7").json()
    assert (found["user_id"], found["events"]) == ("u7", CHAIN_LENGTH)
    assert [item["item_id"] for item in found["history"]] == history_of(ready_once, "u7")
    listed = rows(ready_once, "recommendations")["u7"]
    assert [(item["item_id"], item["score"]) for item in found["recommended"]] == [
        (f"i{item}", score) for item, score in zip(listed["items"], listed["scores"], strict=True)
    ]
    text = rows(ready_once, "summaries")["u7"]["summary"]
    assert found["summaries"] == {"hierarchical": text}
    assert service.post("summary", {"user_id": "u7"}).json()["summaries"] == {"hierarchical": text}
    assert found["served"] == service.post("recommend", {"user_id": "u7"}).json()["served"]
    for answer in (service.get("users/stranger"), service.get("users/a/b"), service.post("summary", {"user_id": "x"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_user")


def test_summaries_of_a_batch_are_of_one_look_at_the_store(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"u{n}" for n in range(1, 6)]
    alone = [service.post("summary", {"user_id": user}).json() for user in users]
    store, looked = service.backend.service.store, []
    get = store.get

    def watched(version: str, asked: list[str]) -> list[bytes | None]:
        looked.append(list(asked))
        return get(version, asked)

    monkeypatch.setattr(store, "get", watched)
    together = service.post("summary/batch", {"queries": [{"user_id": user} for user in users]}).json()["answers"]
    assert (together, looked) == (alone, [users])
    assert all(answer["summaries"] for answer in alone)


def test_what_is_served_is_told(service: LocalService) -> None:
    told = service.get("release").json()
    assert told["recommender"].startswith("sasrec/")
    assert (told["items"], told["night"], told["night_in_force"]) == (CHAIN_ITEMS, "2026-01-05", "2026-01-05")
    assert told["refused"] == {}
    assert set(
        service.client.get("/openapi.json", headers={"Authorization": f"Bearer {service.secret}"}).json()["paths"]
    ) == {
        "/v1/recommend",
        "/v1/recommend/batch",
        "/v1/score",
        "/v1/score/batch",
        "/v1/users",
        "/v1/users/{user_id}",
        *(f"/v1/{told}" for told in TOLD),
        *(f"/v1/{told}/batch" for told in TOLD),
        "/v1/explain/stream",
        "/v1/release",
        "/v1/health",
        "/v1/ready",
    }


def test_denied_items_are_in_no_list_and_a_mistyped_one_is_told(
    ready: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_text("i1\ni2\nI3\n")
    service = LocalService(ready, deny=str(deny))
    assert "1 of 3 denied ids are no item's and deny nothing, for example 'I3'" in caplog.messages
    for who in ({"user_id": "stranger"}, {"user_id": "u1"}, {"history": ["i9"]}):
        found = ids(service.post("recommend", {**who, "count": 30, "filter_seen": False}))
        assert len(found) == CHAIN_ITEMS - 2
        assert not {"i1", "i2"} & set(found)


def test_without_its_store_the_service_answers_histories_and_says_so_of_users(ready: str) -> None:
    service = LocalService(ready)
    for path in (Path(ready) / "online").iterdir():
        path.unlink()
    assert len(ids(service.post("recommend", {"history": ["i3"], "count": 4}))) == 4
    down = service.post("recommend", {"user_id": "u1"})
    assert (down.status_code, down.json()["error"]["code"], down.headers["retry-after"]) == (503, "store_down", "1")
    queries = [{"user_id": "u1"}, {"history": ["i3"]}]
    mixed = service.post("recommend/batch", {"queries": queries}).json()["answers"]
    assert (mixed[0]["code"], mixed[1]["basis"]) == ("store_down", "model")


def test_a_store_that_hangs_does_not_keep_histories_waiting(ready: str) -> None:
    need_redis_client()
    service = LocalService(ready)
    history = {"history": ["i3", "i4"]}
    wanted = service.post("recommend", history).json()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        service.backend.service.store = open_online_store(url, Store(ready))
        for most_s in (1.0, 0.3):
            started = time.monotonic()
            unknown, known = service.post("recommend/batch", {"queries": [{"user_id": "u1"}, history]}).json()[
                "answers"
            ]
            assert time.monotonic() - started < most_s
            assert (unknown["code"], known) == ("store_down", wanted)
