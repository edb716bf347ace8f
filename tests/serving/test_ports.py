"""What of a service on one machine can be reached from another one: every port of all of its processes is tried."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raypipe.serving.config import ReplicaOptions
from raypipe.serving.haproxy import BINARY, HEAD_TIMEOUT_S, write_haproxy_wrapper
from tests.conftest import unavailable
from tests.serving.running import Running, start, stop, until

REACH = """
import http.client, json, socket, sys, urllib.error, urllib.request
found = {}
for port in json.loads(sys.argv[2]):
    try:
        socket.create_connection((sys.argv[1], port), 2).close()
        found[port] = 0
        found[port] = urllib.request.urlopen(f"http://{sys.argv[1]}:{port}/v1/release", timeout=5).status
    except urllib.error.HTTPError as error:
        found[port] = error.code
    except (OSError, http.client.HTTPException):
        continue
print(json.dumps(found))
"""
"""Prints by port the status without a token, 0 where there is none; nothing of ports that nobody answers at."""


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[str, str]]:
    """A network namespace that is joined to this one: its name, and this machine's address there."""
    if shutil.which("ip") is None or os.geteuid():
        unavailable("another network namespace needs root and iproute2")
    name, network = f"rpout{os.getpid()}", f"10.202.{os.getpid() % 250}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        # Nobody can be asked to give a container this right.
        pytest.skip("network namespaces cannot be made here")
    near, far = f"rpn{os.getpid()}", f"rpf{os.getpid()}"
    commands = [
        f"link add {near} type veth peer name {far} netns {name}",
        f"addr add {network}.1/24 dev {near}",
        f"link set {near} up",
        f"-n {name} addr add {network}.2/24 dev {far}",
        f"-n {name} link set {far} up",
    ]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield name, f"{network}.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def listening(running: Running) -> set[int]:
    family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    pids = {process.pid for process in family}
    assert len(pids) > 5
    return {
        found.laddr.port for found in psutil.net_connections("tcp") if found.status == "LISTEN" and found.pid in pids
    }


def reached(ports: set[int], outside: tuple[str, str]) -> dict[int, int]:
    """Of these ports those that answer in the other namespace, and how."""
    namespace, address = outside
    words = ["ip", "netns", "exec", namespace, sys.executable, "-c", REACH, address, json.dumps(sorted(ports))]
    ended = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    return {int(port): status for port, status in json.loads(ended.stdout).items()}


def hung_up(port: int) -> float:
    """Seconds until who sends no more than the beginning of a request is sent away."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 60) as held:
        held.sendall(b"GET /v1/health HTTP/1.1\r\n")
        while held.recv(1000):
            continue
    return time.monotonic() - started


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_from_another_machine_nothing_is_there_but_the_api_where_it_was_let_in(
    host: str, ready_lm: str, outside: tuple[str, str], tmp_path: Path
) -> None:
    running = start(ready_lm, tmp_path, "--host", host)
    try:
        # What a look misses of processes that come and go, the next one sees.
        ports = listening(running)
        until(lambda: set(running.ports) <= ports or ports.update(listening(running)))
        # HAProxy, a replica, the store of objects and what Ray's processes call each other by.
        assert set(running.ports) <= ports
        assert len(ports) > 10
        api = running.ports[0]
        assert reached(ports, outside) == ({} if host == "127.0.0.1" else {api: 401})
        assert running.ask("release")[0] == 200
        assert running.ask("interpret", {"history": ["i3", "i4"]})[0] == 200, "the language model is asked through Ray"
        for path in ("-/routes", "-/Routes", "nothing"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"http://127.0.0.1:{api}/{path}", timeout=10)
        assert hung_up(api) < 2 * HEAD_TIMEOUT_S
    finally:
        stop(running)


def test_the_proxy_is_closed_before_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.write_text('#!/bin/sh\necho "$@"\n')
    real.chmod(0o700)
    monkeypatch.setenv(BINARY, str(real))
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        """
    stats socket /tmp/admin.sock mode 666 level admin expose-fd listeners
    option log-health-checks
    option redispatch 1
    errorfile 503 /tmp/500.http
    bind :9101
    bind 127.0.0.1:8000
    http-request return status 200 content-type text/plain string "..." if routes
  bind *:8404
    server replica 127.0.0.1:30000 check observe layer4
    server other 127.0.0.1:8500 check backup
"""
    )
    script = write_haproxy_wrapper(tmp_path, "0.0.0.0", 8000, (8404, 9101), ReplicaOptions(ongoing=200, wait_s=0.5))
    ended = subprocess.run([script, "-db", "-f", config, "-sf", "7"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"-db -f {config} -sf 7\n"
    errorfile = tmp_path / "unavailable.http"
    assert (
        config.read_text()
        == f"""
    stats socket /tmp/admin.sock mode 600 level admin expose-fd listeners
    option log-health-checks
    timeout http-request 10s
    option redispatch 1
    timeout queue 500ms
    errorfile 503 {errorfile}
    bind 127.0.0.1:9101
    bind 0.0.0.0:8000 proto h1
    http-request deny deny_status 401 if routes
  bind 127.0.0.1:8404
    server replica 127.0.0.1:30000 check maxconn 200 observe layer4
    server other 127.0.0.1:8500 check backup
"""
    )
    head, _, body = errorfile.read_bytes().decode().partition("\r\n\r\n")
    assert head.splitlines()[0] == "HTTP/1.1 503 Service Unavailable"
    assert {"retry-after: 1", f"content-length: {len(body)}"} <= set(head.splitlines())
    assert json.loads(body)["error"]["code"] == "not_ready"
