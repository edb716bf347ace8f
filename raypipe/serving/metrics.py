"""The service's metrics for Prometheus, exported by Ray on every node as `ray_raypipe_serving_…`."""

from __future__ import annotations

from raypipe.serving.queries import ReleaseStatus


class ServingMetrics:
    """The metrics of one replica. Make it where Ray is connected. Implements `RequestMetrics`."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        bounds = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
        self._requests = Counter(
            "raypipe_serving_requests", "Requests, by route, status and code of failure.", ("route", "status", "code")
        )
        self._seconds = Histogram("raypipe_serving_seconds", "From a request's head to its answer.", bounds, ("route",))
        self._batch = Histogram("raypipe_serving_batch", "Queries of a batch.", [1, 2, 4, 8, 16, 32, 64, 128])
        self._since = Gauge("raypipe_serving_since", "Unix time since when this is served.", ("release", "night"))
        self._refused = Gauge(
            "raypipe_serving_refused", "Releases and nights in force that are not served because they are unfit."
        )
        self._held_back = Gauge(
            "raypipe_serving_held_back", "Releases and nights in force that could not be loaded, and are tried again."
        )
        self._night_behind = Gauge(
            "raypipe_serving_night_behind", "1 where the night in force is not the one that is served, else 0."
        )

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status), "code": code})
        self._seconds.observe(seconds, {"route": route})

    def batch(self, queries: int) -> None:
        self._batch.observe(queries)

    def served(self, status: ReleaseStatus) -> None:
        self._since.set(status.since, {"release": status.release[:12], "night": status.night or ""})
        self._refused.set(len(status.refused))
        self._held_back.set(len(status.held_back))
        self._night_behind.set(status.night_behind)
