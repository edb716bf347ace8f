"""A workspace of an older format becomes one of this format, step by step, whatever is killed on the way."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from raypipe.storage import migration, workspace
from raypipe.storage.locks import hold
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph


@pytest.fixture
def of_format_1(tmp_path) -> str:
    uri = str(tmp_path / "workspace")
    Store(uri).put("workspace.json", b'{"buckets":8,"format":1,"kind":"time"}')
    return uri


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A raypipe of format 3: its steps leave a file each. Returns which steps were done."""
    done: list[int] = []

    def step(number: int) -> Callable[[Store], None]:
        def run(store: Store) -> None:
            done.append(number)
            store.put(f"step-{number}", b"done")

        return run

    monkeypatch.setattr(workspace, "FORMAT", 3)
    monkeypatch.setattr(migration, "STEPS", {1: step(1), 2: step(2)})
    return done


def test_every_format_has_a_step_to_the_next_one() -> None:
    assert set(migration.STEPS) == set(range(1, workspace.FORMAT))


def test_a_workspace_of_this_format_is_left_alone(raypipe: Run, of_format_1: str) -> None:
    before = Store(of_format_1).read("workspace.json")
    ended = raypipe("migrate", "--workspace", of_format_1)
    assert (ended.code, ended.status, ended.metrics["format"]) == (0, "nothing_to_do", workspace.FORMAT)
    assert Store(of_format_1).read("workspace.json") == before


def test_an_older_one_is_refused_by_every_job_until_it_is_migrated(
    raypipe: Run, of_format_1: str, later: list[int]
) -> None:
    refused = raypipe("status", "--workspace", of_format_1)
    assert refused.code == 2
    assert "has format version 1; this raypipe reads and writes version 3" in one_paragraph(refused.stderr)
    assert "Make a backup, then run `raypipe migrate --workspace" in refused.stderr
    ended = raypipe("migrate", "--workspace", of_format_1)
    assert (ended.code, ended.status, ended.metrics["steps"]) == (0, "ok", 2)
    assert later == [1, 2]
    info = Workspace(of_format_1).require_info()
    assert (info.format, info.kind, info.buckets) == (3, "time", 8)
    assert raypipe("status", "--workspace", of_format_1).code == 0


def test_a_migration_that_was_killed_goes_on_with_the_step_it_was_in(
    raypipe: Run, of_format_1: str, later: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = dict(migration.STEPS)

    def killed(store: Store) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(migration, "STEPS", {**steps, 2: killed})
    assert raypipe("migrate", "--workspace", of_format_1).code == 1
    assert json.loads(Store(of_format_1).read("workspace.json"))["format"] == 2
    monkeypatch.setattr(migration, "STEPS", steps)
    assert raypipe("migrate", "--workspace", of_format_1).status == "ok"
    assert later == [1, 2]


def test_it_waits_for_whoever_writes_and_refuses_what_is_newer(
    raypipe: Run, of_format_1: str, later: list[int]
) -> None:
    with hold(Store(of_format_1), ["summaries"], "summarize"):
        waits = raypipe("migrate", "--workspace", of_format_1)
    assert (waits.code, "summaries is being written by" in waits.stderr) == (1, True)
    run = Workspace(of_format_1).ledger("summarize").start("f" * 32, {"base": {}, "scope": "all"})
    waits = raypipe("migrate", "--workspace", of_format_1)
    assert "migrate waits for runs that are open: summarize ffffffffffff" in waits.stderr
    run.abandon("for the test")
    Store(of_format_1).put("workspace.json", b'{"buckets":8,"format":4,"kind":"time"}')
    newer = raypipe("migrate", "--workspace", of_format_1)
    assert (newer.code, "Use the raypipe release of format 4" in one_paragraph(newer.stderr)) == (2, True)
    empty = raypipe("migrate", "--workspace", f"{of_format_1}-none")
    assert (empty.code, "is empty" in one_paragraph(empty.stderr)) == (2, True)
    assert later == []
