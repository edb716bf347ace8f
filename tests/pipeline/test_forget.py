"""A user who is forgotten is in no file, stays away when an old log comes back, and nobody else loses a row."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from raypipe.pipeline.sequences import user_keys
from raypipe.pipeline.trsr_measures import save_ranks
from raypipe.recommenders.attribute_scores import AttributeScores, save_scores
from raypipe.recommenders.checkpoint import Card, catalogue_card, load_recommender, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.guided import GuidedOptions
from raypipe.storage.ledger import Unit, Usage
from raypipe.storage.models import Models
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.nights import Nights
from raypipe.storage.online import open_online_store, version_of
from raypipe.storage.store import Store
from raypipe.storage.tables import Table
from raypipe.storage.tombstones import digest
from raypipe.storage.workspace import Workspace
from tests.conftest import Run, running_redis
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, SMALL_LOG, START, newest, write_log
from tests.pipeline.two_nights import HERS, USER, USERS
from tests.redis_server import RedisServer

AT_ONCE = ("--grace_s", "0")
# In HTML her id is not the same text as it is. No spelling is hexadecimal: files have random names, and tables name them.
SPELLINGS = (USER.encode(), b"Mnemosyne", b"zeugma")


def files_with_her(uri: str) -> list[str]:
    """Every file below the workspace in whose bytes or, where those are packed, in whose values she is."""
    found = []
    for path in sorted(Path(uri).rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += json.dumps(pq.read_table(path).to_pylist(), default=str, ensure_ascii=False).encode()
        if path.suffix == ".arrow":
            data += json.dumps(pa.ipc.open_file(path).read_all().to_pylist(), default=str).encode()
        if any(spelling in data for spelling in SPELLINGS):
            found.append(str(path.relative_to(uri)))
    return found


def of_others(uri: str) -> dict[str, list[dict[str, Any]]]:
    """Every user's rows of every table but hers, and whose they are."""
    found = {}
    for name in ("histories", "hidden_states", "block_summaries", "summaries", "recommendations", "explanations"):
        rows = newest(uri, name)
        rows = rows.filter(pc.not_equal(rows["user_id"], USER)).drop_columns(["bucket"])
        found[name] = sorted(rows.to_pylist(), key=str)
    return found


def test_she_is_in_every_kind_of_file_before(two_nights: str) -> None:
    folders = {path.split("/")[0] for path in files_with_her(two_nights)}
    tables = {path.split("/")[1] for path in files_with_her(two_nights) if path.startswith("tables/")}
    assert folders == {"tables", "nights", "ledger", "canary", "judgements", "staging", "online"}
    users = {"histories", "hidden_states", "block_summaries", "summaries", "recommendations", "explanations"}
    assert tables == {*users, "rejects"}
    # MLflow's database is among the files that are searched, and both nights are in it.
    with contextlib.closing(sqlite3.connect(Path(two_nights) / "mlflow.db")) as database:
        jobs = [job for (job,) in database.execute("SELECT value FROM tags WHERE key = 'raypipe.job'")]
    assert jobs.count("summarize") == 2


def test_a_forgotten_user_is_nowhere_and_stays_away(raypipe: Run, two_nights: str, files: Path) -> None:
    before, night = of_others(two_nights), Nights(Store(two_nights)).current()
    assert night is not None
    # Drawn by `evaluate --cards`: her history, under a number.
    drawn, record = (Path(two_nights) / "evaluations/0" / name for name in ("attributes.html", "1.json"))
    drawn.parent.mkdir(parents=True)
    drawn.write_text("User 1")
    record.write_text("{}")
    # A night that was killed before it was published has its page, and no manifest.
    unpublished = Path(two_nights) / "nights/2026-01-09"
    unpublished.mkdir()
    shutil.copy(Path(two_nights) / "nights/2026-01-06/cards.html", unpublished)
    # What a writer left who was killed in the middle.
    for folder in ("tables/histories/bucket=0", "ledger/summarize", "nights"):
        (Path(two_nights) / folder / "part.parquet#1").write_bytes(b"PAR1" + USER.encode())
    ended = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert (ended.metrics["tombstones_added"], ended.metrics["nights_removed"]) == (1, 1)
    assert "keep traces until they are trained anew" in ended.stderr
    assert files_with_her(two_nights) == []
    assert (drawn.exists(), record.exists()) == (False, True)
    assert of_others(two_nights) == before
    assert newest(two_nights, "tombstones")["digest"].to_pylist() == [digest(USER)]
    assert newest(two_nights, "rejects").num_rows == 1

    # The night in force is the same one, without her; the one before could not be kept.
    nights, tables = Nights(Store(two_nights)), Workspace(two_nights).tables
    current = nights.current()
    assert current is not None
    assert (nights.dates(), current.date, current.release) == (["2026-01-06"], "2026-01-06", night.release)
    assert tables["summaries"].read(current.tables["summaries"]).num_rows == USERS - 1
    page = (Path(two_nights) / "nights/2026-01-06/cards.html").read_text()
    assert page.count("<article>") == USERS - 1
    assert (unpublished / "cards.html").read_text() == page
    (judgement,) = (Path(two_nights) / "judgements").iterdir()
    report = json.loads(judgement.read_text())
    assert len(report["users"]) == len(report["ratings"]["rule"]) == USERS - 1

    # An old log with one event more, so that it is not the one that was read before.
    log = write_log(files / "again.csv", [*SMALL_LOG, *HERS, ("u7", "i2", START + 98 * DAY)])
    again = raypipe("ingest", "--workspace", two_nights, "--log.path", log, "--log.columns.time", "time")
    assert (again.code, again.metrics["forgotten"]) == (0, len(HERS))
    assert again.metrics["events_added"] == 1
    assert files_with_her(two_nights) == []
    assert raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE).status == "nothing_to_do"


