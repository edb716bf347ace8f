"""What a session finds and leaves in a workspace, without a cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest

from raypipe.errors import RaypipeError, UnavailableError
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.job import JobResult
from raypipe.runtime.publishing import bucket_parts, complete, recover, settled_versions
from raypipe.runtime.session import Session, open_session
from raypipe.storage.ledger import Counts, Publish, Receipt, Run, Unit, Usage
from raypipe.storage.locks import Lock, hold
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.schemas import BLOCK_SUMMARIES, SUMMARIES
from raypipe.storage.tables import StagedFile, Table
from raypipe.storage.workspace import Workspace
from tests.leases import taken_over

TABLES = ("block_summaries", "summaries")
OK = JobResult("summarize", "ok")
DONE = {"status": "ok", "tables": {}, "metrics": {}}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(str(tmp_path / "workspace"))
    workspace.decide("time", 4)
    return workspace


def session_of(workspace: Workspace) -> Session:
    return Session(workspace, "summarize", ClusterConfig(), [])


def run_of(session: Session, scope: str = "all") -> Run:
    return session.run("recipe", session.versions("histories"), session.versions(*TABLES), scope, {})


def half_published(workspace: Workspace, run: Run) -> None:
    """The run is killed between the commits of its two tables."""
    values: dict[str, str | int] = {"variant": "v", "bucket": 0}
    parts = []
    for name, spec in zip(TABLES, (BLOCK_SUMMARIES, SUMMARIES), strict=True):
        staged = workspace.tables[name].stage(spec.columns.empty_table(), run.run_key, values)
        parts.append(Publish(name, "overwrite", [staged], [values]))
    run.intend_publish(parts, DONE)
    first = parts[0]
    workspace.tables[first.table].publish(
        first.files,
        mode="overwrite",
        app=f"{first.table}:summarize",
        number=run.number,
        replaces=first.replaces,
    )


def test_a_half_published_run_is_completed_although_a_canary_began_after_it(workspace: Workspace) -> None:
    session = session_of(workspace)
    whole = run_of(session)
    canary = run_of(session, "canary")
    canary.finish(DONE)
    half_published(workspace, whole)
    assert session.versions(*TABLES) == {"block_summaries": 0, "summaries": -1}
    recover(workspace, "extract", set())
    assert session.versions(*TABLES) == {"block_summaries": 0, "summaries": 0}
    assert whole.result() is not None
    assert workspace.open_runs() == []
    # The same job goes on, and another canary changes nothing.
    assert run_of(session).run_key != whole.run_key


def test_a_lease_that_is_lost_while_staged_files_are_looked_at_publishes_nothing(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(s3_uri)
    workspace.decide("time", 4)
    store, values = workspace.store, {"variant": "v", "bucket": 0}
    with contextlib.ExitStack() as successor, hold(store, ["summaries"], "sleeper") as locks:
        session = Session(workspace, "summarize", ClusterConfig(), locks)
        run = run_of(session)
        staged = workspace.tables["summaries"].stage(SUMMARIES.columns.empty_table(), run.run_key, values)
        check_staged = Table.check_staged

        def slow(table: Table, files: Iterable[StagedFile]) -> None:
            check_staged(table, files)
            successor.enter_context(taken_over(store, "summaries"))

        monkeypatch.setattr(Table, "check_staged", slow)
        parts = [Publish("summaries", "overwrite", [staged], [values])]
        with pytest.raises(RaypipeError, match=r"lease on summaries ran out .* Nothing more was published"):
            session.publish(run, parts, JobResult("summarize", "ok"))
        assert (run.publish_intent(), workspace.tables["summaries"].version()) == (None, -1)


def test_versions_are_settled_where_no_run_is_between_its_commits(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled_versions(workspace, *TABLES) == {"block_summaries": -1, "summaries": -1}
    half_published(workspace, run_of(session_of(workspace)))
    assert settled_versions(workspace, "histories") == {"histories": -1}
    with monkeypatch.context() as patch:
        patch.setattr("raypipe.runtime.publishing._COMMITS_WAIT_S", 0.0)
        assert settled_versions(workspace, *TABLES) is None
    # One that is alive is waited for.
    publish = threading.Timer(0.5, recover, (workspace, "extract", set()))
    publish.start()
    assert settled_versions(workspace, *TABLES) == {"block_summaries": 0, "summaries": 0}
    publish.join()


def test_a_night_keeps_what_its_runs_spent_when_their_inputs_move_on_or_they_run_again(workspace: Workspace) -> None:
    night, unit = NightRuns(workspace.store, "2026-01-05"), Unit("users", 0)
    session = Session(workspace, "summarize", ClusterConfig(), [], night)
    killed = run_of(session)
    killed.record_usage(unit, 1, Usage(3))
    assert run_of(session).run_key == killed.run_key
    moved = session.run("another recipe", session.versions("histories"), session.versions(*TABLES), "all", {})
    moved.record_usage(unit, 1, Usage(5))
    assert killed.result() == {"status": "abandoned", "why": f"run {moved.run_key} took its place"}
    session.publish(moved, [], JobResult("summarize", "nothing_to_do"))
    again = session.run("another recipe", session.versions("histories"), session.versions(*TABLES), "all", {})
    assert (again.run_key, again.spent("users")) == (moved.run_key, Usage())
    assert [(run.run_key, run.spent.calls) for run in night.all()] == [
        (killed.run_key, 3),
        (moved.run_key, 5),
        (moved.run_key, 0),
    ]
    # A run of nobody's night has its own caps.
    assert run_of(session_of(workspace)).number == 4
    assert night.spent("summarize") == Usage(8)


def test_a_run_that_is_begun_anew_outside_of_a_night_leaves_what_the_night_spent(workspace: Workspace) -> None:
    night, unit = NightRuns(workspace.store, "2026-01-05"), Unit("users", 0)
    session = Session(workspace, "summarize", ClusterConfig(), [], night)
    run = run_of(session)
    run.record_usage(unit, 1, Usage(3))
    run.abandon("discarded by hand")
    again = run_of(session_of(workspace))
    assert again.run_key == run.run_key
    again.record_usage(unit, 1, Usage(20))
    assert night.spent("summarize") == Usage(3)
    again.finish(DONE)
    assert night.spent("summarize") == Usage(3)


def killed(workspace: Workspace, session: Session, variant: str, recipe: str, calls: int = 7) -> Run:
    """A run of that variant whose first bucket is done."""
    run = session.run(recipe, session.versions("histories"), session.versions("summaries"), "all", {"variant": variant})
    row = {"user_id": ["u1"], "summary": [recipe]} | {
        column.name: [None] for column in SUMMARIES.columns if column.name not in {"user_id", "summary"}
    }
    rows = pa.table({name: pa.array(row[name], SUMMARIES.columns.field(name).type) for name in SUMMARIES.columns.names})
    staged = workspace.tables["summaries"].stage(rows, run.run_key, {"variant": variant, "bucket": 0})
    run.plan("users", [Unit("users", 0), Unit("users", 1)])
    run.commit(Receipt(Unit("users", 0), Counts(1, 1), Usage(calls), {"summaries": [staged]}))
    return run


def rows_under(workspace: Workspace, variant: str) -> list[str]:
    table = workspace.tables["summaries"]
    return table.read(table.version(), ["summary"], variant=variant)["summary"].to_pylist()


def test_what_a_killed_run_of_another_variant_finished_is_published_before_this_ones_rows(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(workspace)
    recurrent = killed(workspace, session, "recurrent", "r")
    session.keep_finished("h", "hierarchical", ["histories"], ["summaries"])
    hierarchical = killed(workspace, session, "hierarchical", "h")
    assert (recurrent.result() or {})["status"] == "interrupted"
    assert "was killed and another variant than recurrent is made now; the 1 of 2 buckets" in capsys.readouterr().err
    assert rows_under(workspace, "recurrent") == ["r"]
    session.publish(hierarchical, bucket_parts(hierarchical.receipts().values(), "hierarchical", ["summaries"]), OK)
    assert rows_under(workspace, "hierarchical") == ["h"]
    # The other one goes on from its rows.
    session.keep_finished("r", "recurrent", ["histories"], ["summaries"])
    rest = killed(workspace, session, "recurrent", "r")
    session.publish(rest, bucket_parts(rest.receipts().values(), "recurrent", ["summaries"]), OK)
    assert (rows_under(workspace, "recurrent"), rows_under(workspace, "hierarchical")) == (["r"], ["h"])
    assert workspace.open_runs() == []


def test_a_run_that_is_given_up_with_what_it_finished_is_told(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(workspace)
    first = killed(workspace, session, "v", "another prompt")
    session.keep_finished("recipe", "v", ["histories"], ["summaries"])
    second = session.run("recipe", session.versions("histories"), session.versions("summaries"), "all", {})
    told = capsys.readouterr().err
    assert f"run {first.run_key[:12]}, which has not ended, is given up" in told
    assert "with it 1 finished units of 7 model calls" in told
    # Of one that had finished nothing there is nothing to tell.
    session.run("third", session.versions("histories"), session.versions("summaries"), "all", {})
    assert (second.result() or {})["status"] == "abandoned"
    assert "given up" not in capsys.readouterr().err


def test_a_canary_is_locked_by_its_users_and_job(workspace: Workspace) -> None:
    cluster = ClusterConfig()
    with open_session(workspace, "summarize", TABLES, cluster, scope="c" * 32):
        with (
            pytest.raises(UnavailableError, match="canary-summarize-cccccccccccc is being written by summarize"),
            open_session(workspace, "summarize", TABLES, cluster, scope="c" * 32),
        ):
            pass
        # What is of others, or the workspace's own, stands beside it.
        with (
            open_session(workspace, "explain", TABLES, cluster, scope="c" * 32),
            open_session(workspace, "summarize", TABLES, cluster, scope="d" * 32),
            open_session(workspace, "summarize", TABLES, cluster),
        ):
            pass


def test_who_begins_while_another_commits_waits_for_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(session_of(workspace))
    half_published(workspace, run)
    writer = Lock(workspace.store, "summaries", "summarize")
    with writer, monkeypatch.context() as patch:
        patch.setattr("raypipe.runtime.publishing._COMMITS_WAIT_S", 0.0)
        with pytest.raises(UnavailableError, match="summaries is being written by summarize"):
            recover(workspace, "extract", set())

    def commit() -> None:
        time.sleep(0.5)
        complete(workspace, run)  # and goes on writing

    with writer:
        thread = threading.Thread(target=commit)
        thread.start()
        recover(workspace, "extract", set())
        thread.join()
    assert settled_versions(workspace, *TABLES) == {"block_summaries": 0, "summaries": 0}


def test_a_canary_does_not_hide_that_nothing_changed(workspace: Workspace) -> None:
    session = session_of(workspace)
    run_of(session).finish(DONE)
    pins = session.versions("histories")
    assert session.is_current("recipe", pins)
    run_of(session, "canary").finish(DONE)
    assert session.is_current("recipe", pins)
    assert not session.is_current("another recipe", pins)


def test_a_cluster_that_starts_too_late_is_told_with_the_remedy_and_any_other_error_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some raylet failed.")

    def broken(**_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests of this process have started
    monkeypatch.setattr("ray.init", late)
    with pytest.raises(
        UnavailableError, match=r"^Ray did not start .* Submit the same command again when less does\.$"
    ):
        ClusterConfig().connect()
    monkeypatch.setattr("ray.init", broken)
    with pytest.raises(OSError, match="No space left"):
        ClusterConfig().connect()
