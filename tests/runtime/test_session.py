"""What a session finds and leaves in a workspace, without a cluster."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from raypipe.errors import UnavailableError
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.session import Session, recover, settled_versions
from raypipe.storage.ledger import Publish, Run
from raypipe.storage.schemas import BLOCK_SUMMARIES, SUMMARIES
from raypipe.storage.workspace import Workspace

TABLES = ("block_summaries", "summaries")
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


def test_versions_are_settled_where_no_run_is_between_its_commits(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled_versions(workspace, *TABLES) == {"block_summaries": -1, "summaries": -1}
    half_published(workspace, run_of(session_of(workspace)))
    assert settled_versions(workspace, "histories") == {"histories": -1}
    with monkeypatch.context() as patch:
        patch.setattr("raypipe.runtime.session._COMMITS_WAIT_S", 0.0)
        assert settled_versions(workspace, *TABLES) is None
    # One that is alive is waited for.
    publish = threading.Timer(0.5, recover, (workspace, "extract", set()))
    publish.start()
    assert settled_versions(workspace, *TABLES) == {"block_summaries": 0, "summaries": 0}
    publish.join()


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
