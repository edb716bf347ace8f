"""The service under steady load while its parts die, restart and are exchanged: no request fails that need not."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raypipe.cli.main import main
from tests.conftest import running_redis
from tests.made import make_ready
from tests.redis_server import RedisServer
from tests.serving.running import Load, Running, processes, start, stop, until
from tests.serving.test_release_watcher import changed

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
REPLICA, CONTROLLER = "ray::ServeReplica:raypipe:recommender", "ray::ServeController"
BODIES = [{"user_id": f"u{n}"} for n in range(40)] + [{"history": ["i3", f"i{n}"]} for n in range(5, 15)]
RATE = 15.0
SMALL = ("--replicas.cpus", "0.4", "--language.replicas", "0")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that remembers what it held."""
    with running_redis(tmp_path_factory.mktemp("redis"), keeps=True) as server:
        yield server


@pytest.fixture(scope="module")
def running(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas."""
    folder = tmp_path_factory.mktemp("serving")
    uri = str(folder / "workspace")
    make_ready(uri)
    assert main(["online", "--workspace", uri, "--store", redis.url]) == 0
    service = start(uri, folder, "--store", redis.url, "--replicas.least", "2", "--replicas.most", "2", *SMALL)
    yield service
    stop(service)


def test_a_killed_replica_costs_no_request(running: Running) -> None:
    before = {process.pid for process in processes(running, REPLICA)}
    assert len(before) == 2
    with Load(running, RATE, BODIES) as load:
        time.sleep(2)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len({process.pid for process in processes(running, REPLICA)} - before) == 1)
        time.sleep(3)
    assert set(load.statuses) == {200}, load.statuses
    assert load.statuses[200] > 3 * RATE


def test_a_killed_controller_costs_no_request_and_the_next_rollout_works(running: Running, tmp_path: Path) -> None:
    (controller,) = processes(running, CONTROLLER)
    with Load(running, RATE, BODIES) as load:
        time.sleep(1)
        os.kill(controller.pid, signal.SIGKILL)
        new = changed(running.uri, tmp_path / "new", 0.5)
        until(lambda: {running.ask("release")[1]["release"] for _ in range(8)} == {new.hash})
        until(lambda: [process for process in processes(running, CONTROLLER) if process.pid != controller.pid])
        time.sleep(2)
    assert set(load.statuses) == {200}, load.statuses


def test_a_redis_that_restarts_is_a_clear_503_and_nothing_is_lost(running: Running, redis: RedisServer) -> None:
    before = [running.ask("recommend", body) for body in BODIES]
    assert {status for status, _ in before} == {200}
    with Load(running, RATE, BODIES) as load:
        time.sleep(1)
        redis.stop()
        until(lambda: running.ask("recommend", {"user_id": "u1"})[0] == 503)
        status, told = running.ask("recommend", {"user_id": "u1"})
        assert (status, told["error"]["code"]) == (503, "store_down")
        assert running.ask("recommend", {"history": ["i3", "i5"]}) == before[40]
        assert running.ask("ready")[0] == 503
        redis.start()
        until(lambda: running.ask("recommend", {"user_id": "u1"})[0] == 200)
        time.sleep(1)
    assert {status if status == 200 else status[0] for status in load.statuses} == {200, 503}
    assert [running.ask("recommend", body) for body in BODIES] == before
    assert running.ask("ready")[0] == 200


def test_a_service_that_was_shot_at_leaves_nothing_behind(running: Running) -> None:
    children = psutil.Process(running.process.pid).children(recursive=True)
    stop(running)
    assert running.process.returncode == 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [process.name() for process in alive]
    for port in running.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_wave_of_load_brings_a_second_replica_and_its_end_takes_it_away(tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    assert main(["online", "--workspace", uri]) == 0
    # Whatever the machine, a request is in hand for a quarter of a second, and 45 a second are eleven at a time.
    slow = ("--batching.wait_ms", "500", "--replicas.busy", "0.02")
    grows = ("--replicas.least", "1", "--replicas.most", "2", "--replicas.calm_s", "5")
    running = start(uri, tmp_path, *grows, *slow, *SMALL)
    try:
        assert len(processes(running, REPLICA)) == 1
        with Load(running, 3 * RATE, BODIES) as load:
            until(lambda: len(processes(running, REPLICA)) == 2)
            time.sleep(3)
        with Load(running, 1, BODIES) as calm:
            until(lambda: len(processes(running, REPLICA)) == 1)
            time.sleep(2)
        assert set(load.statuses) == set(calm.statuses) == {200}, (load.statuses, calm.statuses)
    finally:
        stop(running)
