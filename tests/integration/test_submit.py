"""`raypipe submit` against a real job server with token authentication."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from tests.integration.job_server import ROOT, JobServer
from tests.integration.silent_proxy import silent_proxy
from tests.pipeline.small_logs import START, write_catalogue, write_log
from tests.untrained import store_untrained


class Submitted(NamedTuple):
    """How `raypipe submit` ended."""

    code: int
    result: dict[str, Any]
    stderr: str

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.result["metrics"])


def submit(server: JobServer, *words: object, token: str | None = None) -> Submitted:
    command = [sys.executable, "-m", "raypipe.cli.main", "submit", "--address", server.url, *map(str, words)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or server.token, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    return Submitted(ended.returncode, json.loads(ended.stdout.strip().splitlines()[-1]), ended.stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    events = [(f"u{n % 12}", f"i{(n * n + n) % 23 + 1}", START + n) for n in range(120)]
    return write_log(folder / "log.csv", events), write_catalogue(folder / "items.csv", 23)


def ingest(uri: Path, log: Path, catalogue: Path) -> tuple[object, ...]:
    read = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    return ("ingest", "--workspace", uri, "--tracking", "off", *read)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submitted") / "workspace"


@pytest.fixture(scope="module")
def first(server: JobServer, data: tuple[Path, Path], workspace: Path) -> Submitted:
    return submit(server, "--owner", "platform", *ingest(workspace, *data))


def test_a_job_is_submitted_and_followed(server: JobServer, first: Submitted, workspace: Path) -> None:
    assert (first.code, first.result["status"]) == (0, "ok"), first.stderr
    name = first.facts["submission_id"]
    assert re.fullmatch(r"ingest-\d{4}-\d\d-\d\d-[0-9a-f]{12}-1", name)
    assert first.result["run_key"] == first.facts["result"]["run_key"] != ""
    # What the job printed, and the JSON it ended with.
    assert '"job": "ingest"' in first.stderr
    assert first.facts["result"]["metrics"]["rows_in"] == 120
    again = f"raypipe submit --address {server.url} --owner platform ingest --workspace {workspace}"
    assert f"to resume it after a failure: {again}" in first.stderr
    assert "WARNING" not in first.stderr
    info = server.get(f"jobs/{name}")
    assert info["driver_exit_code"] == 0
    assert (info["metadata"]["owner"], info["metadata"]["attempt"]) == ("platform", "1")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info["metadata"]["git_sha"])
    assert len(info["metadata"]["config_hash"]) == 32
    assert info["runtime_env"]["working_dir"].startswith("gcs://")


def test_a_run_that_succeeded_is_submitted_again_only_where_that_is_asked_for(
    server: JobServer, data: tuple[Path, Path], first: Submitted, workspace: Path
) -> None:
    known = len(server.get("jobs/"))
    twice = submit(server, *ingest(workspace, *data))
    assert (twice.code, twice.result["status"]) == (2, "failed")
    assert "has succeeded" in twice.stderr
    assert len(server.get("jobs/")) == known
    forced = submit(server, "--again", "--no-wait", *ingest(workspace, *data))
    assert (forced.code, forced.result["status"]) == (0, "ok"), forced.stderr
    assert forced.facts["submission_id"] == first.facts["submission_id"][:-1] + "2"
    assert "ray job logs --follow" in forced.stderr


def test_a_job_that_fails_says_how_to_resume_and_is_the_next_attempt_then(
    server: JobServer, data: tuple[Path, Path], tmp_path: Path
) -> None:
    log, catalogue = data
    late = tmp_path / "late.csv"
    words = ingest(tmp_path / "workspace", late, catalogue)
    failed = submit(server, *words)
    assert (failed.code, failed.result["status"], failed.facts["driver_exit_code"]) == (2, "failed", 2), failed.stderr
    assert str(late) in failed.result["error"]
    assert f"to resume: raypipe submit --address {server.url} ingest --workspace" in failed.stderr
    shutil.copy(log, late)
    resumed = submit(server, *words)
    assert (resumed.code, resumed.result["status"]) == (0, "ok"), resumed.stderr
    assert resumed.facts["attempt"] == 2


def test_a_job_whose_logs_fall_silent_is_followed_to_its_end(
    server: JobServer, data: tuple[Path, Path], tmp_path: Path
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with silent_proxy(host, int(port)) as (silent, silenced):
        ended = submit(replace(server, url=f"http://127.0.0.1:{silent}"), *ingest(tmp_path / "workspace", *data))
    assert len(silenced) == 1
    assert (ended.code, ended.result["status"]) == (0, "ok"), ended.stderr
    assert ended.facts["result"]["status"] == "ok"


def test_a_refused_release_ends_with_exit_code_3(server: JobServer, first: Submitted, workspace: Path) -> None:
    assert first.code == 0
    store_untrained(str(workspace), RecommenderConfig(model="sasrec", width=8, max_length=5))
    refused = submit(server, "release", "--workspace", workspace, "--recommender", "sasrec")
    assert (refused.code, refused.result["status"], refused.facts["driver_exit_code"]) == (3, "refused", 3), (
        refused.stderr
    )
    assert "popularity" in refused.result["error"]
    assert Releases(Store(str(workspace))).named("champion") is None


def test_a_stranger_is_told_about_the_token(server: JobServer, tmp_path: Path) -> None:
    known = len(server.get("jobs/"))
    ended = submit(server, "status", "--workspace", tmp_path, token="0" * 64)
    assert (ended.code, ended.result["status"]) == (2, "failed")
    assert "RAY_AUTH_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(server.get("jobs/")) == known
