"""The real HAProxy with the configuration that Ray writes and raypipe mends, before a replica that answers as it is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from raypipe.serving.config import ReplicaOptions
from raypipe.serving.haproxy import FILES_AT_ONCE, write_haproxy_wrapper
from raypipe.serving.serve import _SETTINGS
from tests.serving.running import free_ports, until

IDLE_S = 2
"""Seconds that clients may do nothing, of the hasty one."""
ONGOING = 40
FILE = bytes(30_000_000)
"""More than the buffers of any system."""
SMALL = b"{}".ljust(50_000)
"""Answers are smaller; so fewer of them fill the buffers."""
BUNDLE = "/docs/swagger-ui-bundle.js"


class Answers(BaseHTTPRequestHandler):
    """A replica."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.replace("%2D", "-")
        if path == BUNDLE:
            return self.answer(200, FILE)
        if path.startswith("/-/") or path == "/v1/health" or self.headers.get("authorization") == "Bearer good":
            if path == "/v1/slow":
                time.sleep(2 * IDLE_S)
            if path != "/v1/stream":
                return self.answer(200, SMALL)
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for wait_s in (0, 2 * IDLE_S, 2 * IDLE_S):
                time.sleep(wait_s)
                self.wfile.write(b"5\r\npiece\r\n")
            self.wfile.write(b"0\r\n\r\n")
            return None
        return self.answer(401, SMALL)

    def do_POST(self) -> None:
        """As the middleware: who shows no token is answered before the body is there."""
        self.close_connection = True
        self.do_GET()

    def answer(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("x-request-id", self.headers.get("x-request-id", "none"))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of the API, of a proxy as it is started."""
    idle_s = int(_SETTINGS["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"])
    assert 20 <= idle_s <= 60
    with proxy(tmp_path_factory.mktemp("haproxy"), idle_s) as api:
        yield api


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of the API, of a proxy that waits for clients less long."""
    with proxy(tmp_path_factory.mktemp("hasty"), IDLE_S) as api:
        yield api


@contextlib.contextmanager
def proxy(folder: Path, idle_s: int) -> Iterator[int]:
    api, stats, metrics, inner = free_ports(4)
    replica = Server(("127.0.0.1", inner), Answers)
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=stats,
        metrics_port=metrics,
        timeout_client_s=idle_s,
        metrics_enabled=False,
        http_options=HTTPOptions(host="127.0.0.1", port=api),
        has_received_routes=True,
        is_head=True,
    )
    backend = BackendConfig("raypipe", "/", servers=[ServerConfig("replica", "127.0.0.1", inner)], app_name="raypipe")
    written = HAProxyApi(config, {"raypipe": backend}, str(folder / "haproxy.cfg"))
    (folder / "state").touch()
    written._generate_config_file_internal()
    options = ReplicaOptions(ongoing=ONGOING, wait_s=1)
    script = write_haproxy_wrapper(folder, "127.0.0.1", api, (stats, metrics), options)
    process = subprocess.Popen([script, "-db", "-f", folder / "haproxy.cfg"])
    try:
        until(lambda: connects(api))
        until(lambda: asked(api, "/v1/x")[0] == 200)
        yield api
    finally:
        process.kill()
        process.wait()
        replica.shutdown()
        replica.server_close()


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def asked(port: int, path: str, token: str = "good") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def status(port: int, path: str) -> int:
    """Of an answer that is not read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": "Bearer good"})
        return connection.getresponse().status


def stalled(port: int, sent: bytes) -> socket.socket:
    """Who asks and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    client.settimeout(0.2)
    with contextlib.suppress(OSError):  # it may be sent away before it has sent all, or be waited for no more
        client.sendall(sent)
    client.settimeout(30)
    return client


def request(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]).encode()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(request(BUNDLE), id="a large file"),
        pytest.param(request(BUNDLE.replace("-", "%2D")), id="its path in other letters"),
        pytest.param(request("/v1/users", "authorization: Bearer wrong") * 1000, id="many refusals"),
        pytest.param(request("/v1/health") * 1000, id="health many times"),
        pytest.param(request("/v1/score", "content-length: 90000", method="POST"), id="a body that never comes"),
        pytest.param(request("/v1/score", "content-length: 90000", method="POST") + b"x" * 50_000, id="half a body"),
        pytest.param(request("/v1/health", "content-length: 90000"), id="health, with a body that never comes"),
        pytest.param(request("/v1/health", "transfer-encoding: chunked"), id="health, with pieces that never come"),
    ],
)
def test_who_shows_no_token_and_reads_nothing_keeps_nobody_from_being_answered(sent: bytes, port: int) -> None:
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(stalled(port, sent)) for _ in range(3 * ONGOING)]
        assert len(clients) > 2 * ONGOING
        answers = [asked(port, "/v1/users")[0] for _ in range(20)]
        health, _ = asked(port, "/v1/health")
    assert answers == [200] * len(answers)
    assert health == 200


def test_files_are_sent_to_so_many_at_a_time_and_others_are_told_to_come_back(port: int) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(FILES_AT_ONCE):
            held.enter_context(stalled(port, request(BUNDLE)))

        def refused() -> bool:
            # A place that a client of the test before still had, when these came, has to be taken once more.
            held.enter_context(stalled(port, request(BUNDLE)))
            return status(port, BUNDLE) == 503

        until(refused, 20)
    until(lambda: status(port, BUNDLE) == 200, 60)
    until(lambda: asked(port, BUNDLE) == (200, FILE), 30)


def test_who_reads_nothing_for_long_is_sent_away(hasty: int) -> None:
    with stalled(hasty, request(BUNDLE)) as client:
        time.sleep(3 * IDLE_S)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(100_000):
                taken += len(piece)
    assert taken < len(FILE)


def test_who_waits_long_for_an_answer_or_for_its_next_piece_is_not_sent_away(hasty: int) -> None:
    assert asked(hasty, "/v1/slow") == (200, SMALL)
    assert asked(hasty, "/v1/stream") == (200, b"piece" * 3)


def test_a_refusal_is_in_the_replicas_words_and_ends_the_connection(port: int) -> None:
    with stalled(port, request("/v1/users", "x-request-id: mine") * 2) as client:
        told = b""
        while piece := client.recv(10_000):
            told += piece
    head, _, body = told.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 401 ")
    assert {"www-authenticate: bearer", "x-request-id: mine", "connection: close"} <= set(head.lower().split("\r\n"))
    assert json.loads(body) == {
        "error": {"code": "unauthorised", "message": "Send a valid token: Authorization: Bearer TOKEN."},
        "request_id": "mine",
    }


def test_a_connection_has_one_request_at_a_time(port: int) -> None:
    """And not the hundred of HTTP/2."""
    with stalled(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
