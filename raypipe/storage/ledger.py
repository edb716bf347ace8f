"""The ledger: what a run set out to do, which units of it are done, and how far its publish came.

    ledger/<job>/runs/<number>.json          created-if-absent: allocates the run's number, names its run key
    ledger/<job>/<run_key>/manifest.json     recipe, pinned versions, scope; before the first unit
    ledger/<job>/<run_key>/plan/<kind>.json  the units of one phase
    ledger/<job>/<run_key>/units/<unit>.json one receipt a unit, created-if-absent, after all its files are staged
    ledger/<job>/<run_key>/attempts/<unit>/  one marker an attempt, before its first row
    ledger/<job>/<run_key>/deaths/<unit>.json  suspect rows, after the driver saw the unit's process die
    ledger/<job>/<run_key>/journal/<unit>    the rows of the micro-batch in flight
    ledger/<job>/<run_key>/usage/<unit>/     what each attempt has spent, rewritten after each micro-batch
    ledger/<job>/<run_key>/publish.json      everything the publish will commit; from here on it only rolls forward
    ledger/<job>/<run_key>/done.json         last

Resume is set difference: planned units less those with a receipt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.store import Store
from raypipe.storage.tables import StagedFile

# The scope of a run over everything; a canary's is the hash of its users.
WHOLE = "all"
# A row that killed its process this often, alone and on a healthy node, is rejected.
MAX_DEATHS = 3


@dataclass(frozen=True, order=True)
class Unit:
    """One piece of a phase: a user bucket, an item range or a log split."""

    kind: str
    index: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index:06d}"


@dataclass(frozen=True)
class Counts:
    """Rows of a unit. Nothing vanishes: rows_in = ok + rejected + all kinds of skipped."""

    rows_in: int = 0
    ok: int = 0
    rejected: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        return self.rows_in == self.ok + self.rejected + sum(self.skipped.values())

    def __add__(self, other: Counts) -> Counts:
        kinds = sorted({*self.skipped, *other.skipped})
        skipped = {kind: self.skipped.get(kind, 0) + other.skipped.get(kind, 0) for kind in kinds}
        return Counts(self.rows_in + other.rows_in, self.ok + other.ok, self.rejected + other.rejected, skipped)


@dataclass(frozen=True)
class Usage:
    """What a unit spent: model calls, tokens, seconds of wall clock."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.calls - other.calls,
            self.tokens_in - other.tokens_in,
            self.tokens_out - other.tokens_out,
            self.seconds - other.seconds,
        )


@dataclass(frozen=True)
class Receipt:
    """What one unit did: counts, usage, staged files by table, their schema hashes, and facts the next phase needs."""

    unit: Unit
    counts: Counts
    usage: Usage = field(default_factory=Usage)
    staged: Mapping[str, Sequence[StagedFile]] = field(default_factory=dict)
    schemas: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1

    def to_json(self) -> bytes:
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> Receipt:
        raw = json.loads(data)
        raw["unit"] = Unit(**raw["unit"])
        raw["counts"] = Counts(**raw["counts"])
        raw["usage"] = Usage(**raw["usage"])
        raw["staged"] = {table: [StagedFile(**file) for file in files] for table, files in raw["staged"].items()}
        return Receipt(**raw)


def counts_of(receipts: Iterable[Receipt]) -> Counts:
    """Of all of them together."""
    return sum((receipt.counts for receipt in receipts), Counts())


def usage_of(receipts: Iterable[Receipt]) -> Usage:
    """Of all of them together."""
    return sum((receipt.usage for receipt in receipts), Usage())


@dataclass(frozen=True)
class Publish:
    """One table's share of a publish: what `Table.publish` is given."""

    table: str
    mode: str
    files: Sequence[StagedFile]
    replaces: Sequence[Mapping[str, str | int]] = ()

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Publish:
        return Publish(raw["table"], raw["mode"], [StagedFile(**file) for file in raw["files"]], raw["replaces"])


