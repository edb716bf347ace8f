"""Somebody is forgotten while other jobs work, or between them: nothing comes back, and it can be ended whatever came between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from raypipe.errors import RaypipeError
from raypipe.pipeline import forget
from raypipe.pipeline.rejects import reject_rows
from raypipe.runtime.session import Session
from raypipe.storage.locks import Lock
from raypipe.storage.nights import Nights
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Ended, Run
from tests.pipeline.small_logs import SMALL_ITEMS, START, newest, write_catalogue, write_log
from tests.pipeline.test_forget import AT_ONCE, files_with_her
from tests.pipeline.two_nights import USER, USERS

pytestmark = pytest.mark.usefixtures("ray_cluster")


def forgetting(uri: str) -> tuple[str, ...]:
    return ("forget", "--workspace", uri, "--user", USER, *AT_ONCE)


def test_a_forgetting_that_was_killed_can_be_ended_after_a_night_and_a_vacuum(
    raypipe: Run, two_nights: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Nights, "rewrite", stop)
        assert raypipe(*forgetting(two_nights)).code == 1
    log = write_log(files / "wednesday.csv", [("u7", "i2", START + 97 * 86_400_000)])
    words = ("--ingest.log.path", log, "--ingest.log.columns.time", "time", "--summarize.engine.engine", "echo")
    catalogue = ("--ingest.catalogue.path", write_catalogue(files / "items.csv", SMALL_ITEMS))
    night = raypipe("nightly", "--workspace", two_nights, *words, *catalogue, "--date", "2026-01-07")
    assert night.status == "ok", night.stderr
    assert raypipe("vacuum", "--workspace", two_nights, "--grace_hours", 0).status == "ok"
    ended = raypipe(*forgetting(two_nights))
    assert ended.code == 0, ended.stderr
    assert files_with_her(two_nights) == []
    tables, nights = Workspace(two_nights).tables, Nights(Store(two_nights))
    assert nights.dates() == ["2026-01-06", "2026-01-07"]
    for date in nights.dates():
        found = nights.get(date)
        assert found is not None
        for name, version in found.tables.items():
            rows = tables[name].read(version)
            assert (name, rows.num_rows) == (name, USERS - 1) or name not in {"histories", "summaries"}


def test_who_forgets_and_has_lost_a_lease_moves_no_night_and_deletes_nothing(
    raypipe: Run, two_nights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, night = Session.publish, Nights(Store(two_nights)).current()

    def lost(lock: Lock) -> None:
        raise RaypipeError("This job's lease on nights ran out.", "Submit again.")

    def publish_and_sleep(*args: object, **kwargs: object) -> object:
        result = publish(*args, **kwargs)  # type: ignore[arg-type]
        patch.setattr(Lock, "check_held", lost)
        return result

    before = files_with_her(two_nights)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "publish", publish_and_sleep)
        assert raypipe(*forgetting(two_nights)).code == 1
    assert Nights(Store(two_nights)).current() == night
    assert set(before) <= set(files_with_her(two_nights))


def test_rejects_that_are_retried_while_somebody_is_forgotten_do_not_come_back(
    raypipe: Run, two_nights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, columns = Workspace(two_nights).tables["rejects"], ("reason", "message", "row")
    rejects = pa.table({"key": [USER, "u3"], **{name: ["{}", "{}"] for name in columns}})
    staged = table.stage(reject_rows("by-hand", rejects), "by-hand", {"table": "summaries"})
    version, nights = table.publish([staged], mode="append", app="by-hand", number=1), Nights(Store(two_nights))
    night = nights.current()
    assert night is not None
    nights.rewrite(replace(night, tables={**night.tables, "rejects": version}))  # one on the newest tables
    buckets, ended = forget._buckets, list[Ended]()

    def retry(users: list[str], count: int) -> dict[int, list[str]]:
        ended.append(raypipe("retry-rejected", "--workspace", two_nights))
        return buckets(users, count)

    with monkeypatch.context() as patch:
        patch.setattr(forget, "_buckets", retry)
        assert raypipe(*forgetting(two_nights)).code == 0
    assert (ended[0].code, "tombstones is being written by forget" in ended[0].stderr) == (1, True)
    again = raypipe("retry-rejected", "--workspace", two_nights)
    assert (again.code, again.metrics["retried"]) == (0, 1)
    rows = newest(two_nights, "rejects").to_pylist()
    assert [row for row in rows if row["table"] == "summaries"] == []