def test_what_models_keep_of_her_goes_and_they_stay_the_models_they_were(
    raypipe: Run, two_nights: str, tmp_path: Path
) -> None:
    store = Store(two_nights)
    users = pa.array([USER, "u7", "u8"])
    keys = np.sort(user_keys(users))
    tastes = np.arange(6, dtype=np.float32).reshape(3, 2)
    items = newest(two_nights, "items").sort_by("index")["item_id"].to_pylist()
    planted = {"guided": tmp_path / "guided", "trsr": tmp_path / "trsr", "sasrec": tmp_path / "sasrec"}
    scores = AttributeScores(("dark", "long"), np.ones((SMALL_ITEMS + 1, 2), np.float32), tastes, keys, {"items": 1})
    save_scores(planted["guided"], scores)
    planted["trsr"].mkdir()
    save_ranks(planted["trsr"], keys, {"": (np.arange(3), np.ones(3, np.int64))})
    config = RecommenderConfig(model="sasrec", width=8, max_length=5, guided=GuidedOptions(scores="guided"))
    weights = config.build(SMALL_ITEMS, blocks=(2, 3)).state_dict()
    weights |= {"user_keys": torch.from_numpy(keys), "user_block": torch.from_numpy(tastes)}
    save_recommender(planted["sasrec"], Card(config, catalogue_card(items), [], (2, 3)), weights)
    models = {name: Models(store).add(name, folder, "planted", {"hold_out": 2}) for name, folder in planted.items()}
    hers = user_keys(users)[0].tobytes()
    before = {path: path.read_bytes() for path in (Path(two_nights) / "models").rglob("*") if path.is_file()}
    assert sum(hers in data for data in before.values()) == 3

    ended = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert (ended.code, ended.metrics["rows_of_models_removed"]) == (0, 3)
    after = {path: path.read_bytes() for path in before}
    assert not any(hers in data for data in after.values())
    changed = {str(path.relative_to(two_nights)) for path in before if before[path] != after[path]}
    assert changed == {f"{model.folder}/users.safetensors" for model in models.values()}
    left = {
        tuple(rows["keys"].tolist()) for model in models.values() if (rows := Models(store).users(model)) is not None
    }
    assert left == {tuple(np.sort(user_keys(users)[1:]).tolist())}
    folder = Models(store).fetch_unharmed(models["sasrec"], tmp_path)
    recommender, _ = load_recommender(folder, users=Models(store).users(models["sasrec"]))
    assert len(recommender.user_keys) == 2


