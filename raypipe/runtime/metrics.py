"""Prometheus metrics of running work, through Ray's own metrics: rows, calls and tokens of a job, and units left.

Ray serves them on every node as `ray_raypipe_…`. The counts of a dead worker stay in the sums of what was scraped
before.
"""

from __future__ import annotations

from raypipe.storage.ledger import Receipt


class WorkMetrics:
    """The counters of one process. Create it after Ray is connected."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        # Not "job", because Prometheus adds a label of that name to everything.
        tags = {"pipeline": job}
        self._rows = Counter("raypipe_rows", "Rows of finished units, by what became of them.", ("pipeline", "outcome"))
        self._calls = Counter("raypipe_calls", "Model calls of finished units.", ("pipeline",))
        self._tokens = Counter("raypipe_tokens", "Tokens of finished units, in and out.", ("pipeline", "direction"))
        self._seconds = Histogram("raypipe_unit_seconds", "Seconds of a unit.", [1, 10, 60, 600, 3600], ("pipeline",))
        self._left = Gauge("raypipe_units_left", "Units without a receipt.", ("pipeline",))
        for metric in (self._rows, self._calls, self._tokens, self._seconds, self._left):
            metric.set_default_tags(tags)

    def unit_done(self, receipt: Receipt) -> None:
        outcomes = {"ok": receipt.counts.ok, "rejected": receipt.counts.rejected, **receipt.counts.skipped}
        for outcome, count in outcomes.items():
            if count:
                self._rows.inc(count, {"outcome": outcome})
        usage = receipt.usage
        if usage.calls:
            self._calls.inc(usage.calls)
        for direction, count in (("in", usage.tokens_in), ("out", usage.tokens_out)):
            if count:
                self._tokens.inc(count, {"direction": direction})
        self._seconds.observe(usage.seconds)

    def units_left(self, count: int) -> None:
        self._left.set(count)
