"""Three nodes on one machine: a night on S3 by `raypipe submit`, a node that is lost, a head that comes back."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import unavailable
from tests.integration.job_server import ROOT
from tests.pipeline.small_logs import SMALL_ITEMS, SMALL_LOG, write_catalogue, write_log

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NEEDED = ("ip", "redis-server", "prometheus", "setpriv")


@dataclass(frozen=True)
class Local:
    """A cluster that is up: how it was asked for, and its clients' environment."""

    options: tuple[str, ...]
    folder: Path
    environment: dict[str, str]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cluster/local/cluster.py"), *words, *self.options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def submit(self, *words: object) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        command = [sys.executable, "-m", "raypipe.cli.main", "submit", *map(str, words)]
        environment = kept | self.environment | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert ended.returncode == 0, ended.stderr[-5000:]
        return dict(json.loads(ended.stdout.strip().splitlines()[-1]))

    def get(self, url: str, token: str = "") -> Any:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return json.load(answer)

    def jobs(self) -> list[dict[str, Any]]:
        token = (self.folder / "token").read_text()
        return list(self.get(f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", token))


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    missing += [] if list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) else ["postgresql"]
    missing += [] if importlib.util.find_spec("psycopg2") else ["psycopg2"]
    if missing or os.geteuid():
        unavailable(f"the local cluster needs root and {', '.join(missing)}")
    probe = subprocess.run(["ip", "netns", "add", "raypipe-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        # Nobody can be asked to give a container this right.
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", "raypipe-probe"], check=True)
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        draw = secrets.randbelow(200) + 20
        name = "rp" + "".join(chr(ord("a") + int(digit)) for digit in f"{draw:03d}")
        found = Local(("--folder", folder, "--name", name, "--network", f"10.201.{draw}"), Path(folder), {})
        try:
            up = found.run("up")
            assert up.returncode == 0, up.stdout + up.stderr
            lines = (Path(folder) / "environment").read_text()
            yield Local(found.options, found.folder, dict(re.findall(r"export (\w+)='(.*)'", lines)))
        finally:
            down = found.run("down")
        assert down.returncode == 0, down.stderr
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert f"{name}-" not in left
        assert not [
            process for process in psutil.process_iter(["cmdline"]) if folder in " ".join(process.info["cmdline"] or [])
        ]
        shutil.rmtree(f"/tmp/ray-{name}", ignore_errors=True)


def test_a_night_on_three_nodes_is_watched_and_outlives_a_worker_and_the_head(local: Local, tmp_path: Path) -> None:
    host = local.environment["MLFLOW_TRACKING_URI"].rsplit(":", 1)[0]
    log, catalogue = write_log(tmp_path / "log.csv", SMALL_LOG), write_catalogue(tmp_path / "items.csv", SMALL_ITEMS)
    night = ("nightly", "--workspace", "s3://raypipe/ws", "--summarize.engine.engine", "echo")
    night += (
        "--ingest.log.columns.time",
        "time",
        "--ingest.catalogue.path",
        str(catalogue),
        "--ingest.log.path",
        str(log),
    )
    first = local.submit(*night, "--date", "2026-01-05")
    assert first["status"] == "ok"
    assert first["metrics"]["result"]["metrics"]["summarize.computed"] == 25
    # It was seen by MLflow on PostgreSQL, and every node by Prometheus.
    found = urllib.request.Request(
        f"{local.environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get-by-name?experiment_name=raypipe"
    )
    experiment = local.get(found.full_url)["experiment"]
    assert experiment["lifecycle_stage"] == "active"
    deadline = time.monotonic() + 60
    while True:
        targets = local.get(f"{host}:9090/api/v1/targets")["data"]["activeTargets"]
        if [target["health"] for target in targets] == ["up"] * 3 or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert [target["health"] for target in targets] == ["up"] * 3
    assert len(local.get(f"{host}:9090/api/v1/rules")["data"]["groups"]) == 3

    # A worker node is lost for good; the next night has the other.
    assert local.run("stop", "worker1").returncode == 0
    second = local.submit(*night, "--date", "2026-01-06", "--summarize.summaries.block_decoding.seed", "1")
    assert second["metrics"]["result"]["metrics"]["summarize.computed"] == 25

    # The head dies and comes back: what it knew is in Redis.
    known = {job["submission_id"] for job in local.jobs()}
    assert local.run("stop", "head").returncode == 0
    assert local.run("start", "head").returncode == 0
    assert {job["submission_id"] for job in local.jobs()} == known
    third = local.submit(*night, "--date", "2026-01-07")
    assert third["metrics"]["result"]["status"] in {"ok", "nothing_to_do"}
