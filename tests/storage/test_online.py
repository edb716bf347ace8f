"""The online stores: one contract, a real Redis and files; and what a record holds."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raypipe.errors import UsageError
from raypipe.storage.nights import Night
from raypipe.storage.online import OnlineStore, OnlineStoreDownError, UserRecord, open_online_store, version_of
from raypipe.storage.online_embedded import EmbeddedStore
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import need_redis_client, running_redis
from tests.redis_server import RedisServer

BUCKETS = 4


@pytest.fixture(params=["embedded", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else None
    return open_online_store(url, Store(str(tmp_path)))


def load(store: OnlineStore, version: str, users: list[str], word: str = "") -> None:
    """A whole version of records that name their user."""
    missing = set(range(BUCKETS)) - store.begin(version, BUCKETS)
    for bucket, mine in by_bucket(users).items():
        if bucket in missing:
            store.write(version, bucket, mine, [f"{user}{word}".encode() for user in mine])
    store.complete(version, {"night": version, "users": len(users)})


def by_bucket(users: list[str]) -> dict[int, list[str]]:
    import pyarrow as pa

    from raypipe.storage.hashing import stable_hash

    homes = (stable_hash(pa.array(users)) % np.uint64(BUCKETS)).tolist()
    return {
        bucket: [user for user, home in zip(users, homes, strict=True) if home == bucket] for bucket in range(BUCKETS)
    }


USERS = [f"u{n}" for n in range(1200)] + ["ключ", "", "a:b\0c", "x" * 3000]


def test_a_complete_version_gives_every_user_and_nothing_of_strangers(store: OnlineStore) -> None:
    load(store, "v1", USERS)
    assert store.get("v1", USERS) == [user.encode() for user in USERS]
    assert store.get("v1", ["nobody", "u7", "U7"]) == [None, b"u7", None]
    assert store.get("v1", []) == []
    assert store.facts("v1") == {"night": "v1", "users": len(USERS)}
    assert store.versions() == ["v1"]
    assert len(USERS) * 4 < store.size("v1") < len(USERS) * 400


def test_a_version_is_not_there_before_it_is_complete(store: OnlineStore) -> None:
    load(store, "v1", ["u1"])
    assert store.begin("v2", BUCKETS) == set()
    store.write("v2", 0, ["u1"], [b"half"])
    assert (store.facts("v2"), store.facts("v3")) == (None, None)
    assert store.versions() == ["v1", "v2"]
    for version in ("v2", "v3"):
        with pytest.raises(OnlineStoreDownError, match="does not hold the night in force"):
            store.get(version, ["u1"])
    assert store.get("v1", ["u1"]) == [b"u1"]


def test_an_interrupted_load_goes_on_where_it_stopped(store: OnlineStore) -> None:
    parts = by_bucket(USERS)
    store.begin("v1", BUCKETS)
    store.write("v1", 2, parts[2], [b"first"] * len(parts[2]))
    assert store.begin("v1", BUCKETS) == {2}
    load(store, "v1", USERS)
    expected = {user: user.encode() for user in USERS} | dict.fromkeys(parts[2], b"first")
    assert dict(zip(USERS, store.get("v1", USERS), strict=True)) == expected


_KILLED_AT_THE_LAST_ROW = """
import os, signal, sys
from pathlib import Path
from raypipe.storage.online_embedded import EmbeddedStore

class Records(list):
    def __iter__(self):
        yield from super().__iter__()
        os.kill(os.getpid(), signal.SIGKILL)

