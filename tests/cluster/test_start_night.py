"""The CronJob's starter, against a server that keeps RayJobs as Kubernetes does."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Due at 2026-01-05 01:30 UTC.
NIGHT = "raypipe-nightly-29459610"
MANIFEST = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"generateName": "raypipe-nightly-", "namespace": "night", "labels": {"raypipe/job": "nightly"}},
    "spec": {"entrypoint": "python jobs/nightly.py", "backoffLimit": 0},
}
PATH = "/apis/ray.io/v1/namespaces/night/rayjobs"
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def failed(code: int) -> dict[str, str]:
    told = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n{{}}"
    )
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": told}


class Server:
    """RayJobs by name; one that is created ends as `ends` says, after it was asked for `runs` times."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.ends: list[dict[str, str]] = []
        self.runs = 2
        self.created: list[str] = []
        self.asked = 0
        self.refused: set[int] = set()
        self.tokens: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.tokens.add(self.headers["Authorization"])
                path, _, query = self.path.partition("?")
                selector = urllib.parse.parse_qs(query)["labelSelector"][0]
                if path != PATH or selector != f"raypipe/night={NIGHT}":
                    return self.send_error(404)
                outer.asked += 1
                if outer.asked in outer.refused:
                    return self.send_error(503)
                for job in outer.jobs.values():
                    job["asked"] = job.get("asked", 0) + 1
                    if "status" not in job and job["asked"] > outer.runs:
                        job["status"] = outer.ends.pop(0)
                return self.answer({"items": list(outer.jobs.values())})

            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.created.append(job["metadata"]["name"])
                outer.jobs[job["metadata"]["name"]] = job
                self.answer(job)

            def answer(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def has(self, attempt: int, status: dict[str, str] | None) -> None:
        labels = {"raypipe/night": NIGHT, "raypipe/attempt": str(attempt)}
        job: dict[str, Any] = {"metadata": {"name": f"{NIGHT}-{attempt}", "labels": labels}}
        self.jobs[job["metadata"]["name"]] = job | ({"status": status} if status else {})


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def start(server: Server, folder: Path, night: str = NIGHT) -> int:
    (folder / "token").write_text("let me in\n")
    (folder / "rayjob.json").write_text(json.dumps(MANIFEST))
    script = ROOT / "cluster/kuberay/start_night.py"
    api = f"http://127.0.0.1:{server.http.server_port}"
    command = [sys.executable, "-S", str(script), str(folder / "rayjob.json"), "--api", api]
    command += ["--account", str(folder), "--poll_s", "0.02"]
    environment = {**os.environ, "NIGHT": night, "TZ": "UTC"}
    return subprocess.run(command, env=environment, timeout=60, check=False).returncode


def test_a_night_is_created_watched_and_its_exit_code_handed_on(server: Server, tmp_path: Path) -> None:
    server.ends = [SUCCEEDED]
    assert start(server, tmp_path) == 0
    job = server.jobs[f"{NIGHT}-1"]
    assert job["spec"]["entrypoint"] == "python jobs/nightly.py --date 2026-01-05"
    assert "generateName" not in job["metadata"]
    assert job["metadata"]["labels"]["raypipe/job"] == "nightly"
    assert server.tokens == {"Bearer let me in"}


def test_a_night_that_failed_is_tried_again_as_another_attempt(server: Server, tmp_path: Path) -> None:
    server.ends = [failed(1), SUCCEEDED]
    assert start(server, tmp_path) == 1
    assert start(server, tmp_path) == 0
    assert server.created == [f"{NIGHT}-1", f"{NIGHT}-2"]


@pytest.mark.parametrize("code", [2, 3])
def test_a_night_that_was_refused_is_not_tried_again(server: Server, tmp_path: Path, code: int) -> None:
    server.ends = [failed(code)]
    assert start(server, tmp_path) == code
    assert start(server, tmp_path) == code
    assert server.created == [f"{NIGHT}-1"]


def test_a_starter_that_was_evicted_finds_the_night_that_runs(server: Server, tmp_path: Path) -> None:
    server.has(1, failed(1))
    server.has(2, None)
    server.ends = [SUCCEEDED]
    assert start(server, tmp_path) == 0
    assert server.created == []


def test_a_night_that_ran_out_of_time_is_tried_again(server: Server, tmp_path: Path) -> None:
    late = {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "It took longer than 36000 s."}
    server.ends = [late, SUCCEEDED]
    assert start(server, tmp_path) == 1
    assert start(server, tmp_path) == 0


def test_kubernetes_may_be_away_for_a_while(server: Server, tmp_path: Path) -> None:
    server.ends = [SUCCEEDED]
    server.refused = {2, 3}
    assert start(server, tmp_path) == 0
    assert server.created == [f"{NIGHT}-1"]


def test_started_by_hand_it_is_the_night_of_today(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "NIGHT", "tonight")
    server.ends = [SUCCEEDED]
    before = datetime.datetime.now(datetime.UTC).date()
    assert start(server, tmp_path, "tonight") == 0
    told = server.jobs["tonight-1"]["spec"]["entrypoint"].split()[-1]
    assert before <= datetime.date.fromisoformat(told) <= datetime.datetime.now(datetime.UTC).date()
