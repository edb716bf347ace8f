"""`raypipe doctor`: what a person would check before the first night, a line each; a failed check names its remedy."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator

from raypipe.config import free
from raypipe.errors import RaypipeError
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.storage.store import Store
from raypipe.storage.tracking import tracking_uri

_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "deltalake", "obstore", "mlflow")
_FREE_BYTES = 2 * 2**30


class DoctorConfig(JobConfig):
    """Configuration of `doctor`."""

    start_ray: bool = free(True, "also start or reach Ray")


def run_doctor(config: DoctorConfig) -> JobResult:
    """Run every check. The status is "failed" if one of them failed."""
    results = {name: _run(name, check) for name, check in _checks(config)}
    return JobResult("doctor", "ok" if all(results.values()) else "failed", metrics=results)


def _run(name: str, check: Callable[[], str]) -> bool:
    try:
        say(f"ok      {name}: {check()}")
    except RaypipeError as error:
        say(f"failed  {name}: {error}")
        return False
    return True


def _checks(config: DoctorConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: sys.version.split()[0]
    for package in _PACKAGES:
        yield package, lambda package=package: _version(package)  # type: ignore[misc]
    store = Store(config.workspace)
    yield "workspace", lambda: _workspace(store)
    yield "format", lambda: str(config.open_workspace().info() or "empty, nothing ingested yet")
    yield "disk", lambda: _disk(store)
    if config.tracking != "off":
        yield "mlflow tracking", lambda: tracking_uri(store)
    if config.start_ray:
        yield "ray cluster", lambda: _ray(config)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise RaypipeError(f"{package} is not installed.", "Run `make install`.") from None


def _workspace(store: Store) -> str:
    store.check_writable()
    return f"{store.uri} can be written"


def _disk(store: Store) -> str:
    room = store.free_bytes()
    if room is not None and room < _FREE_BYTES:
        raise RaypipeError(
            f"Only {room / 2**30:.1f} GiB are free under {store.uri}.", "Free some, or use another disk."
        )
    return "an object store" if room is None else f"{room / 2**30:.0f} GiB free"


def _ray(config: DoctorConfig) -> str:
    config.cluster.connect()
    import ray

    resources = ray.cluster_resources()
    return f"{resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs on {len(ray.nodes())} nodes"
