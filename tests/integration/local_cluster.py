"""The local cluster as its README starts it: nodes that are stopped and started, nights submitted and followed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from raypipe.storage.store import Store
from tests.conftest import unavailable
from tests.integration.job_server import ROOT

CPUS = 3
"""Of every node that works: the driver's, and two beside it."""
_NEEDED = ("ip", "redis-server", "prometheus", "setpriv", "unshare")
_SCRIPT = ROOT / "cluster/local/cluster.py"


class Following:
    """`raypipe submit` in a process of its own."""

    def __init__(self, words: list[str], environment: dict[str, str], output: Path) -> None:
        self._out, self._err = output.with_suffix(".out"), output.with_suffix(".err")
        self._started = time.monotonic()
        with self._out.open("w") as out, self._err.open("w") as err:
            command = [sys.executable, "-m", "raypipe.cli.main", "submit", *words]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    def wait_until(self, uri: str, job: str, units: int, timeout_s: float = 900.0) -> None:
        """Until so many units of a job have their receipts; fails where the submission ends before."""
        deadline = time.monotonic() + timeout_s
        while sum("/units/" in entry.path for entry in Store(uri).list(f"ledger/{job}")) < units:
            self.still_runs()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)

    def still_runs(self) -> None:
        assert self._process.poll() is None, f"it has ended already: {self.log()}"

    def result(self, timeout_s: float = 1500.0) -> dict[str, Any]:
        """The job's JSON, with `seconds` from its submission; fails where it did not end with 0."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"still running after {timeout_s:.0f} s: {self.log()}") from None
        assert code == 0, self.log()
        result = json.loads(self._out.read_text().strip().splitlines()[-1])
        return {**result["metrics"]["result"], "seconds": round(time.monotonic() - self._started, 1)}

    def log(self) -> str:
        return self._err.read_text()[-5000:] + self._out.read_text()[-500:]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Local:
    """A cluster that is up: how it was asked for, its clients' environment, and which nodes run with how many CPUs."""

    options: tuple[str, ...]
    folder: Path
    environment: dict[str, str]
    running: dict[str, int] = field(default_factory=dict)
    submitted: list[Following] = field(default_factory=list)

    def run(self, *words: str) -> None:
        """A command of cluster.py, which has to end well."""
        command = [sys.executable, str(_SCRIPT), *words, *self.options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def stand(self, **nodes: int) -> None:
        """Bring the cluster to these nodes, name → CPUs, the head among them."""
        for node in [name for name in self.running if self.running[name] != nodes.get(name)]:
            self.stop(node)
        for node in sorted(nodes.keys() - self.running.keys()):  # the head comes first
            self.start(node, nodes[node])

    def stop(self, node: str) -> None:
        self.run("stop", node)
        del self.running[node]

    def start(self, node: str, cpus: int) -> None:
        self.run("start", node, "--head_cpus" if node == "head" else "--cpus", str(cpus))
        self.running[node] = cpus

    def follow(self, *words: object) -> Following:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        environment = kept | self.environment | {"PYTHONPATH": str(ROOT)}
        output = self.folder / f"submit-{len(self.submitted)}"
        self.submitted.append(Following(list(map(str, words)), environment, output))
        return self.submitted[-1]

    def submit(self, *words: object) -> dict[str, Any]:
        return self.follow(*words).result()

    def get(self, url: str, token: str = "") -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return json.load(answer)

    def jobs(self) -> list[dict[str, Any]]:
        token = (self.folder / "token").read_text()
        return list(self.get(f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", token))

    def driver_node(self) -> str:
        """The worker on which the driver of the only running job sits."""
        (address,) = [
            job["driver_info"]["node_ip_address"]
            for job in self.jobs()
            if job["status"] == "RUNNING" and job["submission_id"]
        ]
        return f"worker{int(address.rsplit('.', 1)[1]) - 10}"


@contextmanager
def local_cluster() -> Iterator[Local]:
    """A head without CPUs and two workers; ends with its processes, and only those, killed."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    missing += [] if list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) else ["postgresql"]
    missing += [] if importlib.util.find_spec("psycopg2") else ["psycopg2"]
    if missing or os.geteuid():
        unavailable(f"the local cluster needs root and {', '.join(missing)}")
    probe = subprocess.run(["ip", "netns", "add", "raypipe-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        # Nobody can be asked to give a container this right.
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", "raypipe-probe"], check=True)
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        draw = secrets.randbelow(200) + 20
        prefix = "rp" + "".join(chr(ord("a") + int(digit)) for digit in f"{draw:03d}")
        local = Local(("--folder", name, "--name", prefix, "--network", f"10.201.{draw}"), folder, {})
        try:
            local.run("up", "--cpus", str(CPUS))
            local.running = {"head": 0, "worker1": CPUS, "worker2": CPUS}
            local.environment |= dict(re.findall(r"export (\w+)='(.*)'", (folder / "environment").read_text()))
            yield local
        finally:
            for submission in local.submitted:
                submission.end()
            local.run("down")
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert f"{prefix}-" not in left
        assert not [
            process for process in psutil.process_iter(["cmdline"]) if name in " ".join(process.info["cmdline"] or [])
        ]
        shutil.rmtree(f"/tmp/ray-{prefix}", ignore_errors=True)
