"""Status, plan and doctor tell what is there; none of them changes a table."""

from __future__ import annotations

import re
import threading
import time

import pytest

from raypipe.storage.ledger import Counts, Receipt, Unit
from raypipe.storage.locks import run_lock
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.pipeline.small_logs import SMALL_LOG, full_cost

LENGTHS = [*range(1, 25), 120]


def test_status_tells_rows_versions_and_open_runs(raypipe: Run, summarised: str) -> None:
    workspace = Workspace(summarised)
    run = workspace.ledger("summarize").start(
        "f" * 32, {"recipe": "r", "pins": {}, "base": {"summaries": 0}, "scope": "all", "created": 0.0}
    )
    run.plan("users", [Unit("users", index) for index in range(4)])
    run.commit(Receipt(Unit("users", 0), Counts(5, 4, 1)))
    ended = raypipe("status", "--workspace", summarised)
    assert ended.result["tables"]["histories"] == {"version": 0, "rows": 25, "rejected": 0}
    assert ended.result["tables"]["summaries"]["rows"] == 25
    assert (ended.metrics["kind"], ended.metrics["buckets"], ended.metrics["night"]) == ("time", 4, None)
    (shown,) = ended.metrics["open_runs"]
    assert {name: shown[name] for name in ("job", "state", "done", "planned", "rows_in", "rejected")} == {
        "job": "summarize",
        "state": "open",
        "done": 1,
        "planned": 4,
        "rows_in": 5,
        "rejected": 1,
    }
    assert "summarize ffffffffffff: 1/4 units, open" in ended.stderr

    refused = raypipe("status", "--workspace", summarised, "--discard", "0000")
    assert (refused.code, refused.status) == (2, "failed")
    assert "Open runs: ffffffffffff." in refused.stderr
    assert raypipe("status", "--workspace", summarised, "--discard", "ffff").metrics["open_runs"] == []


def test_a_watched_run_is_followed_to_its_end(raypipe: Run, summarised: str) -> None:
    run = (
        Workspace(summarised)
        .ledger("summarize")
        .start("e" * 32, {"recipe": "r", "pins": {}, "base": {"summaries": 0}, "scope": "all", "created": 0.0})
    )
    run.plan("users", [Unit("users", index) for index in range(4)])
    run.commit(Receipt(Unit("users", 0), Counts(5, 4, 1)))

    def go_on() -> None:
        for index in (1, 2, 3):
            time.sleep(0.3)
            run.commit(Receipt(Unit("users", index), Counts(5, 5)))
        time.sleep(0.3)
        run.finish({"status": "ok"})

    worker = threading.Thread(target=go_on)
    worker.start()
    ended = raypipe("status", "--workspace", summarised, "--watch", "0.1")
    worker.join()
    assert (ended.code, ended.metrics["open_runs"]) == (0, [])
    lines = [line for line in ended.stderr.splitlines() if "summarize eeeeeeeeeeee" in line]
    assert "1/4 units, 5 rows, 1 rejected, open" in lines[0]
    assert "left" not in lines[0]
    assert re.search(r"4/4 units, 20 rows, 1 rejected, open, 0:00 left", lines[-1])
    assert ended.stderr.splitlines()[len(lines)] == "no run is open"


def test_watching_can_be_stopped(raypipe: Run, summarised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"recipe": "r", "pins": {}, "base": {"summaries": 0}, "scope": "all", "created": 0.0}
    Workspace(summarised).ledger("summarize").start("d" * 32, manifest)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raypipe.pipeline.status.time.sleep", stop)
    ended = raypipe("status", "--workspace", summarised, "--watch", "60")
    assert (ended.code, ended.status) == (0, "ok")
    assert [run["run_key"] for run in ended.metrics["open_runs"]] == ["d" * 32]


def test_a_plan_counts_users_and_calls_and_writes_nothing(raypipe: Run, ingested: str) -> None:
    before = {entry.path for entry in Workspace(ingested).store.list("")}
    ended = raypipe("plan", "--workspace", ingested, "--engine.engine", "echo")
    assert (ended.code, ended.metrics["users"], ended.metrics["users_changed"]) == (0, 25, 25)
    assert ended.metrics["calls"] == sum(map(full_cost, LENGTHS))
    assert {entry.path for entry in Workspace(ingested).store.list("")} == before


@pytest.mark.parametrize("paradigm", ["hierarchical", "recurrent"])
def test_a_plan_after_a_run_foretells_the_next_ones_tokens_and_time(raypipe: Run, ingested: str, paradigm: str) -> None:
    words = ("--workspace", ingested, "--engine.engine", "echo", "--summaries.paradigm", paradigm)
    before = raypipe("plan", *words)
    assert (before.metrics["tokens_out"], before.metrics["seconds"], before.metrics["seconds_most"]) == (None,) * 3
    first = raypipe("summarize", *words)
    # Another recipe, so that everything is to be done again.
    again = (*words, "--summaries.block_decoding.seed", "1")
    planned = raypipe("plan", *again)
    done = raypipe("summarize", *again)
    assert planned.metrics["calls"] == done.result["cost"]["calls"]
    assert planned.metrics["tokens_in"] == pytest.approx(done.result["cost"]["tokens_in"], rel=0.03)
    assert planned.metrics["tokens_out"] == pytest.approx(done.result["cost"]["tokens_out"], rel=0.01)
    assert planned.metrics["tokens_in_error"] < 0.1 * planned.metrics["tokens_in"]
    seconds = planned.metrics
    assert seconds["seconds_least"] == seconds["seconds"] == seconds["seconds_most"]  # there is but one past run
    assert seconds["seconds"] == pytest.approx(first.result["cost"]["seconds"], abs=1)


def test_a_plan_after_the_night_is_free(raypipe: Run, summarised: str) -> None:
    ended = raypipe("plan", "--workspace", summarised, "--engine.engine", "echo")
    assert (ended.metrics["users_changed"], ended.metrics["calls"]) == (0, 0)


def test_doctor_finds_a_healthy_machine_and_a_full_disk(raypipe: Run, ingested: str, monkeypatch) -> None:
    healthy = raypipe("doctor", "--workspace", ingested, "--no-start_ray")
    assert (healthy.code, healthy.status) == (0, "ok"), healthy.stderr
    monkeypatch.setattr("raypipe.storage.store.Store.free_bytes", lambda _: 2**20)
    ill = raypipe("doctor", "--workspace", ingested, "--no-start_ray")
    assert (ill.code, ill.status, ill.metrics["disk"]) == (1, "failed", False)
    assert "failed  disk: Only 0.0 GiB are free" in ill.stderr


def test_the_small_log_is_what_the_tests_say_it_is() -> None:
    assert len(SMALL_LOG) == sum(LENGTHS)
    assert len(set(SMALL_LOG)) == len(SMALL_LOG)


def test_a_submitted_run_has_one_driver(raypipe: Run, summarised: str) -> None:
    words = ("status", "--workspace", summarised, "--run", "status-2026-01-05-abc")
    with run_lock(Store(summarised), "status-2026-01-05-abc"):
        refused = raypipe(*words)
    assert (refused.code, refused.status) == (1, "failed")
    assert "is being written by" in refused.stderr
    assert raypipe(*words).code == 0
