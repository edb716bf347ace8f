"""A cluster of several nodes on one machine, to start, watch and break: `python cluster/local/cluster.py up`, and `down`.

Each Ray node has a network namespace of its own, joined by a bridge: a node that is stopped is gone as a machine would be,
and its address with it. Beside them, on the bridge's own address: Redis (the head's state, the online store), an S3 server,
MLflow on PostgreSQL, Prometheus. Ray asks for a token. `stop NODE` kills a node, `start NODE` brings it back.

It needs root, iproute2 and Debian's packages redis-server, postgresql and prometheus. The S3 server is moto's, which
forgets at `down`. Nothing listens outside of the bridge.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from raypipe.cli.options import parse_config
from raypipe.config import Config, free
from raypipe.errors import RaypipeError, UsageError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_HEAD = ROOT / "cluster/start-head.sh"
HEAD = "head"
_UP_S = 120.0
_DASHBOARD, _GCS, _METRICS = 8265, 6379, 8080


class Options(Config):
    """Where the cluster is, and of what size."""

    folder: str = free("build/local", "logs, data and the token; others may enter it, for PostgreSQL is not root")
    name: str = free("rp", "beginning of the names of namespaces and the bridge", pattern="^[a-z]{1,6}$")
    network: str = free("10.77.0", "first three numbers of the bridge's network", pattern=r"^\d+\.\d+\.\d+$")
    workers: int = free(2, "worker nodes", ge=0)
    cpus: int = free(1, "CPUs that each worker node says it has", ge=1)
    redis_port: int = free(6379, "of Redis")
    s3_port: int = free(9000, "of the S3 server")
    postgres_port: int = free(5432, "of PostgreSQL")
    mlflow_port: int = free(5000, "of MLflow")
    prometheus_port: int = free(9090, "of Prometheus")
    bucket: str = free("raypipe", "bucket that is made")

    @property
    def host(self) -> str:
        return f"{self.network}.1"

    @property
    def nodes(self) -> list[str]:
        return [HEAD, *(f"worker{number}" for number in range(1, self.workers + 1))]

    def address(self, node: str) -> str:
        return f"{self.network}.{10 + self.nodes.index(node)}"

    def namespace(self, node: str) -> str:
        return f"{self.name}-{node}"


class LocalCluster:
    """The processes and namespaces of one `folder`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = Path(options.folder).absolute()
        self._processes = self.folder / "processes.json"

    def up(self) -> None:
        """Start everything; UsageError for what is missing, RaypipeError with the log of what does not start."""
        self._check()
        for name in ("log", "redis", "prometheus", "mlflow"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._make_secrets()
        self._network()
        options = self.options
        self._start("redis", self._redis(), partial(_listens, options.host, options.redis_port))
        s3 = [str(BIN / "python"), "-m", "moto.server", "-H", options.host, "-p", str(options.s3_port)]
        self._start("s3", s3, partial(_answers, f"http://{options.host}:{options.s3_port}/moto-api/data.json"))
        self._postgres()
        self._start("mlflow", self._mlflow(), partial(_answers, f"http://{options.host}:{options.mlflow_port}/health"))
        self._start(
            "prometheus",
            self._prometheus(),
            partial(_answers, f"http://{options.host}:{options.prometheus_port}/-/ready"),
        )
        self._make_bucket()
        for node in options.nodes:
            self.start_node(node)
        self._write_environment()

    def down(self) -> None:
        """End everything that `up` started, and only that. What it wrote stays in the folder."""
        for node in self.options.nodes:
            self.stop_node(node)
        for name, (pid, started) in self._known().items():
            _end(name, pid, started)
        self._processes.unlink(missing_ok=True)
        for node in self.options.nodes:
            _run("ip", "netns", "del", self.options.namespace(node), may_fail=True)
        _run("ip", "link", "del", self.options.name, may_fail=True)

    def start_node(self, node: str) -> None:
        """A Ray node in its namespace; the head finds its state in Redis."""
        options, address = self.options, self.options.address(node)
        common = [
            "--node-ip-address",
            address,
            "--metrics-export-port",
            str(_METRICS),
            "--object-store-memory",
            str(200 << 20),
        ]
        if node == HEAD:
            words = [str(START_HEAD), "--num-cpus", "0", "--port", str(_GCS), "--dashboard-host", address]
            words += [
                "--redis-password",
                (self.folder / "redis-password").read_text(),
                "--temp-dir",
                str(self._ray_folder()),
            ]
            ready = partial(self._jobs_api_answers)
        else:
            head = f"{options.address(HEAD)}:{_GCS}"
            words = [str(BIN / "ray"), "start", "--block", "--address", head, "--num-cpus", str(options.cpus)]
            ready = partial(self._has_joined, node, len(self._log(node)))
        self._start(node, ["ip", "netns", "exec", options.namespace(node), *words, *common], ready)

    def stop_node(self, node: str) -> None:
        """Kill every process of the node at once, as a machine that loses power."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.options.namespace(node)], capture_output=True, text=True, check=False
        )
        processes = []
        for pid in found.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=20)
        self._forget(node)

    def environment(self) -> dict[str, str]:
        """What a client of the cluster needs, and every node has."""
        options = self.options
        return {
            "RAY_API_SERVER_ADDRESS": f"http://{options.address(HEAD)}:{_DASHBOARD}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "AWS_ENDPOINT_URL": f"http://{options.host}:{options.s3_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "MLFLOW_TRACKING_URI": f"http://{options.host}:{options.mlflow_port}",
            "RAYPIPE_ONLINE_STORE": f"redis://:{(self.folder / 'redis-password').read_text()}@{options.host}:{options.redis_port}/1",
        }

    def _check(self) -> None:
        if os.geteuid():
            raise UsageError("Network namespaces need root.", "Run this as root, or in a container with CAP_NET_ADMIN.")
        missing = [name for name in ("ip", "redis-server", "prometheus") if shutil.which(name) is None]
        if _postgres_bin() is None:
            missing.append("postgresql")
        if missing:
            raise UsageError(
                f"Not installed: {', '.join(missing)}.", "apt-get install iproute2 redis-server postgresql prometheus"
            )
        if self._known():
            raise UsageError(f"The cluster of {self.folder} is up.", "`down` it first, or name another --folder.")

    def _make_secrets(self) -> None:
        for name in ("token", "redis-password", "postgres-password"):
            path = self.folder / name
            if not path.exists():
                path.touch(mode=0o600)
                path.write_text(secrets.token_hex(32))

    def _network(self) -> None:
        options = self.options
        _run("ip", "link", "add", options.name, "type", "bridge")
        _run("ip", "address", "add", f"{options.host}/24", "dev", options.name)
        _run("ip", "link", "set", options.name, "up")
        for node in options.nodes:
            space, outer = options.namespace(node), f"{options.name}-{node}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", outer, "master", options.name, "up")
            _run("ip", "-n", space, "address", "add", f"{options.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            _run("ip", "-n", space, "route", "add", "default", "via", options.host)

    def _redis(self) -> list[str]:
        password = (self.folder / "redis-password").read_text()
        words = ["redis-server", "--bind", self.options.host, "--port", str(self.options.redis_port)]
        return [*words, "--requirepass", password, "--dir", str(self.folder / "redis"), "--appendonly", "yes"]

    def _postgres(self) -> None:
        """PostgreSQL refuses to be root."""
        options, data = self.options, self.folder / "postgres"
        programs = _postgres_bin()
        assert programs is not None
        owner = pwd.getpwnam("postgres")
        as_owner = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        if not data.exists():
            data.mkdir(mode=0o700)
            os.chown(data, owner.pw_uid, owner.pw_gid)
            password = data.parent / "postgres-password"
            os.chown(password, owner.pw_uid, owner.pw_gid)
            words = [str(programs / "initdb"), "-D", str(data), "-U", "mlflow", "--auth", "scram-sha-256", "--no-sync"]
            _run(*as_owner, *words, "--pwfile", str(password))
            with (data / "pg_hba.conf").open("a") as access:
                access.write(f"host all mlflow {options.network}.0/24 scram-sha-256\n")
        words = [str(programs / "postgres"), "-D", str(data), "-h", options.host, "-p", str(options.postgres_port)]
        self._start("postgres", [*as_owner, *words, "-k", ""], partial(_listens, options.host, options.postgres_port))

    def _mlflow(self) -> list[str]:
        options = self.options
        password = (self.folder / "postgres-password").read_text()
        database = f"postgresql+psycopg2://mlflow:{password}@{options.host}:{options.postgres_port}/postgres"
        words = [str(BIN / "mlflow"), "server", "--backend-store-uri", database, "--workers", "1"]
        words += ["--host", options.host, "--port", str(options.mlflow_port), "--allowed-hosts", "*"]
        return [*words, "--artifacts-destination", str(self.folder / "mlflow")]

    def _prometheus(self) -> list[str]:
        options = self.options
        import yaml

        config = yaml.safe_load((ROOT / "cluster/prometheus/prometheus.yaml").read_text())
        config["rule_files"] = [str(ROOT / "cluster/prometheus/alerts.yaml")]
        targets = [f"{options.address(node)}:{_METRICS}" for node in options.nodes]
        config["scrape_configs"] = [{"job_name": "ray", "static_configs": [{"targets": targets}]}]
        path = self.folder / "prometheus/prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        words = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={self.folder / 'prometheus/data'}"]
        return [*words, f"--web.listen-address={options.host}:{options.prometheus_port}"]

    def _make_bucket(self) -> None:
        import boto3

        settings = self.environment()
        boto3.client(
            "s3",
            endpoint_url=settings["AWS_ENDPOINT_URL"],
            aws_access_key_id="local",
            aws_secret_access_key="local",
            region_name="us-east-1",
        ).create_bucket(Bucket=self.options.bucket)

    def _ray_folder(self) -> Path:
        # A Unix socket's path is at most 107 bytes long.
        return Path("/tmp") / f"ray-{self.options.name}"

    def _jobs_api_answers(self) -> bool:
        token = (self.folder / "token").read_text()
        url = f"http://{self.options.address(HEAD)}:{_DASHBOARD}/api/jobs/"
        return _answers(url, {"Authorization": f"Bearer {token}"})

    def _write_environment(self) -> None:
        lines = [f"export {name}='{value}'\n" for name, value in self.environment().items()]
        (self.folder / "environment").write_text("".join(lines))

    def _start(self, name: str, command: Sequence[str], ready: Callable[[], bool]) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        settings = {
            **kept,
            **self.environment(),
            "PATH": f"{BIN}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]),
        }
        if name == HEAD:
            settings["RAY_REDIS_ADDRESS"] = f"{self.options.host}:{self.options.redis_port}"
            settings["RAY_external_storage_namespace"] = self.options.name
        with (self.folder / "log" / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                command, env=settings, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
            )
        self._note(name, process.pid)
        deadline = time.monotonic() + _UP_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RaypipeError(
                    f"{name} does not start: {self._log(name)[-1500:]}",
                    "`down`, mend it, and `up` again.",
                )
            time.sleep(0.3)
        print(f"{name} is up", file=sys.stderr, flush=True)

    def _log(self, name: str) -> str:
        path = self.folder / "log" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _has_joined(self, node: str, before: int) -> bool:
        """Whether Ray says so after the first `before` characters of its log: a node that listens may yet give up."""
        return "Ray runtime started" in self._log(node)[before:]

    def _known(self) -> dict[str, tuple[int, float]]:
        return json.loads(self._processes.read_text()) if self._processes.exists() else {}

    def _note(self, name: str, pid: int) -> None:
        self._processes.write_text(json.dumps({**self._known(), name: (pid, psutil.Process(pid).create_time())}))

    def _forget(self, name: str) -> None:
        known = self._known()
        if known.pop(name, None) is not None:
            self._processes.write_text(json.dumps(known))


def _postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return found[-1] if found else None


def _end(name: str, pid: int, started: float) -> None:
    """The process and its children, asked first; one that only has the number of ours is left alone."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1:
            return
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(one)
        _, family = psutil.wait_procs(family, timeout=15)
    print(f"{name} is down", file=sys.stderr, flush=True)


def _run(*words: str, may_fail: bool = False) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode and not may_fail:
        raise RaypipeError(
            f"`{' '.join(words[:4])} …` failed: {ended.stderr.strip()[-500:]}", "`down` first, then `up` again."
        )


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def _answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=5).close()
    except OSError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """`up`, `down`, `start NODE` or `stop NODE`, then options; returns the exit code."""
    words = list(argv)
    try:
        verb = words.pop(0) if words else ""
        nodes = [words.pop(0)] if verb in {"start", "stop"} and words else []
        cluster = LocalCluster(parse_config("cluster.py", Options, words))
        verbs: dict[str, Callable[..., Any]] = {
            "up": cluster.up,
            "down": cluster.down,
            "start": cluster.start_node,
            "stop": cluster.stop_node,
        }
        if verb not in verbs or (verb in {"start", "stop"}) != (bool(nodes) and nodes[0] in cluster.options.nodes):
            raise UsageError(
                f"{' '.join(argv)!r} is no command.",
                f"up, down, start NODE, stop NODE; nodes: {cluster.options.nodes}.",
            )
        verbs[verb](*nodes)
    except RaypipeError as error:
        print(f"local cluster: {error}", file=sys.stderr)
        return error.exit_code
    if verb == "up":
        print(f"source {cluster.folder}/environment; then: raypipe submit …")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
