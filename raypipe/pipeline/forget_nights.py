"""Moving nights to the tables that `forget` published without its users.

`forget` publishes tables first, then moves the nights to them. If it is killed in between, the nights still name the
tables from before it, and no night names the new ones. A job that deletes files has to move the nights first.
"""

from __future__ import annotations

from dataclasses import replace

from raypipe.pipeline.forget_traces import Sought
from raypipe.storage.ledger import Run
from raypipe.storage.nights import Nights
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace

JOB = "forget"


def last_forgetting(workspace: Workspace) -> Run | None:
    """The newest run of `forget` if it has published, else None.

    If it was killed after that, its nights wait to be moved.
    """
    run = workspace.ledger(JOB).newest()
    return run if run is not None and "tables" in (run.result() or {}) else None


def move_nights(workspace: Workspace, run: Run | None, sought: Sought | None = None) -> int:
    """Let nights that read the tables which `run` replaced read those that it published. Returns how many were removed.

    A night is removed if it reads older tables that hold one of the users who are `sought`.
    """
    if run is None:
        return 0
    result = run.result()
    assert result is not None
    before = run.manifest["base"]
    after = {name: table["version"] for name, table in result["tables"].items()}
    nights = Nights(workspace.store)
    dropped = 0
    for date in nights.dates():
        night = nights.get(date)
        assert night is not None
        tables = {name: after.get(name, v) if v == before.get(name) else v for name, v in night.tables.items()}
        if tables != dict(night.tables):
            tables |= {name: version for name, version in after.items() if before.get(name) == ABSENT}
            nights.rewrite(replace(night, tables=tables))
        if sought is not None and any(sought.are_in(name, version) for name, version in tables.items()):
            nights.remove(date)
            dropped += 1
    return dropped
