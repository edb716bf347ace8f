"""What every test may use: a Ray of two workers, an S3 server, workspaces on both kinds of store, and the command line.

A test that needs a server or a client skips with the reason where there is none, except under CI, where it fails.
`make test` runs two processes of pytest side by side, each with a Ray of its own, but for what kills or is timed.
"""

from __future__ import annotations

import importlib.util
import json
import os

# Of every process that tests start, before any of them knows torch: threads that wait for each other's cores took twice
# the processor time of one (measured).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray Train looks every two seconds whether a training has ended: as long as some of them take here.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ground import GOOD, Ground
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_TRAINING, chain_events, write_catalogue, write_log
from tests.redis_server import RedisServer

BUCKET = "raypipe-tests"
_START_S = 40.0


def unavailable(reason: str) -> None:
    """Skip for want of a server, a client or a right; fail where all of them have to be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


class S3Server(NamedTuple):
    """A running S3 server: its URL, or why there is none; its log has a line for each request."""

    url: str
    problem: str
    log: Path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's server as a process of its own, with `AWS_*` pointing to it. Ray's workers inherit these variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("moto") / "server.log"
    patch = pytest.MonkeyPatch()
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        problem = _wait_for(url, process, log)
        if not problem:
            settings = {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
            }
            for name, value in settings.items():
                patch.setenv(name, value)
            problem = _make_bucket(url)
        yield S3Server(url, problem, log)
    finally:
        patch.undo()
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"moto's S3 server did not start: {log.read_text()[-500:]}"
        try:
            urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=2).read()
            return ""
        except OSError:
            time.sleep(0.1)
    return f"moto's S3 server did not answer within {_START_S:.0f} s"


def _make_bucket(url: str) -> str:
    try:
        import boto3
    except ImportError as error:
        return f"no bucket can be made on the S3 server: {error}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
    return ""


@pytest.fixture
def s3_uri(s3_server: S3Server) -> str:
    """A fresh prefix on the S3 server."""
    if s3_server.problem:
        unavailable(s3_server.problem)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["folder", "s3"])
def workspace_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh workspace's URI, once on a local folder and once on S3: the contract is the same."""
    return request.getfixturevalue("s3_uri") if request.param == "s3" else str(tmp_path / "workspace")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis shared by all tests: each uses a workspace, and so a prefix, of its own."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@contextmanager
def running_redis(folder: Path, keeps: bool = False) -> Iterator[RedisServer]:
    """A Redis that has started; with `keeps` it remembers in `folder` what it held."""
    need_redis_client()
    server = RedisServer(folder, keeps)
    try:
        server.start()
    except FileNotFoundError as error:
        unavailable(str(error))
    try:
        yield server
    finally:
        server.stop()


def need_redis_client() -> None:
    if importlib.util.find_spec("redis") is None:
        unavailable("redis's client is not installed")


@pytest.fixture(scope="session")
def stories() -> str:
    """The folder of a real checkpoint: grouped heads, and a tokenizer that puts a mark before every text."""
    folder = Path(__file__).parents[1] / "../shared/lm/stories260K"
    if not folder.is_dir():
        pytest.skip("the real checkpoint ../shared/lm/stories260K is not on this machine")
    return str(folder.resolve())


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[None]:
    """A real Ray with two CPUs on this machine, shared by all tests; its workers know the S3 server."""
    import ray

    if ray.is_initialized():  # another test's, whose workers do not know the S3 server
        ray.shutdown()
    ray.init(
        address="local",  # never a cluster that somebody else left running
        num_cpus=2,
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def trained_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the log of `chain_events` and a sasrec that has learnt it."""
    from raypipe.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    log, catalogue = write_log(folder / "log.csv", chain_events()), write_catalogue(folder / "items.csv", CHAIN_ITEMS)
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    assert main(["ingest", *shared, *words, "--cluster.workers", "1"]) == 0
    assert main(["train", *shared, *CHAIN_TRAINING]) == 0
    return folder / "workspace"


@dataclass(frozen=True)
class Ended:
    """How a job on the command line ended."""

    code: int
    result: dict[str, Any]
    stderr: str

    @property
    def status(self) -> str:
        return str(self.result["status"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.result["metrics"])


Run = Callable[..., Ended]


@pytest.fixture
def raypipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `raypipe JOB …` in this process; the job's JSON is the last line of stdout.

    Unless named otherwise there is one worker and no tracking: each costs a second or two that few tests are about.
    """
    from raypipe.cli.main import main

    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*words: object) -> Ended:
        argv = [str(word) for word in words]
        for option, value in (("--tracking", "off"), ("--cluster.workers", "1")):
            if option not in argv:
                argv += [option, value]
        capsys.readouterr()
        code = main(argv)
        output = capsys.readouterr()
        return Ended(code, json.loads(output.out.strip().splitlines()[-1]), output.err)

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An empty folder for logs, catalogues and configs."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def ground(tmp_path: Path, files: Path) -> Ground:
    return Ground(
        str(tmp_path / "workspace"),
        files,
        write_log(files / "log.csv", GOOD),
        write_catalogue(files / "items.csv", 5),
    )
