"""What the night of a date spends before it is published, over all its submissions: `nights/<date>/runs/<job>/<number>.json`.

A run is noted before its first unit, so that no kill hides it, and once it is over with what it spent and ended with, so that
the ledger may forget its rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.ledger import Ledger, Run, Usage
from raypipe.storage.nights import check_date
from raypipe.storage.store import Store

_USERS = "users"
"""The kind of units that spend: those over users."""


@dataclass(frozen=True)
class NightRun:
    """A run of a night, what it has spent, and what it ended with; None where it is open or was given up."""

    job: str
    run_key: str
    spent: Usage
    result: Mapping[str, Any] | None


class NightRuns:
    """The runs of one night; of a night that was published there are none."""

    def __init__(self, store: Store, date: str) -> None:
        self.store = store
        self.folder = f"nights/{check_date(date)}/runs"

    def add(self, run: Run) -> None:
        """Note that the night works on a run."""
        path = f"{self.folder}/{run.job}/{run.number:08d}.json"
        self.store.create(path, canonical_json({"run_key": run.run_key}).encode())

    def settle(self) -> None:
        """Keep what came of the runs that are over."""
        for path, raw in self._noted():
            if "spent" not in raw and (run := self._run(path, raw)).result() is not None:
                told = {**raw, "spent": asdict(run.spent(_USERS)), "result": run.result()}
                self.store.put(path, canonical_json(told).encode())

    def all(self) -> list[NightRun]:
        """By job, and in the order of their numbers."""
        return [self._read(path, raw) for path, raw in self._noted()]

    def spent(self, job: str) -> Usage:
        """What the runs of a job have spent, but for micro-batches in flight."""
        return sum((run.spent for run in self.all() if run.job == job), Usage())

    def close(self) -> None:
        """The night is over; what comes next on its date is another one."""
        self.store.delete_folder(self.folder)

    def _noted(self) -> list[tuple[str, dict[str, Any]]]:
        # Of a night that ends this very moment notes may be gone.
        found = ((entry.path, self.store.get(entry.path)) for entry in self.store.list(self.folder))
        return [(path, json.loads(data)) for path, data in found if data is not None]

    def _run(self, path: str, raw: Mapping[str, Any]) -> Run:
        job = path.removeprefix(f"{self.folder}/").split("/")[0]
        return Ledger(self.store, job).run(raw["run_key"])

    def _read(self, path: str, raw: Mapping[str, Any]) -> NightRun:
        run = self._run(path, raw)
        spent, result = (Usage(**raw["spent"]), raw["result"]) if "spent" in raw else (run.spent(_USERS), run.result())
        return NightRun(run.job, run.run_key, spent, None if result and result["status"] == "abandoned" else result)


def settle_all(store: Store) -> None:
    """Keep what came of every night's runs that are over, before the ledger forgets their rows or begins one of them anew."""
    # In one listing, for there are many nights, and hardly any of them has runs.
    places = (entry.path.split("/") for entry in store.list("nights"))
    for date in sorted({place[1] for place in places if place[2:3] == ["runs"]}):
        NightRuns(store, date).settle()
