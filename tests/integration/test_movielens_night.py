"""The whole night on the real MovieLens 100K with the built-in language model, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.storage.nights import Nights
from raypipe.storage.workspace import Workspace

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/ml-100k"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_night_of_movielens_names_what_its_users_chose(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"MovieLens 100K is not at {DATA}")
    uri = str(tmp_path / "workspace")
    command = [sys.executable, "-m", "raypipe.cli.main", "nightly", "--workspace", uri, "--ingest.log.path", str(DATA)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["status"] == "ok"
    metrics = result["metrics"]
    left_out = ("ingest.rejected", "ingest.duplicate", "ingest.filtered", "ingest.forgotten")
    assert metrics["ingest.rows_in"] == 100_000
    assert metrics["ingest.events_added"] + sum(metrics[kind] for kind in left_out) == 100_000
    assert metrics["summarize.computed"] == 943
    assert metrics["summarize.attribute_precision"] >= 0.8
    assert metrics["summarize.attribute_coverage"] >= 0.6
    workspace = Workspace(uri)
    night = Nights(workspace.store).current()
    assert night is not None
    rows = {
        name: workspace.tables[name].rows(night.tables[name]) for name in ("histories", "summaries", "items", "logs")
    }
    assert rows == {"histories": 943, "summaries": 943, "items": 1682, "logs": 1}

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout.splitlines()[-1])["status"] == "nothing_to_do"