class Run:
    """One run's folder in the ledger."""

    def __init__(self, store: Store, job: str, run_key: str) -> None:
        self.store = store
        self.job = job
        self.run_key = run_key
        self.folder = f"ledger/{job}/{run_key}"
        self.staging = f"staging/{run_key}"

    @property
    def manifest(self) -> dict[str, Any]:
        data = self._get("manifest.json")
        assert data is not None, f"run {self.run_key} has no manifest"
        return data

    @property
    def number(self) -> int:
        return int(self.manifest["number"])

    def plan(self, kind: str, units: Sequence[Unit]) -> None:
        """Write down the units of a phase, so that `status` knows the total."""
        self._put(f"plan/{kind}.json", [unit.index for unit in units])

    def planned(self) -> dict[str, int]:
        """Units of every phase planned so far."""
        entries = self.store.list(f"{self.folder}/plan")
        return {
            entry.path.rsplit("/", 1)[1].removesuffix(".json"): len(json.loads(self.store.read(entry.path)))
            for entry in entries
        }

    def commit(self, receipt: Receipt) -> bool:
        """Record a unit as done; False where another attempt was first (its files stand, these are waste)."""
        assert receipt.counts.balanced, f"unit {receipt.unit.name} lost rows: {receipt.counts}"
        return self.store.create(f"{self.folder}/units/{receipt.unit.name}.json", receipt.to_json())

    def receipts(self, kind: str | None = None) -> dict[Unit, Receipt]:
        """The receipts of the units that are done, of one phase or of all."""
        prefix = f"{self.folder}/units/"
        paths = [entry.path for entry in self.store.list(prefix)]
        if kind is not None:
            paths = [path for path in paths if path.startswith(f"{prefix}{kind}-")]
        with ThreadPoolExecutor(16) as readers:
            found = [Receipt.from_json(data) for data in readers.map(self.store.read, paths)]
        return {receipt.unit: receipt for receipt in sorted(found, key=lambda receipt: receipt.unit)}

    def undo(self, units: Iterable[Unit]) -> None:
        """The units are no longer done; what they staged is waste."""
        self.store.delete(f"{self.folder}/units/{unit.name}.json" for unit in units)

    def begin_attempt(self, unit: Unit, worker: Mapping[str, Any]) -> int:
        """Mark that `worker` starts on `unit`; returns the attempt's number, from 1."""
        folder = f"{self.folder}/attempts/{unit.name}"
        attempt = 1 + len(self.store.list(folder))
        if attempt > 1:
            # What an earlier attempt left there has no part in this one's death.
            self.journal(unit, [])
        while not self.store.create(f"{folder}/{attempt:04d}.json", canonical_json(dict(worker)).encode()):
            attempt += 1
        return attempt

    def journal(self, unit: Unit, rows: Sequence[str]) -> None:
        """Write down the rows of the micro-batch that is about to run; none where what follows is no row's doing."""
        self._put(f"journal/{unit.name}.json", list(rows))

    def record_usage(self, unit: Unit, attempt: int, usage: Usage) -> None:
        """Write down what an attempt has spent so far, for caps to count even if it never ends."""
        self._put(f"usage/{unit.name}/{attempt:04d}.json", asdict(usage))

    def spent(self, kind: str) -> Usage:
        """What all attempts at the units of a phase have spent, but for micro-batches in flight."""
        receipts = {(receipt.unit.name, receipt.attempt): receipt.usage for receipt in self.receipts(kind).values()}
        prefix = f"{self.folder}/usage/"
        found = dict(receipts)
        for entry in self.store.list(prefix):
            unit, attempt = entry.path.removeprefix(prefix).removesuffix(".json").split("/")
            if unit.startswith(f"{kind}-") and (unit, int(attempt)) not in receipts:
                found[unit, int(attempt)] = Usage(**json.loads(self.store.read(entry.path)))
        return sum(found.values(), Usage())

    def record_death(self, unit: Unit) -> None:
        """The driver saw the process working on `unit` die on a healthy node: what its journal holds is suspect."""
        # Without a journal there is no row to suspect; such deaths are counted under the empty name.
        rows = self._get(f"journal/{unit.name}.json") or [""]
        deaths = self.deaths(unit)
        alone = len(rows) == 1
        for row in rows:
            # A death in company proves nothing about a row: it makes it a suspect, to be run alone.
            deaths[row] = deaths.get(row, 0) + int(alone)
        self._put(f"deaths/{unit.name}.json", deaths)

    def deaths(self, unit: Unit) -> dict[str, int]:
        """Suspect rows of a unit, with the number of times each died alone."""
        return dict(self._get(f"deaths/{unit.name}.json") or {})

    def attempt_markers(self, units: Iterable[Unit]) -> list[tuple[Unit, int, dict[str, Any]]]:
        """The newest attempt of each unit that has one: unit, attempt number, worker."""
        markers = []
        for unit in units:
            entries = self.store.list(f"{self.folder}/attempts/{unit.name}")
            if entries:
                newest = entries[-1].path
                markers.append((unit, int(newest.rsplit("/", 1)[1].split(".")[0]), json.loads(self.store.read(newest))))
        return markers

    def intend_publish(self, parts: Sequence[Publish], result: Mapping[str, Any], buckets: int | None = None) -> None:
        """Write down all that will be committed, and where it changes, the workspace's number of buckets.

        From here the run can only be completed, by anyone.
        """
        intent = {"parts": [asdict(part) for part in parts], "result": dict(result), "buckets": buckets}
        self._put("publish.json", intent)

    def publish_intent(self) -> tuple[list[Publish], dict[str, Any]] | None:
        raw = self._get("publish.json")
        return None if raw is None else ([Publish.from_dict(part) for part in raw["parts"]], raw["result"])

    def intended_buckets(self) -> int | None:
        """The number of buckets that the publish gives the workspace, or None where it stays."""
        return (self._get("publish.json") or {}).get("buckets")

    def trim(self) -> None:
        """Of a finished run, keep what it set out to do and how it ended: the units' rows are nobody's business now."""
        assert self.result() is not None, f"run {self.run_key} is open"
        for name in ("units", "attempts", "deaths", "journal", "usage", "plan"):
            self.store.delete_folder(f"{self.folder}/{name}")

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is over: drop its staging folder, then write its result, so that a kill leaves no folder behind."""
        self.store.delete_folder(self.staging)
        self._put("done.json", dict(result))

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, or None while it is open."""
        return self._get("done.json")

    def abandon(self, why: str) -> None:
        """Give the run up: its inputs or its recipe moved on before it could publish."""
        assert self.publish_intent() is None, "a run that began to publish can only be completed"
        # In this order: units that lost their spills must not look resumable.
        self._put("done.json", {"status": "abandoned", "why": why})
        self.store.delete_folder(self.staging)

    def _put(self, name: str, value: Any) -> None:
        self.store.put(f"{self.folder}/{name}", canonical_json(value).encode())

    def _get(self, name: str) -> Any:
        data = self.store.get(f"{self.folder}/{name}")
        return None if data is None else json.loads(data)


