"""More buckets: the same rows, each where its user's hash says, all tables and the workspace at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe.storage.hashing import stable_hash
from raypipe.storage.locks import hold
from raypipe.storage.tables import Table
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.made import make_ready, publish
from tests.pipeline.small_logs import (
    CHAIN_USERS,
    DAY,
    SMALL_LOG,
    START,
    expected_histories,
    histories_of,
    newest,
    write_log,
)

BUCKETED = ("histories", "block_summaries", "summaries")


def contents(uri: str) -> dict[str, list[dict[str, Any]]]:
    return {name: sorted(newest(uri, name).drop_columns(["bucket"]).to_pylist(), key=str) for name in BUCKETED}


def assert_in_place(uri: str, buckets: int) -> None:
    for name in BUCKETED:
        rows = newest(uri, name)
        expected = stable_hash(rows["user_id"].combine_chunks()) % np.uint64(buckets)
        assert rows["bucket"].to_pylist() == expected.tolist()
        assert len(set(expected.tolist())) > 4


def test_every_row_is_in_its_new_bucket_and_nothing_is_computed_again(
    raypipe: Run, summarised: str, files: Path
) -> None:
    before = contents(summarised)
    ended = raypipe("rebucket", "--workspace", summarised, "--buckets", 16)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert (ended.metrics["buckets_before"], ended.metrics["buckets"]) == (4, 16)
    assert contents(summarised) == before
    assert_in_place(summarised, 16)
    assert raypipe("status", "--workspace", summarised).metrics["buckets"] == 16
    again = raypipe("summarize", "--workspace", summarised, "--engine.engine", "echo")
    assert (again.code, again.result["cost"]["calls"]) == (0, 0)
    more = [("u7", "i1", START + 99 * DAY), ("new", "i2", START)]
    log = write_log(files / "more.csv", more)
    assert raypipe("ingest", "--workspace", summarised, "--log.path", log, "--log.columns.time", "time").code == 0
    assert histories_of(summarised) == expected_histories(SMALL_LOG, more)
    assert raypipe("summarize", "--workspace", summarised, "--engine.engine", "echo").metrics["computed"] == 2
    assert_in_place(summarised, 16)


@pytest.mark.parametrize("at", ["histories", "summaries", "buckets"])
def test_splitting_that_was_killed_is_completed_before_anybody_reads(
    raypipe: Run, summarised: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(summarised)
    publish = Table.publish

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def stop_at(table: Table, *args: Any, **kwargs: Any) -> int:
        return stop() if table.spec.name == at else publish(table, *args, **kwargs)  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        if at == "buckets":
            patch.setattr(Workspace, "record_buckets", stop)
        else:
            patch.setattr(Table, "publish", stop_at)
        assert raypipe("rebucket", "--workspace", summarised, "--buckets", 8).code == 1
    # A job that looked at the number of buckets before is told, and does nothing.
    other = raypipe("summarize", "--workspace", summarised, "--engine.engine", "echo")
    assert other.code == 1
    assert "being split into more buckets" in other.stderr
    assert contents(summarised) == before
    assert_in_place(summarised, 8)
    assert raypipe("summarize", "--workspace", summarised, "--engine.engine", "echo").code == 0
    assert raypipe("rebucket", "--workspace", summarised, "--buckets", 8).status == "nothing_to_do"


@pytest.mark.parametrize("words", [("extract",), ("forget", "--user", "u3")])
def test_a_job_that_waited_for_a_split_goes_by_the_new_buckets(
    raypipe: Run, ray_cluster: None, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, waits = str(tmp_path / "workspace"), [True]
    make_ready(uri)

    def hold_after_the_split(*args: Any, **kwargs: Any) -> Any:
        if waits:
            waits.clear()
            assert raypipe("rebucket", "--workspace", uri, "--buckets", 8).status == "ok"
            publish(uri, "2026-01-06")
        return hold(*args, **kwargs)

    monkeypatch.setattr("raypipe.runtime.session.hold", hold_after_the_split)
    ended = raypipe(*words, "--workspace", uri)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    if words[0] == "extract":
        run = Workspace(uri).ledger("extract").newest()
        assert run is not None
        assert run.planned() == {"users": 8}
        states = newest(uri, "hidden_states")
        assert states["bucket"].to_pylist() == (stable_hash(states["user_id"].combine_chunks()) % np.uint64(8)).tolist()
    users = sorted(newest(uri, "histories")["user_id"].to_pylist())
    expected = {f"u{n}" for n in range(CHAIN_USERS)} - {*words[2:]}
    assert users == sorted(expected)


def test_a_split_that_was_killed_in_its_units_resumes(
    raypipe: Run, summarised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raypipe.pipeline.rebucket._parts", stop)
        assert raypipe("rebucket", "--workspace", summarised, "--buckets", 8).code == 1
    assert raypipe("status", "--workspace", summarised).metrics["buckets"] == 4
    resumed = raypipe("rebucket", "--workspace", summarised, "--buckets", 8)
    assert resumed.code == 0
    assert "resuming run" in resumed.stderr
    assert_in_place(summarised, 8)


@pytest.mark.parametrize(
    ("buckets", "told"), [(12, "no power of two"), (2, "greater than or equal to 4"), (6, "no power")]
)
def test_a_number_that_cannot_be_is_refused(raypipe: Run, summarised: str, buckets: int, told: str) -> None:
    ended = raypipe("rebucket", "--workspace", summarised, "--buckets", buckets)
    assert (ended.code, ended.status) == (2, "failed")
    assert told in ended.stderr


def test_fewer_are_refused_and_by_itself_it_goes_by_the_users(raypipe: Run, summarised: str) -> None:
    assert raypipe("rebucket", "--workspace", summarised).status == "nothing_to_do"
    assert raypipe("rebucket", "--workspace", summarised, "--buckets", 8).code == 0
    fewer = raypipe("rebucket", "--workspace", summarised, "--buckets", 4)
    assert "Buckets are split and never joined" in fewer.stderr
    # Never fewer than there are.
    assert raypipe("rebucket", "--workspace", summarised).status == "nothing_to_do"


def test_an_open_run_of_another_job_is_waited_for(raypipe: Run, summarised: str) -> None:
    Workspace(summarised).ledger("ingest").start("f" * 32, {"base": {"histories": 0}, "scope": "all"})
    ended = raypipe("rebucket", "--workspace", summarised, "--buckets", 8)
    assert (ended.code, ended.status) == (2, "failed")
    assert "rebucket waits for runs that are open: ingest ffffffffffff" in ended.stderr