rows = int(sys.argv[2])
store = EmbeddedStore(Path(sys.argv[1]))
store.begin("v1", 2)
store.write("v1", 0, ["u0"], [b"whole"])
store.write("v1", 1, [f"u{n}" for n in range(1, rows)], Records([b"half" * 1000] * (rows - 1)))
"""


# So many rows are more than SQLite keeps in memory: they are in the file before they are committed.
@pytest.mark.parametrize("rows", [5, 3000])
def test_a_load_that_was_killed_between_two_rows_is_no_version_yet_and_can_be_finished(
    rows: int, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED_AT_THE_LAST_ROW, str(tmp_path), str(rows)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "v1.sqlite-journal").exists()
    store = EmbeddedStore(tmp_path)
    assert store.facts("v1") is None
    assert store.begin("v1", 2) == {0}
    store.write("v1", 1, ["u1"], [b"again"])
    store.complete("v1", {"users": 2})
    assert store.facts("v1") == {"users": 2}
    assert store.get("v1", ["u0", "u1", "u2"]) == [b"whole", b"again", None]


def test_versions_lie_side_by_side_and_a_dropped_one_is_gone(store: OnlineStore) -> None:
    load(store, "v1", USERS, "-old")
    load(store, "v2", USERS, "-new")
    assert (store.get("v1", ["u1"]), store.get("v2", ["u1"])) == ([b"u1-old"], [b"u1-new"])
    store.drop("v1")
    store.drop("v1")
    assert store.versions() == ["v2"]
    assert store.facts("v1") is None
    assert store.get("v2", ["u1"]) == [b"u1-new"]
    store.begin("v3", BUCKETS)
    store.write("v3", 1, ["u1"], [b"half"])
    store.drop("v3")
    assert store.versions() == ["v2"]
    assert store.begin("v3", BUCKETS) == set()


def test_whoever_has_read_a_version_reads_nobody_of_it_once_it_is_dropped(store: OnlineStore) -> None:
    load(store, "v1", USERS)
    assert store.get("v1", ["u1"]) == [b"u1"]
    another = store if not isinstance(store, EmbeddedStore) else EmbeddedStore(store.folder)
    another.drop("v1")
    with pytest.raises(OnlineStoreDownError):
        store.get("v1", ["u1"])
    # Made anew, without her.
    load(another, "v1", ["u2"])
    assert store.get("v1", ["u1", "u2"]) == [None, b"u2"]


def test_a_version_whose_dropping_was_interrupted_is_loaded_from_its_beginning(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that was: a night that is put back in force while its version goes has everybody."""
    from raypipe.storage.online_redis import RedisStore

    store = open_online_store(redis_server.url, Store(str(tmp_path)))
    assert isinstance(store, RedisStore)
    execute, left = store._redis.execute_command, 0

    def interrupted(*command: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return execute(*command, **options)

    for before in range(20):
        load(store, "v1", USERS)
        left = before
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(store._redis, "execute_command", interrupted)
            store.drop("v1")
        if store.facts("v1") is None:
            load(store, "v1", USERS)
        assert store.get("v1", USERS) == [user.encode() for user in USERS]
        if left > 0:
            break
    assert 3 < before < 19


def test_two_workspaces_on_one_server_do_not_see_each_other(redis_server: RedisServer, tmp_path: Path) -> None:
    one, other = (open_online_store(redis_server.url, Store(str(tmp_path / name))) for name in ("one", "other"))
    load(one, "v1", ["u1"])
    assert (other.versions(), other.facts("v1")) == ([], None)


def test_a_redis_that_is_away_or_came_back_empty_is_no_answer_about_anybody(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        store = open_online_store(server.url, Store(str(tmp_path)))
        load(store, "v1", ["u1"])
        assert store.get("v1", ["u1"]) == [b"u1"]
        server.stop()
        with pytest.raises(OnlineStoreDownError, match="ConnectionError"):
            store.get("v1", ["u1"])
        server.start()
        with pytest.raises(OnlineStoreDownError, match="does not hold the night in force"):
            store.get("v1", ["u1"])
        load(store, "v1", ["u1"])
        assert store.get("v1", ["u1"]) == [b"u1"]


def test_of_a_version_that_is_not_there_nothing_is_kept_that_another_thread_could_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kept for a moment and taken away again, it would be gone between another's look and its read."""
    from raypipe.storage.online_redis import RedisStore

    class Watched(dict[str, int]):
        def __setitem__(self, version: str, buckets: int) -> None:
            assert buckets, "another thread may see this"
            super().__setitem__(version, buckets)

    store = RedisStore("redis://127.0.0.1:1/0", "raypipe")
    monkeypatch.setattr(store, "_buckets", Watched())
    monkeypatch.setattr(store, "_reader", SimpleNamespace(get=lambda _: None))
    with pytest.raises(OnlineStoreDownError, match="does not hold the night"):
        store.get("none", ["u1"])


def test_a_redis_that_hangs_costs_one_request_its_time_and_the_next_ones_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that accepts and says nothing, and a host that takes no connection."""
    need_redis_client()
    with socket.socket() as silent, socket.socket() as full, contextlib.ExitStack() as kept:
        for server, backlog in ((silent, 100), (full, 0)):
            server.bind(("127.0.0.1", 0))
            server.listen(backlog)
        for _ in range(4):
            filler = kept.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        time.sleep(0.2)
        for server in (silent, full):
            store = open_online_store(f"redis://127.0.0.1:{server.getsockname()[1]}/0", Store(str(tmp_path)))
            took = []
            for told in ("TimeoutError", "did not answer a moment ago"):
                started = time.monotonic()
                with pytest.raises(OnlineStoreDownError, match=told):
                    store.get("v1", ["u1"])
                took.append(time.monotonic() - started)
            assert took[0] < 1
            assert took[1] < 0.1
            now = time.monotonic()
            with monkeypatch.context() as later:
                later.setattr("raypipe.storage.online_redis.time.monotonic", lambda now=now: now + 3)
                with pytest.raises(OnlineStoreDownError, match="TimeoutError"):
                    store.get("v1", ["u1"])


def test_a_redis_that_forgets_under_pressure_is_refused(redis_server: RedisServer, tmp_path: Path) -> None:
    import redis

    store = open_online_store(redis_server.url, Store(str(tmp_path)))
    store.check_room()
    client = redis.Redis.from_url(redis_server.url)
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UsageError, match="forgets keys when its memory is full"):
            store.check_room()
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")


def test_a_record_is_what_was_packed() -> None:
    items, scores = np.array([5, 1, 9], np.int32), np.array([1.5, -0.25, np.nan], np.float32)
    whole = UserRecord(items, -(2**62), scores[:2], items, scores, {"hierarchical": "Likes ☕."})
    found = UserRecord.unpack(whole.pack())
    assert (found.items.tolist(), found.seed, found.summaries) == ([5, 1, 9], -(2**62), {"hierarchical": "Likes ☕."})
    for name in ("state", "listed", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    bare = UserRecord.unpack(UserRecord(items[:0], 1).pack())
    assert (bare.items.tolist(), bare.state, bare.listed, bare.summaries) == ([], None, None, None)


def test_nights_of_equal_rows_recommender_and_summaries_share_a_version(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "one"))
    for table, number in (("histories", 1), ("histories", 2), ("block_summaries", 1)):
        append_nothing(workspace, table, number)
    night = Night("2026-01-05", {"histories": 1}, {"recommender": "sasrec/a"}, {}, "summarize-recurrent")
    tables = {"histories": 1, "block_summaries": 0}
    version = version_of(workspace, night)
    assert version_of(workspace, replace(night, date="2026-01-06", tables=tables)) == version
    assert version_of(Workspace(workspace.uri), night) == version
    for other in (
        replace(night, tables={"histories": 0}),
        replace(night, release={"recommender": "sasrec/b"}),
        replace(night, summaries="summarize-hierarchical"),
    ):
        assert version_of(workspace, other) != version
    # A table made anew counts its versions from the first one on.
    anew = Workspace(str(tmp_path / "other"))
    for number in (1, 2):
        append_nothing(anew, "histories", number)
    assert anew.tables["histories"].version() == 1
    assert version_of(anew, night) != version


def append_nothing(workspace: Workspace, name: str, number: int) -> None:
    workspace.tables[name].publish([], mode="append", app="made", number=number)


def test_a_store_is_named_by_its_address(tmp_path: Path) -> None:
    local = open_online_store(None, Store(str(tmp_path)))
    assert isinstance(local, EmbeddedStore)
    assert local.folder == tmp_path / "online"
    folders = {open_online_store(str(tmp_path), Store(f"s3://bucket/{name}")).folder for name in ("one", "other")}
    assert len(folders) == 2, "two workspaces do not drop each other's versions"
    assert {folder.parent for folder in folders} == {tmp_path}
    for url, uri, told in (
        (None, "s3://bucket/ws", "no online store is named"),
        ("mysql://host", str(tmp_path), "'mysql' is no kind of online store"),
    ):
        with pytest.raises(UsageError, match=told):
            open_online_store(url, Store(uri))
