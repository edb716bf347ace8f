"""How fast an engine was, by runs of which some were resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raypipe.pipeline.past_runs import PastRun, past_runs
from raypipe.storage.workspace import Workspace


@pytest.mark.parametrize(
    ("cost", "found"),
    [
        ({}, [PastRun(10.0, 3.0)]),
        ({"calls_before": 95}, [PastRun(0.5, 3.0)]),
        ({"calls_before": 100}, []),  # it had nothing left but to publish
    ],
)
def test_a_resumed_run_is_as_fast_as_its_last_submission(
    tmp_path: Path, cost: dict[str, Any], found: list[PastRun]
) -> None:
    workspace = Workspace(str(tmp_path))
    run = workspace.ledger("summarize").start("k" * 32, {"scope": "all", "facts": {"engine": "echo"}})
    run.finish({"status": "ok", "cost": {"calls": 100, "tokens_out": 300, "seconds": 10.0, **cost}})
    assert past_runs(workspace, "summarize", "echo") == found
