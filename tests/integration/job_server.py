"""A real `ray start --head` with token authentication, and jobs submitted to it as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
START_HEAD = ROOT / "cluster/start-head.sh"
_BIN = Path(sys.executable).parent
_START_S = 120.0


@dataclass(frozen=True)
class Job:
    """How a submitted job ended, by the Jobs API."""

    status: str
    exit_code: int | None
    logs: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object a raypipe job ends with."""
        return json.loads(self.logs.rstrip().splitlines()[-1])


@dataclass(frozen=True)
class JobServer:
    """A running head: the URL of its Jobs API, and what a client needs to be let in."""

    url: str
    token: str

    def submit(self, *entrypoint: str) -> Job:
        """`ray job submit` with the repository as working directory; waits for the end."""
        name = f"test-{os.urandom(4).hex()}"
        command = [
            "job",
            "submit",
            "--address",
            self.url,
            "--submission-id",
            name,
            "--working-dir",
            ".",
            "--",
            *entrypoint,
        ]
        ended = run_ray(command, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token})
        assert f"Job '{name}' submitted" in ended.stdout, ended.stdout + ended.stderr
        info = self.get(f"jobs/{name}")
        logs = self.get(f"jobs/{name}/logs")["logs"]
        return Job(info["status"], info["driver_exit_code"], logs)

    def get(self, path: str) -> Any:
        return json.loads(self._request(path, self.token))

    def refusal(self, path: str, token: str) -> int:
        """The HTTP status a client with that token (empty: without one) gets; 0 where it is let in."""
        try:
            self._request(path, token)
        except urllib.error.HTTPError as error:
            return error.code
        return 0

    def _request(self, path: str, token: str) -> bytes:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.url}/api/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


def run_ray(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The `ray` command, in the repository, with no Ray variable but those given."""
    return subprocess.run(
        [str(_BIN / "ray"), *words],
        cwd=ROOT,
        env=_environment() | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@contextmanager
def start_job_server(log: Path) -> Iterator[JobServer]:
    """A head with two CPUs, its own ports, folder and token; ends with its processes, and only those, killed."""
    token = os.urandom(32).hex()
    ports = _free_ports(6)
    names = (
        "port",
        "dashboard-port",
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
    )
    # A short path, because a Unix socket's is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [str(START_HEAD), "--num-cpus", "2", "--temp-dir", folder]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
        command += ["--object-store-memory", str(200 << 20)]
        command += [word for name, port in zip(names, ports, strict=True) for word in (f"--{name}", str(port))]
        with log.open("wb") as output:
            head = subprocess.Popen(
                command,
                env=_environment() | {"RAY_AUTH_TOKEN": token},
                stdout=output,
                stderr=output,
            )
        server = JobServer(f"http://127.0.0.1:{ports[1]}", token)
        try:
            _wait_for(server, head, log)
            yield server
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            for process in [*processes, psutil.Process(head.pid)]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            head.wait()
            psutil.wait_procs(processes, timeout=20)


def _wait_for(server: JobServer, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(server):
        assert head.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no Jobs API: {log.read_text()[-3000:]}"
        time.sleep(0.3)


def _answers(server: JobServer) -> bool:
    try:
        server.get("jobs/")
    except OSError:
        return False
    return True


def _environment() -> dict[str, str]:
    """This process's, without what another Ray put there, and with this interpreter as `python`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{_BIN}{os.pathsep}{kept['PATH']}"}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