@pytest.fixture
def redis_on_disk(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis with an append-only file and snapshots, to be searched."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with running_redis(folder, keeps=True) as server:
        yield server


def test_a_forgotten_user_is_not_in_redis_nor_in_its_files_and_everybody_else_is(
    raypipe: Run, two_nights: str, redis_on_disk: RedisServer
) -> None:
    import redis

    redis_server = redis_on_disk
    client = redis.Redis.from_url(redis_server.url)

    def holding(spelling: bytes) -> list[bytes]:
        return [key for key in client.scan_iter() if spelling in key or spelling in b"".join(contents_of(client, key))]

    assert raypipe("online", "--workspace", two_nights, "--store", redis_server.url).code == 0
    assert holding(USER.encode())
    client.config_set("save", "3600 1")
    client.config_set("rdbcompression", "no")
    client.save()
    on_disk = {path.suffix for path in files_of(redis_server.folder) if USER.encode() in path.read_bytes()}
    assert on_disk == {".aof", ".rdb"}
    ended = raypipe("forget", "--workspace", two_nights, "--user", USER, "--store", redis_server.url, *AT_ONCE)
    assert ended.code == 0, ended.stderr
    assert not any(map(holding, SPELLINGS))
    deadline = time.monotonic() + 10  # the files before are deleted in the background
    while any(SPELLINGS[1] in path.read_bytes() for path in files_of(redis_server.folder)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    night = Nights(Store(two_nights)).current()
    assert night is not None
    store = open_online_store(redis_server.url, Store(two_nights))
    hers, others = store.get(version_of(Workspace(two_nights), night), [USER, "u7"])
    assert hers is None
    assert others is not None
    assert len(store.versions()) == 1
    store.close()


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def contents_of(client: Any, key: bytes) -> list[bytes]:
    """All that a key of any type holds."""
    kind = client.type(key)
    if kind == b"hash":
        return [part for pair in client.hgetall(key).items() for part in pair]
    if kind == b"string":
        return [client.get(key)]
    return list(
        client.smembers(key)
        if kind == b"set"
        else client.zrange(key, 0, -1)
        if kind == b"zset"
        else client.lrange(key, 0, -1)
    )


@pytest.mark.parametrize("at", ["tombstones", "summaries", "nights", "sweep"])
def test_forgetting_that_was_killed_goes_on(
    raypipe: Run, two_nights: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = of_others(two_nights)
    publish = Table.publish

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def stop_at(table: Table, *args: Any, **kwargs: Any) -> int:
        return stop() if table.spec.name == at else publish(table, *args, **kwargs)  # type: ignore[return-value]

    places = {"nights": "raypipe.pipeline.forget.Nights.rewrite", "sweep": "raypipe.pipeline.forget._sweep"}
    with monkeypatch.context() as patch:
        if at in places:
            patch.setattr(places[at], stop)
        else:
            patch.setattr(Table, "publish", stop_at)
        stopped = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert stopped.code == 1
    assert files_with_her(two_nights)
    assert raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE).code == 0
    assert files_with_her(two_nights) == []
    assert of_others(two_nights) == before
    assert newest(two_nights, "tombstones").num_rows == 1
    current = Nights(Store(two_nights)).current()
    assert current is not None
    assert Workspace(two_nights).tables["histories"].rows(current.tables["histories"]) == USERS - 1


def test_several_users_go_at_once_by_a_file(raypipe: Run, two_nights: str, files: Path) -> None:
    # An id may hold what Unicode takes for the end of a line: u9 is not named.
    (files / "users.txt").write_text(f"{USER}\nu7\nu8\nnobody\u2028u9\n", encoding="utf-8")
    ended = raypipe("forget", "--workspace", two_nights, "--users", files / "users.txt", *AT_ONCE)
    assert (ended.code, ended.metrics["tombstones_added"]) == (0, 4)
    left = newest(two_nights, "histories")["user_id"].to_pylist()
    assert len(left) == USERS - 3
    assert "u9" in left
    assert newest(two_nights, "explanations").num_rows == 0
    assert files_with_her(two_nights) == []


def test_forgetting_waits_for_open_runs_and_for_a_night_on_the_newest_tables(raypipe: Run, two_nights: str) -> None:
    workspace = Workspace(two_nights)
    run = workspace.ledger("summarize").start("f" * 32, {"base": {"summaries": 0}, "scope": "all"})
    waits = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert (waits.code, waits.status) == (2, "failed")
    assert "forget waits for runs that are open: summarize ffffffffffff" in waits.stderr
    run.abandon("for the test")
    raypipe("night", "--workspace", two_nights, "--restore", "2026-01-05")
    refused = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert refused.code == 2
    assert "Publish a night on the newest tables" in refused.stderr
    assert newest(two_nights, "histories").num_rows == USERS
    # Somebody who came later is not in it.
    assert workspace.tables["tombstones"].version() == -1


def test_what_a_night_spent_is_not_forgotten_with_its_users(raypipe: Run, two_nights: str) -> None:
    night, ledger = NightRuns(Store(two_nights), "2026-01-07"), Workspace(two_nights).ledger("summarize")
    run = ledger.start("e" * 32, {"base": {"summaries": 0}, "scope": "all"})
    night.add(run)
    run.record_usage(Unit("users", 0), 1, Usage(900))
    run.abandon("discarded by hand")
    ended = raypipe("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    assert ended.code == 0, ended.stderr
    assert run.spent("users") == Usage()
    assert night.spent("summarize").calls == 900


def test_a_canary_that_began_while_somebody_was_forgotten_keeps_nothing_of_hers(
    raypipe: Run, two_nights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("forget", "--workspace", two_nights, "--user", USER, *AT_ONCE)
    begun = []

    def begin(*_: object) -> None:
        begun.append(Workspace(two_nights).ledger("explain").start("d" * 32, {"base": {}, "scope": "canary"}))

    with monkeypatch.context() as patch:
        patch.setattr("raypipe.pipeline.forget.forget_in_judgements", begin)
        waits = raypipe(*words)
    assert (waits.code, "waits for runs that are open: explain dddddddddddd" in waits.stderr) == (2, True)
    Store(two_nights).put(f"canary/{'d' * 32}/explanations/part.parquet", USER.encode())
    begun[0].abandon("discarded by hand")
    assert raypipe(*words).code == 0
    assert files_with_her(two_nights) == []


@pytest.mark.parametrize("words", [(), ("--user", "a", "--users", "b"), ("--users", "nowhere.txt")])
def test_nobody_or_twice_is_refused(raypipe: Run, two_nights: str, words: tuple[str, ...]) -> None:
    ended = raypipe("forget", "--workspace", two_nights, *words)
    assert (ended.code, ended.status) == (2, "failed")
