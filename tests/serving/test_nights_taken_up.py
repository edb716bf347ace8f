"""Which night a service takes up: the one in force once it is loaded, and until then the one that was loaded last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raypipe.serving.config import ServiceConfig
from raypipe.serving.queries import RecommendAnswer, RecommendQuery
from raypipe.serving.service import RefusedQueryError
from raypipe.storage.online import OnlineStoreDownError, open_online_store
from raypipe.storage.store import Store
from tests.conftest import Run, unavailable
from tests.made import add_events, publish
from tests.pipeline.small_logs import START
from tests.redis_server import RedisServer
from tests.serving.local_service import LocalBackend, LocalService


def test_a_night_is_seen_once_it_is_loaded_and_going_back_takes_one_command(raypipe: Run, ready: str) -> None:
    service = LocalService(ready)
    add_events(ready, [("u1", "i2", START + 1000), ("new", "i5", START + 1000)])
    publish(ready, "2026-01-06")
    service.backend.watcher.poll()
    told = service.get("release").json()
    assert (told["night"], told["night_in_force"]) == ("2026-01-05", "2026-01-06")
    assert service.get("users/new").status_code == 404
    assert service.get("users/u1").json()["events"] == 9

    assert raypipe("online", "--workspace", ready).code == 0
    service.backend.watcher.poll()
    assert service.get("release").json()["night"] == "2026-01-06"
    assert service.get("users/new").json()["events"] == 1
    assert service.get("users/u1").json()["events"] == 10

    assert raypipe("night", "--workspace", ready, "--restore", "2026-01-05").code == 0
    service.backend.watcher.poll()
    assert service.get("release").json()["night"] == "2026-01-05"
    assert service.get("users/new").status_code == 404
    assert service.post("recommend", {"user_id": "u1"}).json()["served"]["night"] == "2026-01-05"


def test_a_replica_that_starts_before_the_night_in_force_is_loaded_serves_the_one_that_was_loaded_last(
    raypipe: Run, ready: str
) -> None:
    add_events(ready, [("u1", "i2", START + 1000), ("new", "i5", START + 1000)])
    publish(ready, "2026-01-06")
    # Of a night that is no more, and one that was never whole.
    store = open_online_store(None, Store(ready))
    for version in ("gone", "begun"):
        store.begin(version, 1)
    store.complete("gone", {"night": "2026-01-04", "users": 0})
    replica = LocalBackend(ServiceConfig(workspace=ready))
    told = replica.release_status()
    assert (told.night, told.night_in_force) == ("2026-01-05", "2026-01-06")
    assert replica.service.user("u1").events == 9
    replica.watcher.poll()
    assert replica.release_status().night == "2026-01-05"

    assert raypipe("online", "--workspace", ready).code == 0
    replica.watcher.poll()
    assert replica.release_status().night == "2026-01-06"
    assert replica.service.user("u1").events == 10


@pytest.fixture
def redis_that_keeps(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, to be stopped, which remembers what it held."""
    pytest.importorskip("redis", reason="redis's client is not installed")
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis", keeps=True)
    try:
        server.start()
    except FileNotFoundError as error:
        unavailable(str(error))
    yield server
    server.stop()


@pytest.mark.parametrize("was_served", [True, False])
def test_a_replica_that_starts_while_redis_is_down_answers_by_history_and_takes_up_the_night_later(
    raypipe: Run, ready: str, redis_that_keeps: RedisServer, was_served: bool
) -> None:
    config = ServiceConfig(workspace=ready, store=redis_that_keeps.url)
    assert raypipe("online", "--workspace", ready, "--store", redis_that_keeps.url).code == 0
    queries = [RecommendQuery(user_id="u1"), RecommendQuery(history=["i3", "i4"])]
    if was_served:
        LocalBackend(config)
    else:
        Store(ready).delete(["releases/aliases/served.json"])
    redis_that_keeps.stop()

    replica = LocalBackend(config)
    by_id, by_history = replica.service.answer(queries)
    assert isinstance(by_id, RefusedQueryError)
    assert by_id.code == "store_down"
    assert isinstance(by_history, RecommendAnswer)
    assert (by_history.basis, len(by_history.items), by_history.served.night) == ("model", 10, None)
    with pytest.raises(OnlineStoreDownError):
        replica.watcher.poll()

    redis_that_keeps.start()
    replica.watcher.poll()
    by_id, again = replica.service.answer(queries)
    assert isinstance(by_id, RecommendAnswer)
    assert (by_id.known, by_id.served.night) == (True, "2026-01-05")
    assert isinstance(again, RecommendAnswer)
    assert [item.item_id for item in again.items] == [item.item_id for item in by_history.items]
