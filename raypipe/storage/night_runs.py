"""What a night spends before it is published, over all its submissions: `nights/<date>/runs/<job>/<number>.json`.

A run is noted before its first unit, so that a kill cannot hide it. Once the run is over, what it spent and its result
are noted too, so that the ledger may drop its units' records.
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
    """A run of a night and what it has spent. `result` is None while the run is open and if it was given up."""

    job: str
    run_key: str
    spent: Usage
    result: Mapping[str, Any] | None


class NightRuns:
    """The runs of one night. A published night has none."""

    def __init__(self, store: Store, date: str) -> None:
        self.store = store
        self.folder = f"nights/{check_date(date)}/runs"

    def add(self, run: Run) -> None:
        """Note that a run belongs to this night."""
        path = f"{self.folder}/{run.job}/{run.number:08d}.json"
        self.store.create(path, canonical_json({"run_key": run.run_key}).encode())

    def settle(self) -> None:
        """Note what the finished runs spent and their results."""
        for path, raw in self._noted():
            if "spent" not in raw and (run := self._run(path, raw)).result() is not None:
                told = {**raw, "spent": asdict(run.spent(_USERS)), "result": run.result()}
                self.store.put(path, canonical_json(told).encode())

    def all(self) -> list[NightRun]:
        """All runs of the night, by job and in the order of their numbers."""
        return [self._read(path, raw) for path, raw in self._noted()]

    def spent(self, job: str) -> Usage:
        """What the runs of a job have spent, without the micro-batches in flight."""
        return sum((run.spent for run in self.all() if run.job == job), Usage())

    def close(self) -> None:
        """Delete the notes, because the night is over. Later work on the same date is another night."""
        self.store.delete_folder(self.folder)

    def _noted(self) -> list[tuple[str, dict[str, Any]]]:
        # A note may disappear after it was listed, because the night may end at this moment.
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
    """Note what the finished runs of every night spent and their results.

    Call it before the ledger drops their units' records or starts one of the runs anew.
    """
    # One listing, because there are many nights and hardly any of them has runs.
    places = (entry.path.split("/") for entry in store.list("nights"))
    for date in sorted({place[1] for place in places if place[2:3] == ["runs"]}):
        NightRuns(store, date).settle()
