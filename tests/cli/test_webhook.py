"""The webhook: told however a job ends, and never the reason that one fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from raypipe.storage.workspace import Workspace
from tests.conftest import Run


class Listener:
    """A real HTTP server that keeps what it is posted and answers `status`."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.status = 200
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Content-Type"] == "application/json"
                listener.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(listener.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/s3cret"


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def test_the_result_is_told_whether_good_or_bad(raypipe: Run, tmp_path: Path, listener: Listener) -> None:
    uri = str(tmp_path / "workspace")
    failed = raypipe("status", "--workspace", uri, "--webhook", listener.url)
    assert failed.code == 2
    good = raypipe("doctor", "--workspace", uri, "--webhook", listener.url)
    assert good.code == 0, good.stderr
    assert listener.told == [failed.result, good.result]
    assert [told["status"] for told in listener.told] == ["failed", good.status]


def test_a_new_token_is_for_who_asked_alone(raypipe: Run, tmp_path: Path, listener: Listener) -> None:
    uri = str(tmp_path / "workspace")
    Workspace(uri).decide("time", 4)
    made = raypipe("token", "--workspace", uri, "--name", "shop", "--webhook", listener.url)
    assert made.metrics["token"].startswith("rp_")
    assert listener.told == [{**made.result, "metrics": {"name": "shop"}}]


@pytest.mark.parametrize("trouble", ["refuses", "gone", "nonsense", "no port", "no host"])
def test_one_that_does_not_arrive_changes_nothing(
    raypipe: Run, tmp_path: Path, listener: Listener, trouble: str
) -> None:
    listener.status = 500
    url = {
        "refuses": listener.url,
        "gone": "http://127.0.0.1:9/s3cret",
        "nonsense": "s3cret",
        "no port": "http://127.0.0.1:port/s3cret",
        "no host": "http://[s3cret",
    }[trouble]
    ended = raypipe("doctor", "--workspace", str(tmp_path / "workspace"), "--webhook", url)
    assert (ended.code, ended.status) == (0, "ok")
    assert "was not told" in ended.stderr
    assert "s3cret" not in ended.stderr


def test_a_listener_that_takes_too_long_for_who_stops_the_job_changes_nothing(
    raypipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(url: str, result: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raypipe.cli.main.notify", stopped)
    ended = raypipe("doctor", "--workspace", str(tmp_path / "workspace"), "--webhook", "http://127.0.0.1:9")
    assert (ended.code, ended.status) == (0, "ok")