class Ledger:
    """All runs of one job, in the order of their numbers."""

    def __init__(self, store: Store, job: str) -> None:
        self.store = store
        self.job = job

    def numbers(self) -> dict[int, str]:
        """Run keys by run number."""
        paths = [entry.path for entry in self.store.list(f"ledger/{self.job}/runs")]
        with ThreadPoolExecutor(16) as readers:
            found = [json.loads(data)["run_key"] for data in readers.map(self.store.read, paths)]
        return {int(path.rsplit("/", 1)[1].split(".")[0]): key for path, key in zip(paths, found, strict=True)}

    def newest(self) -> Run | None:
        """The newest run over everything that wrote its manifest, open or not."""
        return next((run for run, scope in self._newest_first() if scope == WHOLE), None)

    def finished(self) -> Iterator[Run]:
        """The runs over everything that ended and were not given up, newest first."""
        for run, scope in self._newest_first():
            result = run.result()
            if scope == WHOLE and result is not None and result["status"] != "abandoned":
                yield run

    def open_runs(self, scope: str) -> Iterator[Run]:
        """The unfinished runs of a scope, newest first.

        Only those after its newest finished one are looked at: that one gave up all that were open before it.
        """
        for run, found in self._newest_first():
            if found != scope:
                continue
            if run.result() is not None:
                return
            yield run

    def publishing(self) -> Iterator[Run]:
        """The unfinished runs of any scope that began to publish.

        Only those after the newest finished one over everything are looked at: that one completed all before it.
        """
        for run, scope in self._newest_first():
            if run.result() is None:
                if run.publish_intent() is not None:
                    yield run
            elif scope == WHOLE:
                return

    def _newest_first(self) -> Iterator[tuple[Run, str]]:
        """Runs that wrote their manifest, and their scopes."""
        for _, run_key in sorted(self.numbers().items(), reverse=True):
            run = self.run(run_key)
            if self.store.exists(f"{run.folder}/manifest.json"):
                yield run, run.manifest["scope"]

    def drop(self, number: int, run_key: str) -> None:
        """Delete a finished run; its number goes last, so that a deletion that was killed is done again."""
        self.store.delete_folder(self.run(run_key).folder)
        self.store.delete([f"ledger/{self.job}/runs/{number:08d}.json"])

    def run(self, run_key: str) -> Run:
        return Run(self.store, self.job, run_key)

    def open(self, run_key: str) -> Run | None:
        """The unfinished run of that key, if there is one."""
        run = self.run(run_key)
        return run if self.store.exists(f"{run.folder}/manifest.json") and run.result() is None else None

    def start(self, run_key: str, manifest: Mapping[str, Any], at_least: int = 1) -> Run:
        """Begin a new run: take the next number (never under `at_least`), then write the manifest.

        A finished run of the same key (its output was taken back since) makes room for the new one. A start that was
        killed before its manifest keeps its number, so that what carries the number equals the uninterrupted run's.
        """
        run = self.run(run_key)
        manifest_path = f"{run.folder}/manifest.json"
        numbers = self.numbers()
        number = max(numbers, default=0)
        if self.store.exists(manifest_path):
            assert run.result() is not None, f"run {run_key} is still open"
            # First: a kill during the deletion must not leave a manifest without a result, which is an open run.
            self.store.delete([manifest_path])
            is_mine = False
        else:
            is_mine = numbers.get(number) == run_key and number >= at_least
        self.store.delete_folder(run.folder)
        if not is_mine:
            number = max(at_least, 1 + number)
            while not self.store.create(
                f"ledger/{self.job}/runs/{number:08d}.json", canonical_json({"run_key": run_key}).encode()
            ):
                number += 1
        run._put("manifest.json", {**manifest, "number": number, "run_key": run_key, "job": self.job})
        return run
