"""`raypipe serve`: runs the service on this machine, or on the cluster it is pointed to, until it is stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from raypipe.config import free
from raypipe.errors import UnavailableError, UsageError
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import LogFormat, say
from raypipe.serving.config import ServiceConfig
from raypipe.serving.haproxy import BINARY, LOOPBACK, write_haproxy_wrapper
from raypipe.serving.release_watcher import ReleaseWatcher
from raypipe.storage.online import open_online_store
from raypipe.storage.tokens import Tokens
from raypipe.storage.workspace import Workspace

JOB = "serve"
_LOOK_S = 0.5
_ASK_S = 5.0  # seconds between two times that Ray Serve is asked whether it is there
_SILENT_S = 60.0  # seconds without an answer until Ray Serve counts as dead
_HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    # The port of the proxy that HAProxy falls back to.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}


_SETTINGS = {
    # By default Ray's workers have a niceness of 15, below whatever else runs: right for a night, but not for requests.
    "RAY_worker_niceness": "0",
    # One event loop takes, answers and sends a request; work that takes long is done in threads of ours.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # These metrics report each request to a process of Ray, which counts it once more: `ServingMetrics` counts already.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Seconds for which a client may neither send the rest of its request nor read what is there for it; Ray's default
    # is an hour. They do not limit how long an answer takes, nor the time between its pieces.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
}


class ServeConfig(ServiceConfig):
    """Configuration of `serve`."""

    host: str = free("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = free(8000, "port of the API", ge=1, le=65535)
    metrics_port: int = free(
        9464,
        "port of 127.0.0.1 for Prometheus, of a service on one machine; a cluster's nodes have Ray's",
        ge=1,
        le=65535,
    )
    logs: LogFormat = free("text", "lines on stderr: text, or json with time, level and job; replicas' are always json")
    ingress: Literal["haproxy", "python"] = free("haproxy", "what stands before the replicas; haproxy is the faster")
    cluster: ClusterConfig = free(ClusterConfig, "the Ray cluster")


def run_serve(config: ServeConfig) -> JobResult:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in hand.

    Raises UsageError or UnfitError, before anything is started, if nothing can be served or a port is taken, and
    UnavailableError if Ray dies meanwhile.
    """
    workspace = Workspace(config.workspace)
    workspace.require_info()
    service = ServiceConfig(**{name: getattr(config, name) for name in ServiceConfig.model_fields})
    store = open_online_store(config.store, workspace.store)
    # A replica would do this first. Done here, it reports what is missing or unfit in one paragraph, not in a log.
    watcher = ReleaseWatcher(service, store)
    target = watcher.served.target
    store.close()
    if not target.version:
        say(
            f"{JOB}: no night is loaded, or the online store does not answer, so only histories are answered until "
            "it is there; `raypipe online` loads it"
        )
    elif target.night != watcher.night_in_force:
        say(
            f"{JOB}: the night in force, of {watcher.night_in_force}, is not loaded, so that of {target.night} is served; "
            "`raypipe online` loads it"
        )
    if not Tokens(workspace.store).valid():
        say(f"{JOB}: there is no token yet, so nobody is answered; make one with `raypipe token --name NAME`")
    _check_port(config.host, config.port, "Choose another --port.")
    started, is_private = time.monotonic(), config.cluster.is_private
    if is_private:
        _check_port(LOOPBACK, config.metrics_port, "Choose another --metrics_port.")
    with tempfile.TemporaryDirectory(prefix="raypipe-serve-") as folder:
        host = _prepare(config, Path(folder))
        config.cluster.connect(config.metrics_port)
        from ray import serve

        from raypipe.serving.app import NAME, build

        is_dead = False
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": config.port})
            serve.run(build(service), name=NAME)
            say(f"{JOB}: http://{config.host}:{config.port}/v1 answers, its description is at /docs")
            if is_private:
                say(f"{JOB}: http://{LOOPBACK}:{config.metrics_port}/metrics is for Prometheus")
            _wait_while(lambda: serve.status().applications[NAME])
            is_dead = True
        except KeyboardInterrupt:
            say(f"{JOB}: stopping")
        finally:
            if not is_dead:  # a Ray that does not answer cannot be asked to end
                _end(is_private)
    if is_dead:
        raise UnavailableError(
            f"Ray, on which the service runs, has not told of it for {_SILENT_S:.0f} s: it has died, or the service was deleted.",
            "Start it again by the same command.",
        )
    return JobResult(
        JOB, "ok", metrics={"release": target.release}, cost={"seconds": round(time.monotonic() - started, 1)}
    )


def _wait_while(answers: Callable[[], object]) -> None:
    """Wait while calls of `answers` return; return once none has done so for a minute."""
    last, stop = time.monotonic(), threading.Event()

    def ask() -> None:
        nonlocal last
        while not stop.wait(_ASK_S):
            # If Ray is dead, some calls fail and some never return.
            with contextlib.suppress(Exception):
                answers()
                last = time.monotonic()

    threading.Thread(target=ask, name="pulse", daemon=True).start()
    try:
        while time.monotonic() - last < _SILENT_S:
            time.sleep(_LOOK_S)
    finally:
        stop.set()


def _end(is_private: bool) -> None:
    """Delete the service; on a private cluster, where nobody else has applications, shut Ray Serve down."""
    from ray import serve

    from raypipe.serving.app import NAME

    if is_private:
        serve.shutdown()
    else:
        serve.delete(NAME)


def _prepare(config: ServeConfig, folder: Path) -> str:
    """Set the environment that Ray Serve reads when it is first imported, here and in every process it starts.

    Returns the address on which Ray Serve opens its own ports. Raises UsageError if one of HAProxy's ports is taken.
    """
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    if config.cluster.is_private:
        os.environ["RAY_SERVE_USE_GRPC_BY_DEFAULT"] = "0"  # it would open the port that `grpc_port` keeps closed
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if config.ingress == "haproxy" else "0"
    if config.ingress != "haproxy":
        return config.host
    # An answer depends on its request alone, so a request whose process died is sent to another one.
    os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response")
    ports = {variable: int(os.environ.get(variable, port)) for variable, port in _HAPROXY_PORTS.items()}
    for variable, taken in ports.items():
        _check_port("", taken, f"Set {variable} to a free one; a killed service may have left its haproxy behind.")
    if not config.cluster.is_private:
        return config.host
    # Replicas and the fallback proxy are reached from this machine only; HAProxy opens the API on `config.host`.
    os.environ[BINARY] = str(write_haproxy_wrapper(folder, config.host, config.port, ports.values(), config.replicas))
    return LOOPBACK


def _check_port(host: str, port: int, remedy: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"The service cannot listen on {host}:{port}: {error.strerror}.", remedy) from None
