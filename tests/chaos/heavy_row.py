"""A unit with a row that fills the node's memory, as a program: Ray's memory monitor, asked to be strict, ends its worker."""

from __future__ import annotations

import os
import sys
import time

import psutil
import ray

from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.units import UnitContext, run_units
from raypipe.storage.ledger import MAX_DEATHS, Counts, Ledger, Receipt, Unit
from raypipe.storage.store import Store

# Room for Ray and its workers as they start, not for the row.
ROOM, STEP = 3 * 2**30, 200 * 2**20


class Heavy:
    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        if unit.index != 1 or context.deaths.get("heavy", 0) >= MAX_DEATHS:
            return Receipt(unit, Counts(1, 1))
        context.journal(["heavy"])
        held = []
        for _ in range(40):
            held.append(b"x" * STEP)
            time.sleep(0.05)
        raise AssertionError("nobody ended it")


def main(workspace: str) -> None:
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + ROOM) / memory.total
    os.environ.update({"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"})
    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    run = Ledger(Store(workspace), "test").start("k" * 32, {"scope": "all"})
    units = [Unit("bucket", number) for number in range(3)]
    receipts = run_units(run, units, Heavy, ClusterConfig(workers=2), "heavy")
    print(len(receipts), run.deaths(units[1]))


if __name__ == "__main__":
    main(sys.argv[1])
