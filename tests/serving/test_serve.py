"""`raypipe serve`: real Ray Serve behind HAProxy, real HTTP, and nothing left behind when it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raypipe.serving.serve import _end
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import LENGTH, add_events, compute, publish
from tests.pipeline.small_logs import newest
from tests.serving.lm_release import SHORT, TOKENS
from tests.serving.local_service import LocalService
from tests.serving.running import Running, burst, processes, start, stop, until
from tests.serving.test_release_watcher import changed


@pytest.fixture(scope="module")
def running(shared_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    words = ("--language.explanation.max_new_tokens", str(TOKENS), "--language.reading.max_new_tokens", str(TOKENS))
    words += ("--language.checks.retries", "0")
    few = ("--language.batching.size", "8", "--language.ongoing", "16", "--language.queued", "24")
    bounds = ("--replicas.ongoing", "128", "--replicas.queued", "64", *words, *few)
    service = start(shared_lm, tmp_path_factory.mktemp("serve"), *bounds)
    yield service
    stop(service)


def test_batch_and_online_give_one_truth(running: Running) -> None:
    """G7: the lists of the night's table, from requests that share the model's batches as they happen to come."""
    rows = newest(running.uri, "recommendations").to_pylist()
    answers = burst(running, [{"user_id": row["user_id"], "count": LENGTH} for row in rows])
    assert [status for status, _ in answers] == [200] * len(rows)
    for row, (_, answer) in zip(rows, answers, strict=True):
        assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in row["items"]]
        assert [item["score"] for item in answer["items"]] == pytest.approx(row["scores"], rel=1e-5)


def test_the_language_model_answers_alone_and_in_company_with_the_same_words(running: Running) -> None:
    """G7: beside it adapters are loaded as requests name them, and requests share batches as they happen to come."""
    direct = LocalService(running.uri, "direct", language=SHORT)
    bodies = [{"user_id": f"u{n}", "adapter": name} for n in range(10) for name in ("recexplainer-h", "recexplainer-i")]
    wanted = direct.post("explain/batch", {"queries": bodies}).json()["answers"]
    answers = burst(running, bodies, "explain")
    assert [status for status, _ in answers] == [200] * len(bodies)
    assert [answer for _, answer in answers] == wanted
    for route in ("interpret", "residual", "oracle", "rerank", "next"):
        assert running.ask(route, {"history": ["i3", "i4"]}) == (
            200,
            direct.post(route, {"history": ["i3", "i4"]}).json(),
        )


def test_an_explanation_arrives_piece_by_piece(running: Running) -> None:
    headers = {"Authorization": f"Bearer {running.secret}", "content-type": "application/json"}
    body = json.dumps({"user_id": "u3"}).encode()
    arrivals = []
    with urllib.request.urlopen(
        urllib.request.Request(f"{running.url}/explain/stream", body, headers), timeout=60
    ) as told:
        for line in told:
            arrivals.append((time.monotonic(), line.decode().strip()))
    names = [line.removeprefix("event: ") for _, line in arrivals if line.startswith("event: ")]
    assert (names[0], names[-1], set(names[1:-1])) == ("decision", "done", {"text"})
    assert len(names) > TOKENS / 2
    assert len({round(at, 4) for at, _ in arrivals}) > 3, "they came all at once"
    whole = json.loads(arrivals[-2][1].removeprefix("data: "))
    assert (200, whole) == running.ask("explain", {"user_id": "u3"})


def test_past_what_the_language_model_takes_requests_are_told_to_come_back(running: Running) -> None:
    answers = burst(running, [{"user_id": f"u{n % 40}"} for n in range(120)], "explain")
    statuses = Counter(status for status, _ in answers)
    assert set(statuses) == {200, 503}
    assert {told for status, told in answers if status == 503} == {"1"}
    assert running.ask("explain", {"user_id": "u1"})[0] == 200


def said(running: Running) -> list[str]:
    """By replicas, into Ray's log files."""
    files = {Path(f"/proc/{process.pid}/fd/2").readlink() for process in processes(running, "ray::ServeReplica")}
    assert len(files) > 1
    return [line for path in files for line in path.read_text().splitlines()]


def test_a_night_and_a_release_are_taken_up_under_load_without_a_failed_request(
    running: Running, raypipe: Run, tmp_path: Path
) -> None:
    old = running.ask("release")[1]["release"]
    bodies = [{"user_id": f"u{n % 40}"} for n in range(60)]
    statuses: Counter[int] = Counter()

    def load() -> None:
        statuses.update(status for status, _ in burst(running, bodies))

    load()
    new = changed(running.uri, tmp_path / "new", 0.5)
    load()
    running.until("release", {"release": new.hash})
    load()
    add_events(running.uri, [("new", "i5", 1)])
    compute(running.uri)
    publish(running.uri, "2026-01-06")
    assert running.ask("users/new")[0] == 404
    assert raypipe("online", "--workspace", running.uri).code == 0
    load()
    running.until("release", {"night": "2026-01-06"})
    assert running.ask("users/new")[0] == 200
    assert raypipe("release", "--workspace", running.uri, "--restore", old[:12]).code == 0
    assert raypipe("night", "--workspace", running.uri, "--restore", "2026-01-05").code == 0
    load()
    running.until("release", {"release": old, "night": "2026-01-05"})
    load()
    assert statuses == {200: 6 * len(bodies)}
    # What replicas said of it is what collects lines can read.
    lines = [json.loads(line) for line in said(running) if line.startswith("{")]
    taken_up = [line for line in lines if line["message"].startswith(f"release {new.hash[:12]}")]
    assert taken_up
    facts = {"level": "info", "job": "serve", "deployment": "recommender"}
    assert facts.items() <= taken_up[0].items()
    assert {"time", "level", "message", "job", "deployment"} <= set(taken_up[0])
    assert Releases(Store(running.uri)).named("served") is not None


