"""The nightly on the real MovieLens 100K, through Ray's own job server with token authentication."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from raypipe.storage.nights import Nights
from raypipe.storage.workspace import Workspace
from tests.integration.job_server import ROOT, START_HEAD, Job, JobServer, run_ray

ML_100K = ROOT.parent / "shared" / "data" / "ml-100k"
REFUSED = (401, 403)


class Submitted(NamedTuple):
    """A night submitted to the server: its workspace, its command and how it ended."""

    workspace: str
    command: tuple[str, ...]
    job: Job


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens 100K, or where this machine does not have it, a generated log of the same layout and size."""
    return ML_100K.resolve() if ML_100K.is_dir() else write_movielens(tmp_path_factory.mktemp("ml-100k"))


@pytest.fixture(scope="module")
def night(server: JobServer, movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    workspace = str(tmp_path_factory.mktemp("night") / "workspace")
    command = nightly(workspace, movielens)
    return Submitted(workspace, command, server.submit(*command))


def write_movielens(folder: Path) -> Path:
    flags = ("0|" * 8 + "1|" + "0|" * 10)[:-1]
    items = [
        f"{item}|The {item}th Film (1995)|01-Jan-1995||http://localhost/{item}|{flags}\r\n" for item in range(1, 1683)
    ]
    (folder / "u.item").write_text("".join(items), encoding="latin-1", newline="")
    # 7 and 1,682 have no common divisor: no user sees an item twice.
    events = [
        (n % 943 + 1, (n // 943 * 7 + n % 943 * 13) % 1682 + 1, n % 5 + 1, 880_000_000 + n) for n in range(100_000)
    ]
    (folder / "u.data").write_text("".join("\t".join(map(str, event)) + "\n" for event in events))
    return folder


def nightly(workspace: str, log: Path) -> tuple[str, ...]:
    options = {
        "config": "jobs/nightly-ml-100k.yaml",
        "workspace": workspace,
        "date": "2024-05-01",
        "tracking": "off",
        "ingest.log.path": str(log),
        "summarize.engine.engine": "echo",
    }
    return ("python", "jobs/nightly.py", *(word for name, value in options.items() for word in (f"--{name}", value)))


def test_a_submitted_night_succeeds_and_ends_with_its_json(night: Submitted) -> None:
    job = night.job
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0), job.logs
    assert (job.result["job"], job.result["status"]) == ("nightly", "ok")
    assert job.result["metrics"]["ingest.rows_in"] == 100_000
    assert job.result["metrics"]["summarize.computed"] == 943


def test_every_event_and_every_user_of_movielens_is_in_the_night(night: Submitted) -> None:
    workspace = Workspace(night.workspace)
    current = Nights(workspace.store).current()
    assert current is not None, night.job.logs
    histories = workspace.tables["histories"].read(current.tables["histories"], ["user_id", "items"])
    summaries = workspace.tables["summaries"].read(current.tables["summaries"], ["user_id", "summary"])
    users = {str(number) for number in range(1, 944)}
    assert sorted(histories["user_id"].to_pylist()) == sorted(users)
    assert sorted(summaries["user_id"].to_pylist()) == sorted(users)
    assert all(summaries["summary"].to_pylist())
    (log,) = workspace.tables["logs"].read(current.tables["logs"]).to_pylist()
    assert log["rows_in"] == 100_000
    assert (log["rows_rejected"], log["rows_duplicate"], log["rows_filtered"], log["rows_forgotten"]) == (0, 0, 0, 0)
    assert log["rows_ok"] == sum(map(len, histories["items"].to_pylist())) == 100_000


def test_the_same_submission_again_has_nothing_to_do(night: Submitted, server: JobServer) -> None:
    again = server.submit(*night.command)
    assert (again.status, again.exit_code) == ("SUCCEEDED", 0), again.logs
    assert again.result["status"] == "nothing_to_do"


def test_a_wrong_config_ends_with_exit_code_2_and_its_remedy(server: JobServer, tmp_path: Path) -> None:
    job = server.submit(
        "python", "jobs/nightly.py", "--workspace", str(tmp_path / "workspace"), "--summarize.enjine", "echo"
    )
    assert (job.status, job.exit_code) == ("FAILED", 2), job.logs
    assert job.result["status"] == "failed"
    assert "--summarize.engine" in job.logs
    assert not (tmp_path / "workspace").exists()


def test_a_client_without_the_token_is_refused(server: JobServer) -> None:
    assert server.refusal("jobs/", token=server.token) == 0
    assert server.refusal("jobs/", token="") in REFUSED
    assert server.refusal("jobs/", token="0" * 64) in REFUSED
    before = len(server.get("jobs/"))
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    ended = run_ray(["job", "submit", "--address", server.url, "--", "python", "--version"], stranger)
    assert ended.returncode == 1
    assert "Python 3" not in ended.stdout
    assert len(server.get("jobs/")) == before


def test_a_head_without_a_token_is_not_started(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    ended = subprocess.run([str(START_HEAD)], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "Set RAY_AUTH_TOKEN" in ended.stderr
