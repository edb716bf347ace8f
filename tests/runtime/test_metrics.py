"""What Prometheus is told, read where it reads it: from the node's metrics endpoint."""

from __future__ import annotations

import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from raypipe.errors import RaypipeError
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.units import UnitContext, run_units
from raypipe.storage.ledger import Counts, Ledger, Receipt, Unit, Usage
from raypipe.storage.store import Store

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("ray_cluster")
LINE = re.compile(r"^ray_(raypipe_\w+)\{(.*)\} ([\d.e+]+)$", re.MULTILINE)


class Work:
    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        counts = Counts(10, 6, 1, {"unchanged": 3, "blocked": 0})
        return Receipt(unit, counts, Usage(7, 500, 40, 0.5), attempt=context.attempt)


class Fails:
    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        raise RaypipeError("There is no more.", "Bring some.")


def told(job: str) -> dict[tuple[str, ...], float]:
    """Of a job: (metric, its tags' values) → value, over all processes."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    found: dict[tuple[str, ...], float] = {}
    for name, tags, value in LINE.findall(text):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if pairs.get("pipeline") == job:
            key = (name, *(pairs[tag] for tag in ("outcome", "direction") if tag in pairs))
            found[key] = found.get(key, 0.0) + float(value)
    return found


def test_rows_calls_and_tokens_are_told_as_units_end(tmp_path: Path) -> None:
    run = Ledger(Store(str(tmp_path / "workspace")), "metered").start("k" * 32, {"scope": "all"})
    run_units(run, [Unit("bucket", n) for n in range(4)], Work, ClusterConfig(workers=2), "metered")
    expected = {
        ("raypipe_rows_total", "ok"): 24,
        ("raypipe_rows_total", "rejected"): 4,
        ("raypipe_rows_total", "unchanged"): 12,
        ("raypipe_calls_total",): 28,
        ("raypipe_tokens_total", "in"): 2000,
        ("raypipe_tokens_total", "out"): 160,
        ("raypipe_unit_seconds_count",): 4,
        ("raypipe_units_left",): 0,
    }
    deadline = time.monotonic() + 60
    while not expected.items() <= (found := told("metered")).items() and time.monotonic() < deadline:
        time.sleep(1)
    assert {key: found.get(key) for key in expected} == expected
    assert ("raypipe_rows_total", "blocked") not in found


def test_a_phase_that_failed_leaves_no_units(tmp_path: Path) -> None:
    run = Ledger(Store(str(tmp_path / "workspace")), "failing").start("k" * 32, {"scope": "all"})
    with pytest.raises(RaypipeError, match="There is no more"):
        run_units(run, [Unit("bucket", n) for n in range(4)], Fails, ClusterConfig(workers=2), "failing")
    left = ("raypipe_units_left",)
    deadline = time.monotonic() + 60
    while told("failing").get(left) != 0 and time.monotonic() < deadline:
        time.sleep(1)
    assert told("failing")[left] == 0
