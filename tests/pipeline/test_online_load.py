"""`online`: the night in force into the store, whole, again after a kill, and back to the night before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raypipe.pipeline import online
from raypipe.pipeline.extract import state_recipe
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.nights import Night, Nights
from raypipe.storage.online import FORMAT, UserRecord, open_online_store, version_of
from raypipe.storage.online_embedded import EmbeddedStore
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import add_events, make_ready, publish, summarize
from tests.pipeline.small_logs import CHAIN_USERS, START, Event, newest
from tests.redis_server import RedisServer


@pytest.fixture
def uri(tmp_path: Path) -> str:
    made = str(tmp_path / "workspace")
    make_ready(made)
    return made


@pytest.fixture
def night(uri: str) -> Night:
    """The night in force there: states, lists and summaries of every user."""
    current = Nights(Store(uri)).current()
    assert current is not None
    return current


def records(uri: str, night: Night, url: str | None = None) -> dict[str, UserRecord]:
    store = open_online_store(url, Store(uri))
    users = sorted(newest(uri, "histories")["user_id"].to_pylist())
    packed = store.get(version_of(Workspace(uri), night), users)
    return {user: UserRecord.unpack(data) for user, data in zip(users, packed, strict=True) if data is not None}


def summaries(uri: str, night: Night, url: str | None = None) -> list[tuple[str, str]]:
    """Paradigm and words, each once, the user's name taken out."""
    told = [(user, record.summaries or {}) for user, record in records(uri, night, url).items()]
    return sorted({(name, text.removeprefix(f"{user} ")) for user, mine in told for name, text in mine.items()})


def test_everybodys_rows_are_in_the_store_as_they_are_in_the_tables(raypipe: Run, uri: str, night: Night) -> None:
    loaded = raypipe("online", "--workspace", uri)
    assert (loaded.code, loaded.status) == (0, "ok"), loaded.stderr
    counts = {name: loaded.metrics[name] for name in ("night", "users", "states", "lists", "summaries", "dropped")}
    everybody = dict.fromkeys(("users", "states", "lists"), CHAIN_USERS)
    assert counts == {"night": "2026-01-05", **everybody, "summaries": {"hierarchical": CHAIN_USERS}, "dropped": 0}
    assert 200 < loaded.metrics["bytes_per_user"] < 2000
    found = records(uri, night)
    tables = ("histories", "hidden_states", "recommendations", "summaries")
    rows = {name: {row["user_id"]: row for row in newest(uri, name).to_pylist()} for name in tables}
    assert set(found) == set(rows["histories"])
    for user, record in found.items():
        assert record.items.tolist() == rows["histories"][user]["items"]
        assert record.state is not None
        assert record.state.tolist() == rows["hidden_states"][user]["state"]
        assert record.listed is not None
        assert record.listed.tolist() == rows["recommendations"][user]["items"]
        assert record.scores is not None
        assert record.scores.tolist() == rows["recommendations"][user]["scores"]
        assert record.summaries == {"hierarchical": rows["summaries"][user]["summary"]}
    assert len({record.seed for record in found.values()}) == CHAIN_USERS
    again = raypipe("online", "--workspace", uri)
    assert again.status == "nothing_to_do"
    assert again.metrics["bytes"] == loaded.metrics["bytes"]


def test_a_state_is_loaded_where_it_is_of_the_nights_history_and_recommender(raypipe: Run, uri: str) -> None:
    before = {row["user_id"]: row["state"] for row in newest(uri, "hidden_states").to_pylist()}
    add_events(uri, [("u1", "i1", START + 1000)])
    moved = publish(uri, "2026-01-06")
    loaded = raypipe("online", "--workspace", uri)
    assert (loaded.metrics["users"], loaded.metrics["states"]) == (CHAIN_USERS, CHAIN_USERS - 1)
    states = {user: record.state for user, record in records(uri, moved).items()}
    assert states.pop("u1") is None
    assert {user: state.tolist() for user, state in states.items() if state is not None} == {
        user: state for user, state in before.items() if user != "u1"
    }
    # Another recommender of the same name has none of these states.
    other = replace(moved, date="2026-01-07", release={**moved.release, "recommender": f"sasrec/{'0' * 64}"})
    Nights(Store(uri)).publish(other)
    assert raypipe("online", "--workspace", uri).metrics["states"] == 0
    assert {record.state for record in records(uri, other).values()} == {None}