def test_past_what_a_replica_takes_requests_are_told_to_come_back(running: Running) -> None:
    bodies = [{"history": [f"i{n % 30 + 1}"] * 50} for n in range(1200)]
    for _ in range(5):  # where the machine is slow to send them, they are not all there at a time
        answers = burst(running, bodies)
        statuses = Counter(status for status, _ in answers)
        if statuses[503]:
            break
    assert set(statuses) == {200, 503}
    assert {told for status, told in answers if status == 503} == {"1"}
    assert running.ask("recommend", {"user_id": "u1"})[0] == 200


def test_health_and_readiness_are_told_and_tokens_are_checked_in_the_replica(running: Running, raypipe: Run) -> None:
    with urllib.request.urlopen(f"{running.url}/health", timeout=60) as answer:
        assert json.loads(answer.read()) == {"ok": True, "reason": ""}
    assert running.ask("ready") == (200, {"ok": True, "reason": ""})
    assert running.ask("ready", secret="wrong")[0] == 401
    other = raypipe("token", "--workspace", running.uri, "--name", "other").metrics["token"]
    running.until("ready", {"ok": True}, other)
    assert raypipe("token", "--workspace", running.uri, "--revoke", "other").code == 0
    deadline = time.monotonic() + 30
    while running.ask("ready", secret=other)[0] != 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lines = [json.loads(line) for path in running.audit.iterdir() for line in path.read_text().splitlines()]
    assert {line["token"] for line in lines} == {None, "tests", "other"}
    assert "u7" not in json.dumps([line["route"] for line in lines])


def test_prometheus_finds_the_services_metrics_at_the_port_that_was_chosen(running: Running) -> None:
    assert running.ask("recommend", {"user_id": "u1"})[0] == 200
    wanted = "ray_raypipe_serving_requests_total{"

    def told() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{running.ports[4]}/metrics", timeout=60) as answer:
            return [line for line in answer.read().decode().splitlines() if line.startswith(wanted)]

    until(lambda: any('route="/v1/recommend"' in line and 'status="200"' in line for line in told()))


def test_what_alerts_ask_of_the_proxy_and_of_ray_is_told_under_these_names(running: Running) -> None:
    assert running.ask("users/nobody")[0] == 404
    haproxy = {"haproxy_frontend_http_requests_total": (), "haproxy_frontend_http_responses_total": ('code="5xx"',)}
    ray = {
        "ray_serve_num_http_requests_total": ('application="raypipe"', 'status_code="404"'),
        "ray_serve_num_http_error_requests_total": ('application="raypipe"', 'error_code="404"'),
    }
    rules = (Path(__file__).parents[2] / "cluster/prometheus/alerts.yaml").read_text()
    for port, wanted, label in ((2, haproxy, 'proxy="http_frontend"'), (4, ray, 'application="raypipe"')):
        for name, labels in wanted.items():
            assert f"{name}{{{label}" in rules

            def is_told(port: int = port, name: str = name, labels: tuple[str, ...] = (*labels, label)) -> bool:
                with urllib.request.urlopen(f"http://127.0.0.1:{running.ports[port]}/metrics", timeout=60) as answer:
                    lines = answer.read().decode().splitlines()
                return any(line.startswith(f"{name}{{") and all(one in line for one in labels) for line in lines)

            until(is_told)


def test_a_port_that_is_taken_is_told_before_anything_starts(running: Running) -> None:
    command = [sys.executable, "-m", "raypipe.cli.main", "serve", "--workspace", running.uri]
    ended = subprocess.run([*command, "--port", str(running.ports[0])], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{running.ports[0]}" in one_paragraph(ended.stderr)


@pytest.mark.parametrize(
    ("is_private", "ended"), [pytest.param(True, ["shutdown"], id="its own Ray"), (False, ["delete raypipe"])]
)
def test_on_a_cluster_of_others_a_stopped_service_takes_away_itself_alone(
    is_private: bool, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr("ray.serve.shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr("ray.serve.delete", lambda name: done.append(f"delete {name}"))
    _end(is_private)
    assert done == ended


def test_a_stopped_service_answers_what_it_has_and_leaves_nothing_behind(running: Running) -> None:
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children
    running.process.send_signal(signal.SIGTERM)
    output, _ = running.process.communicate(timeout=200)
    assert running.process.returncode == 0
    assert json.loads(output.strip().splitlines()[-1])["status"] == "ok"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [process.name() for process in alive]
    for port in running.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_service_whose_ray_has_died_ends_with_an_error(ready: str, tmp_path: Path) -> None:
    service = start(ready, tmp_path, "--language.replicas", "0")
    family = psutil.Process(service.process.pid).children(recursive=True)
    try:
        assert service.ask("recommend", {"user_id": "u1"})[0] == 200
        for process in family:
            if process.name() == "raylet":
                process.kill()
        output, _ = service.process.communicate(timeout=300)
        assert service.process.returncode == 1
        assert "has not told of it for 60 s" in json.loads(output.strip().splitlines()[-1])["error"]
    finally:
        stop(service)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
