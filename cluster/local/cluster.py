"""A cluster of several nodes on one machine, to start, watch and break.

`python cluster/local/cluster.py up` starts it, and `down` ends it. `stop NODE` kills a node; `start NODE` brings it
back, with other `--cpus` or `--head_cpus` if they are given.

Each Ray node has its own network, processes, host name and session folder, and a bridge joins the networks. A stopped
node is gone as a machine would be, with its address. The servers beside the nodes use the bridge's own address: Redis
(the head's state, the online store), an S3 server, MLflow on PostgreSQL, and Prometheus. Ray asks for a token.

It needs root, iproute2 and Debian's packages redis-server, postgresql and prometheus. The S3 server is moto's, which
loses its data at `down`. Nothing listens outside of the bridge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from options import HEAD, Options
from processes import ROOT, Processes, answers, run
from servers import BIN, METRICS_PORT, Servers, postgres_bin

from raypipe.cli.options import parse_config
from raypipe.errors import RaypipeError, UsageError

_DASHBOARD, _GCS = 8265, 6379
_STORE_BYTES = 200 << 20
# Ray waits 15 s for a node's agents and 30 s for its raylet, and then gives up. On a busy machine the next try finds
# its files in the disk cache.
_TRIES = 4
# Each node has its own processes and host name for three reasons. Ray's clients look for their node among all processes
# that they see, and prefer a head. If a driver on a worker saw the head's processes, it would say that it lives on the
# head, where nobody reaches it. Locks recognise a living process by host and process id. Gloo listens on the address of
# its host's name.
_AS_A_MACHINE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class LocalCluster:
    """The processes and namespaces of the cluster in one `folder`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = Path(options.folder).absolute()
        self._processes = Processes(self.folder)

    def up(self) -> None:
        """Start everything.

        Raises UsageError if something is missing or a server's port is in use, and RaypipeError, with the log, if
        something does not start.
        """
        self._check()
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        self._make_secrets()
        self._network()
        servers = Servers(self.options, self.folder)
        for name, command, ready in servers.commands():
            if ready():
                raise UsageError(f"Somebody else's {name} answers already.", "Name another --network, or end it.")
            self._processes.start(name, command, self._settings(), ready)
        servers.make_bucket(self.environment())
        for node in self.options.nodes:
            self.start_node(node)
        lines = [f"export {name}='{value}'\n" for name, value in self.environment().items()]
        (self.folder / "environment").write_text("".join(lines))

    def down(self) -> None:
        """End everything that `up` started, and nothing else. Its files stay in the folder."""
        for node in self.options.nodes:
            self.stop_node(node)
        self._processes.end_all()
        for node in self.options.nodes:
            run("ip", "netns", "del", self.options.namespace(node), may_fail=True)
        run("ip", "link", "del", self.options.name, may_fail=True)

    def start_node(self, node: str) -> None:
        """Start a Ray node as a machine of its own. The head finds its state in Redis."""
        options, address = self.options, self.options.address(node)
        settings = self._settings()
        if node == HEAD:
            words = [str(ROOT / "cluster/start-head.sh"), "--num-cpus", str(options.head_cpus), "--port", str(_GCS)]
            words += ["--dashboard-host", address, "--redis-password", self._secret("redis-password")]
            settings["RAY_REDIS_ADDRESS"] = f"{options.host}:{options.redis_port}"
            settings["RAY_external_storage_namespace"] = options.name
            ready = self._jobs_api_answers
        else:
            head = f"{options.address(HEAD)}:{_GCS}"
            words = [str(BIN / "ray"), "start", "--block", "--address", head, "--num-cpus", str(options.cpus)]
            ready = partial(self._has_joined, node, len(self._processes.log(node)))
        words += ["--node-ip-address", address, "--metrics-export-port", str(METRICS_PORT)]
        # A Unix socket's path is at most 107 bytes long.
        words += ["--object-store-memory", str(_STORE_BYTES), "--temp-dir", f"/tmp/ray-{options.name}/{node}"]
        machine = ["ip", "netns", "exec", options.namespace(node)]
        machine += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        machine += ["sh", "-c", _AS_A_MACHINE, "sh", node, str(self._hosts())]
        self._processes.start(node, [*machine, *words], settings, ready, tries=_TRIES)

    def stop_node(self, node: str) -> None:
        """Kill every process of the node at once, as if a machine lost power."""
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
        self._processes.forget(node)

    def environment(self) -> dict[str, str]:
        """The environment variables that a client of the cluster needs. Every node has them too."""
        options = self.options
        online = f"redis://:{self._secret('redis-password')}@{options.host}:{options.redis_port}/1"
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
            "RAYPIPE_ONLINE_STORE": online,
        }

    def _check(self) -> None:
        if os.geteuid():
            raise UsageError("Network namespaces need root.", "Run this as root, or in a container with CAP_NET_ADMIN.")
        missing = [name for name in ("ip", "redis-server", "prometheus") if shutil.which(name) is None]
        if postgres_bin() is None:
            missing.append("postgresql")
        if missing:
            raise UsageError(
                f"Not installed: {', '.join(missing)}.", "apt-get install iproute2 redis-server postgresql prometheus"
            )
        if self._processes.known():
            raise UsageError(f"The cluster of {self.folder} is up.", "`down` it first, or name another --folder.")

    def _make_secrets(self) -> None:
        for name in ("token", "redis-password", "postgres-password"):
            path = self.folder / name
            if not path.exists():
                path.touch(mode=0o600)
                path.write_text(secrets.token_hex(32))

    def _secret(self, name: str) -> str:
        return (self.folder / name).read_text()

    def _network(self) -> None:
        options = self.options
        run("ip", "link", "add", options.name, "type", "bridge")
        run("ip", "address", "add", f"{options.host}/24", "dev", options.name)
        run("ip", "link", "set", options.name, "up")
        for node in options.nodes:
            space, outer = options.namespace(node), f"{options.name}-{node}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outer, "master", options.name, "up")
            run("ip", "-n", space, "address", "add", f"{options.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", space, "link", "set", device, "up")
            run("ip", "-n", space, "route", "add", "default", "via", options.host)

    def _hosts(self) -> Path:
        path = self.folder / "hosts"
        lines = [f"{self.options.address(node)} {node}" for node in self.options.nodes]
        path.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        return path

    def _settings(self) -> dict[str, str]:
        """The environment of every process that is started here."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        return {
            **kept,
            **self.environment(),
            # The value that KubeRay sets: workers wait this long for a head to come back.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "PATH": f"{BIN}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]),
        }

    def _jobs_api_answers(self) -> bool:
        url = f"http://{self.options.address(HEAD)}:{_DASHBOARD}/api/jobs/"
        return answers(url, {"Authorization": f"Bearer {self._secret('token')}"})

    def _has_joined(self, node: str, before: int) -> bool:
        """Whether Ray says that it started, after the first `before` characters of its log.

        A node that already listens may still give up.
        """
        return "Ray runtime started" in self._processes.log(node)[before:]


def main(argv: Sequence[str]) -> int:
    """Run `up`, `down`, `start NODE` or `stop NODE`, followed by options. Returns the exit code."""
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
