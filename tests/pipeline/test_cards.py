"""The night's cards, seen by a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from raypipe.storage.workspace import Workspace
from tests.conftest import Run, unavailable
from tests.pipeline.small_logs import random_events, write_catalogue, write_log

HOSTILE = "<script>document.title='owned'</script> & \"Quotes\" 🎬"


@pytest.mark.usefixtures("ray_cluster")
def test_a_browser_shows_history_and_summary_of_each_user_and_runs_no_title(
    raypipe: Run, files: Path, tmp_path: Path
) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        unavailable("There is no chromium")
    uri = str(tmp_path / "workspace")
    titles = {f"i{n}": f"Title {n}" for n in range(1, 20)} | {"i20": HOSTILE}
    catalogue = write_catalogue(files / "items.csv", titles)
    log = write_log(
        files / "log.csv", [*random_events(1, 8, 19, 200), *((f"u{n}", "i20", 1_800_000_000_000) for n in range(8))]
    )
    words = ("--ingest.log.path", log, "--ingest.log.columns.time", "time", "--ingest.catalogue.path", catalogue)
    ended = raypipe("nightly", "--workspace", uri, *words, "--summarize.engine.engine", "echo", "--date", "2026-01-02")
    assert ended.status == "ok"
    page = Path(uri) / "nights/2026-01-02/cards.html"
    command = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.count("<article>") == 8
    assert "<title>Night of 2026-01-02</title>" in shown.stdout
    assert "&lt;script&gt;" in shown.stdout
    workspace = Workspace(uri)
    summaries = workspace.tables["summaries"].read(workspace.tables["summaries"].version())
    assert all(summary.split(" #")[-1] in shown.stdout for summary in summaries["summary"].to_pylist())