def test_redis_holds_what_the_embedded_store_holds(raypipe: Run, uri: str, night: Night, redis_server) -> None:
    assert raypipe("online", "--workspace", uri).code == 0
    loaded = raypipe("online", "--workspace", uri, "--store", redis_server.url)
    assert loaded.code == 0, loaded.stderr
    assert 200 < loaded.metrics["bytes_per_user"] < 2000
    embedded, redis = records(uri, night), records(uri, night, redis_server.url)
    assert {user: record.pack() for user, record in embedded.items()} == {u: r.pack() for u, r in redis.items()}


def test_a_night_of_before_the_buckets_were_split_is_loaded_whole(
    raypipe: Run, uri: str, night: Night, redis_server: RedisServer, ray_cluster: None
) -> None:
    assert raypipe("online", "--workspace", uri).code == 0
    assert raypipe("rebucket", "--workspace", uri, "--buckets", 16).status == "ok"
    assert raypipe("online", "--workspace", uri, "--store", redis_server.url).metrics["users"] == CHAIN_USERS
    embedded, redis = records(uri, night), records(uri, night, redis_server.url)
    assert len(embedded) == CHAIN_USERS
    assert {user: record.pack() for user, record in embedded.items()} == {u: r.pack() for u, r in redis.items()}


def test_a_killed_load_is_finished_by_the_next_and_equals_an_uninterrupted_one(
    raypipe: Run, uri: str, night: Night, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[int] = []
    write = EmbeddedStore.write

    def write_two(self: EmbeddedStore, version: str, bucket: int, *rows) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(bucket)
        write(self, version, bucket, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedStore, "write", write_two)
        assert raypipe("online", "--workspace", uri).code == 1
    store = open_online_store(None, Store(uri))
    assert store.facts(version_of(Workspace(uri), night)) is None
    read = online.NightRows.read
    monkeypatch.setattr(online.NightRows, "read", lambda self, bucket: written.append(bucket) or read(self, bucket))
    resumed = raypipe("online", "--workspace", uri)
    assert "2 of 4 buckets were loaded before" in resumed.stderr
    assert sorted(written) == [0, 1, 2, 3]
    whole = str(tmp_path / "whole")
    assert raypipe("online", "--workspace", uri, "--store", whole).code == 0
    assert {u: r.pack() for u, r in records(uri, night).items()} == {
        u: r.pack() for u, r in records(uri, night, whole).items()
    }


def test_the_night_before_stays_loaded_and_older_ones_go(raypipe: Run, uri: str, night: Night) -> None:
    assert raypipe("online", "--workspace", uri).code == 0
    nights = [night]
    more: list[Event] = []
    for day in (6, 7):
        more += [("u1", "i1", START + 1000 * day), ("new", "i2", START + 1000 * day)]
        add_events(uri, more)
        nights.append(publish(uri, f"2026-01-0{day}"))
        loaded = raypipe("online", "--workspace", uri, "--grace_s", "0")
        assert loaded.status == "ok"
        assert loaded.metrics["users"] == CHAIN_USERS + 1
    assert loaded.metrics["dropped"] == 1
    store = open_online_store(None, Store(uri))
    assert store.versions() == [version_of(Workspace(uri), night) for night in nights[1:]]
    newest_record = records(uri, nights[2])["new"]
    assert (newest_record.state, newest_record.listed, newest_record.summaries) == (None, None, None)
    assert newest_record.items.tolist() == [2, 2]
    # Back to a night that is loaded still: nothing is loaded, nothing dropped.
    assert raypipe("night", "--workspace", uri, "--restore", "2026-01-06").code == 0
    assert raypipe("online", "--workspace", uri).status == "nothing_to_do"
    np.testing.assert_array_equal(records(uri, nights[1])["new"].items, [2])
    for keep, left in ((5, 2), (0, 1)):
        words = ("online", "--workspace", uri, "--keep", keep)
        assert raypipe(*words).metrics["dropped"] == 2 - left
        assert len(store.versions()) == left


def test_a_night_that_is_published_again_pushes_out_neither_itself_nor_the_night_before(
    raypipe: Run, uri: str, night: Night
) -> None:
    """Replicas serve what it was until they have taken up what it is."""
    assert raypipe("online", "--workspace", uri).code == 0
    words = ("online", "--workspace", uri, "--grace_s", "0")

    def loaded(date: str, events: int) -> str:
        add_events(uri, [("u1", "i1", START + 1000 * second) for second in range(1, events + 1)])
        published = publish(uri, date)
        assert raypipe(*words).status == "ok"
        return version_of(Workspace(uri), published)

    store = open_online_store(None, Store(uri))
    first = version_of(Workspace(uri), night)
    sixth = [loaded("2026-01-06", events) for events in (1, 2, 3)]
    assert store.versions() == [first, *sixth[1:]]
    # Another night drops it, and the night before once more counts once.
    seventh = loaded("2026-01-07", 4)
    assert store.versions() == [sixth[2], seventh]
    eighth = [loaded("2026-01-08", events) for events in (5, 6)]
    ninth = loaded("2026-01-09", 7)
    assert store.versions() == [eighth[1], ninth]
    # Who keeps nothing, as `forget` does, has nothing left of what a night was.
    tenth = [loaded("2026-01-10", events) for events in (8, 9)]
    assert store.versions() == [ninth, *tenth]
    assert raypipe(*words, "--keep", "0").metrics["dropped"] == 2
    assert store.versions() == tenth[1:]


def test_earlier_nights_that_stay_are_counted_once_however_often_they_were_published(raypipe: Run, uri: str) -> None:
    words = ("online", "--workspace", uri, "--grace_s", "0", "--keep", "2")
    kept = []
    for events, date in enumerate(("2026-01-06", "2026-01-07", "2026-01-07", "2026-01-08"), 1):
        add_events(uri, [("u1", "i1", START + 1000 * second) for second in range(1, events + 1)])
        kept.append(version_of(Workspace(uri), publish(uri, date)))
        assert raypipe(*words).status == "ok"
    assert open_online_store(None, Store(uri)).versions() == [kept[0], *kept[2:]]


def test_a_workspace_that_came_back_from_a_backup_is_loaded_anew(raypipe: Run, uri: str, tmp_path: Path) -> None:
    """Its tables count their versions once more from where it was copied, and the store has outlived it."""
    store = str(tmp_path / "store")
    shutil.copytree(uri, tmp_path / "backup")
    add_events(uri, [("u1", "i1", START + 1000)])
    lost = publish(uri, "2026-01-06")
    assert raypipe("online", "--workspace", uri, "--store", store).status == "ok"
    shutil.rmtree(uri)
    shutil.copytree(tmp_path / "backup", uri)
    add_events(uri, [("u1", "i2", START + 1000)])
    night = publish(uri, "2026-01-06")
    assert night == lost
    assert raypipe("online", "--workspace", uri, "--store", store).status == "ok"
    assert records(uri, night, store)["u1"].items[-1] == 2
    assert raypipe("online", "--workspace", uri, "--store", store).status == "nothing_to_do"


def test_the_stores_format_is_raised_where_a_night_gives_other_records(uri: str) -> None:
    """Else a night that is loaded stays as an older raypipe wrote it, until another one comes."""
    add_events(uri, [("u1", "i1", START + 1000)])
    summarize(uri, "summarize-recurrent", "what an evaluation asked for")
    rows = online.NightRows.of(Workspace(uri), publish(uri, "2026-01-06"))
    found = []
    for bucket in range(rows.buckets()):
        users, packed = rows.read(bucket).users, rows.read(bucket).records
        for user, record in zip(users, map(UserRecord.unpack, packed), strict=True):
            # What is computed in floats may differ by machine.
            told = record.items.tolist(), record.seed, record.state is not None, record.listed is not None
            found.append([user, *told, dict(record.summaries or {})])
    numbers = np.array([3, 1], np.int32), np.array([0.5, -2], np.float32)
    packed = UserRecord(numbers[0], 7, numbers[1], *numbers, {"hierarchical": "Likes ☕."}).pack().hex()
    made_of = fingerprint({"states": state_recipe("a model"), "packed": packed, "records": sorted(found)})
    # Where this differs, raise FORMAT and put both here.
    assert (FORMAT, made_of) == (4, "b53051542fb3688db8e094dedb7aa69a")


def test_the_night_that_is_loaded_is_the_one_in_force_once_nobody_else_loads(
    raypipe: Run, uri: str, night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another load, of a newer night, may end between the command's start and the lock: an older one must not drop it."""

    @contextmanager
    def late(store: Store, names: Sequence[str], *rest: object) -> Iterator[object]:
        with monkeypatch.context() as patch, hold(store, names, *rest) as locks:  # type: ignore[arg-type]
            patch.setattr(online, "hold", hold)
            add_events(uri, [("u1", "i1", START + 1000)])
            publish(uri, "2026-01-06")
            yield locks

    hold = online.hold
    monkeypatch.setattr(online, "hold", late)
    loaded = raypipe("online", "--workspace", uri, "--keep", "0")
    assert (loaded.metrics["night"], loaded.metrics["dropped"]) == ("2026-01-06", 0)


def test_summaries_are_those_of_the_nights_own_kind(raypipe: Run, uri: str) -> None:
    """Whatever else is in the table, newer or older, for whichever evaluation."""
    recurrent = "summarize-recurrent"
    summarize(uri, recurrent, "what was")
    night = publish(uri, "2026-01-06")
    loaded = raypipe("online", "--workspace", uri)
    assert loaded.metrics["summaries"] == {"hierarchical": CHAIN_USERS}
    assert summaries(uri, night) == [("hierarchical", "likes what comes next.")]
    # The same tables, by a night that is of the other kind: it is loaded anew.
    other = publish(uri, "2026-01-06", recurrent)
    loaded = raypipe("online", "--workspace", uri)
    assert (loaded.status, loaded.metrics["summaries"]) == ("ok", {"recurrent": CHAIN_USERS})
    assert summaries(uri, other) == [("recurrent", "likes what was.")]
    summarize(uri, f"{recurrent}-cut1", "what was before")
    for variant in (f"{recurrent}-cut1", "summarize-nothing"):
        nothing = publish(uri, "2026-01-07", variant)
        assert raypipe("online", "--workspace", uri).metrics["summaries"] == {}
        assert summaries(uri, nothing) == []


def test_what_cannot_be_loaded_is_one_paragraph(raypipe: Run, uri: str) -> None:
    away = raypipe("online", "--workspace", uri, "--store", "redis://127.0.0.1:1/0")
    assert away.code == 1
    assert "The Redis on 127.0.0.1 does not do as it is asked: ConnectionError" in one_paragraph(away.stderr)
    Store(uri).delete(["nights/current.json"])
    assert "No night is in force" in one_paragraph(raypipe("online", "--workspace", uri).stderr)


def test_a_store_that_a_night_cannot_be_loaded_into_is_told_before_the_nights_work(raypipe: Run, uri: str) -> None:
    before = Nights(Store(uri)).dates()
    ended = raypipe("nightly", "--workspace", uri, "--date", "2026-01-09", "--online.store", "ftp://here")
    assert ended.code == 2
    assert "'ftp' is no kind of online store" in one_paragraph(ended.stderr)
    assert Nights(Store(uri)).dates() == before
