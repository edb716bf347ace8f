"""The night end to end with the echo engine: each step only if it has to, the manifest last, and a way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import RaypipeError
from raypipe.storage.nights import Nights
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, SMALL_LOG, START, newest, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_night_runs_is_nothing_to_do_again_and_can_be_put_back(raypipe: Run, tmp_path: Path, files: Path) -> None:
    uri = str(tmp_path / "workspace")
    catalogue = write_catalogue(files / "items.csv", SMALL_ITEMS)
    words = ("nightly", "--workspace", uri, "--summarize.engine.engine", "echo", "--ingest.catalogue.path", catalogue)
    words += ("--ingest.log.columns.time", "time", "--ingest.log.path")
    log = write_log(files / "monday.csv", SMALL_LOG)

    monday = raypipe(*words, log, "--date", "2026-01-05")
    assert (monday.code, monday.status) == (0, "ok")
    assert monday.metrics["ingest.events_added"] == len(SMALL_LOG)
    assert monday.metrics["summarize.computed"] == 25
    nights = Nights(Store(uri))
    first = nights.current()
    assert first is not None
    tables = Workspace(uri).tables
    assert first.tables == {name: table.version() for name, table in tables.items() if table.version() >= 0}
    page = (tmp_path / "workspace/nights/2026-01-05/cards.html").read_text(encoding="utf-8")
    assert "25 users have a summary; 12 of them" in page
    assert page.count("<article>") == 12

    again = raypipe(*words, log, "--date", "2026-01-06")
    assert (again.code, again.status) == (0, "nothing_to_do")
    assert nights.dates() == ["2026-01-05"]
    assert again.result["cost"]["calls"] == 0

    more = write_log(files / "tuesday.csv", [("u2", "i1", START + 99 * DAY)])
    tuesday = raypipe(*words, more, "--date", "2026-01-06")
    assert (tuesday.status, tuesday.metrics["summarize.computed"]) == ("ok", 1)
    assert raypipe("night", "--workspace", uri).metrics == {
        "nights": ["2026-01-05", "2026-01-06"],
        "current": "2026-01-06",
    }

    assert raypipe("night", "--workspace", uri, "--restore", "2026-01-05").code == 0
    restored = nights.current()
    assert restored == first
    old = tables["summaries"].read(restored.tables["summaries"])
    assert "u2" in old["user_id"].to_pylist()
    assert not old.equals(newest(uri, "summaries"))
    unknown = raypipe("night", "--workspace", uri, "--restore", "2025-01-01")
    assert (unknown.code, unknown.status) == (2, "failed")
    assert raypipe("status", "--workspace", uri).metrics["night"] == "2026-01-05"


def test_a_step_that_fails_leaves_the_night_before_in_force(
    raypipe: Run, summarised: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("nightly", "--workspace", summarised, "--summarize.engine.engine", "echo", "--date")
    assert raypipe(*words, "2026-01-05").status == "ok"
    before = Nights(Store(summarised)).current()

    def fail(*_: object) -> None:
        raise RaypipeError("The cards cannot be written.", "Try again.")

    monkeypatch.setattr("raypipe.pipeline.nightly.write_cards", fail)
    log = write_log(files / "more.csv", [("u2", "i1", START + 99 * DAY)])
    more = ("--ingest.log.path", log, "--ingest.log.columns.time", "time")
    failed = raypipe(*words, "2026-01-06", *more)
    assert (failed.code, failed.status) == (1, "failed")
    assert Nights(Store(summarised)).current() == before
    monkeypatch.undo()
    assert raypipe(*words, "2026-01-06", *more).status == "ok"
    current = Nights(Store(summarised)).current()
    assert current is not None
    assert current.date == "2026-01-06"
