"""The ledger: what a run set out to do, which of its units are done, and how far its publish got.

    ledger/<job>/runs/<number>.json          allocates the run's number and names its run key; created if absent
    ledger/<job>/<run_key>/manifest.json     recipe, pinned versions, scope; written before the first unit
    ledger/<job>/<run_key>/plan/<kind>.json  the units of one phase
    ledger/<job>/<run_key>/units/<unit>.json one receipt a unit; created if absent, after all its files are staged
    ledger/<job>/<run_key>/attempts/<unit>/  one marker an attempt, written before its first row
    ledger/<job>/<run_key>/deaths/<unit>.json  suspect rows, written after the driver saw the unit's process die
    ledger/<job>/<run_key>/journal/<unit>    the rows of the micro-batch in flight
    ledger/<job>/<run_key>/usage/<unit>/     what each attempt has spent, rewritten after each micro-batch
    ledger/<job>/<run_key>/publish.json      everything the publish will commit; from here on it only rolls forward
    ledger/<job>/<run_key>/done.json         the result; written last

A resumed run works on the planned units that have no receipt.
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

# The scope of a run over all users. The scope of a canary run is the hash of its users.
WHOLE = "all"
# A row is rejected once it has killed its process this often while it ran alone on a healthy node.
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
    """Row counts of a unit. No row may vanish: rows_in = ok + rejected + all kinds of skipped."""

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
    """What a unit spent: model calls, tokens, and seconds of wall-clock time."""

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
    """What one unit did: counts, usage, staged files and schema hashes by table, and facts for the next phase."""

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
    """The sum of the counts of all receipts."""
    return sum((receipt.counts for receipt in receipts), Counts())


def usage_of(receipts: Iterable[Receipt]) -> Usage:
    """The sum of the usage of all receipts."""
    return sum((receipt.usage for receipt in receipts), Usage())


@dataclass(frozen=True)
class Publish:
    """One table's share of a publish: the arguments of `Table.publish`."""

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
        """Record the units of a phase, so that `status` knows the total."""
        self._put(f"plan/{kind}.json", [unit.index for unit in units])

    def planned(self) -> dict[str, int]:
        """The number of units of every phase planned so far, by kind."""
        entries = self.store.list(f"{self.folder}/plan")
        return {
            entry.path.rsplit("/", 1)[1].removesuffix(".json"): len(json.loads(self.store.read(entry.path)))
            for entry in entries
        }

    def commit(self, receipt: Receipt) -> bool:
        """Record a unit as done.

        Returns False if another attempt committed first: then its files count, and those of this attempt are waste.
        """
        assert receipt.counts.balanced, f"unit {receipt.unit.name} lost rows: {receipt.counts}"
        return self.store.create(f"{self.folder}/units/{receipt.unit.name}.json", receipt.to_json())

    def receipts(self, kind: str | None = None) -> dict[Unit, Receipt]:
        """The receipts of the finished units, of one phase or of all phases."""
        prefix = f"{self.folder}/units/"
        paths = [entry.path for entry in self.store.list(prefix)]
        if kind is not None:
            paths = [path for path in paths if path.startswith(f"{prefix}{kind}-")]
        with ThreadPoolExecutor(16) as readers:
            found = [Receipt.from_json(data) for data in readers.map(self.store.read, paths)]
        return {receipt.unit: receipt for receipt in sorted(found, key=lambda receipt: receipt.unit)}

    def undo(self, units: Iterable[Unit]) -> None:
        """Delete the receipts of these units, so that they count as not done. The files they staged become waste."""
        self.store.delete(f"{self.folder}/units/{unit.name}.json" for unit in units)

    def begin_attempt(self, unit: Unit, worker: Mapping[str, Any]) -> int:
        """Record that `worker` starts on `unit`. Returns the attempt's number, counted from 1."""
        folder = f"{self.folder}/attempts/{unit.name}"
        attempt = 1 + len(self.store.list(folder))
        if attempt > 1:
            # The journal of an earlier attempt must not be blamed if this attempt dies.
            self.journal(unit, [])
        while not self.store.create(f"{folder}/{attempt:04d}.json", canonical_json(dict(worker)).encode()):
            attempt += 1
        return attempt

    def journal(self, unit: Unit, rows: Sequence[str]) -> None:
        """Record the rows of the micro-batch that is about to run.

        Pass no rows before work for which no row can be blamed.
        """
        self._put(f"journal/{unit.name}.json", list(rows))

    def record_usage(self, unit: Unit, attempt: int, usage: Usage) -> None:
        """Record what an attempt has spent so far, so that it counts against caps even if the attempt never ends."""
        self._put(f"usage/{unit.name}/{attempt:04d}.json", asdict(usage))

    def spent(self, kind: str) -> Usage:
        """What all attempts at the units of a phase have spent, without the micro-batches in flight."""
        receipts = {(receipt.unit.name, receipt.attempt): receipt.usage for receipt in self.receipts(kind).values()}
        prefix = f"{self.folder}/usage/"
        found = dict(receipts)
        for entry in self.store.list(prefix):
            unit, attempt = entry.path.removeprefix(prefix).removesuffix(".json").split("/")
            if unit.startswith(f"{kind}-") and (unit, int(attempt)) not in receipts:
                found[unit, int(attempt)] = Usage(**json.loads(self.store.read(entry.path)))
        return sum(found.values(), Usage())

    def record_death(self, unit: Unit) -> None:
        """Make the rows in the journal of `unit` suspects.

        The driver calls this when it saw the process that worked on `unit` die on a healthy node.
        """
        # Without a journal there is no row to suspect. Such deaths are counted under the empty name.
        rows = self._get(f"journal/{unit.name}.json") or [""]
        deaths = self.deaths(unit)
        alone = len(rows) == 1
        for row in rows:
            # If several rows were in flight, the death proves nothing about any one of them: each becomes a suspect, to
            # be run alone.
            deaths[row] = deaths.get(row, 0) + int(alone)
        self._put(f"deaths/{unit.name}.json", deaths)

    def deaths(self, unit: Unit) -> dict[str, int]:
        """The suspect rows of a unit, with how often each killed its process while it ran alone."""
        return dict(self._get(f"deaths/{unit.name}.json") or {})

    def attempt_markers(self, units: Iterable[Unit]) -> list[tuple[Unit, int, dict[str, Any]]]:
        """The newest attempt of each unit that has one, as (unit, attempt number, worker)."""
        markers = []
        for unit in units:
            entries = self.store.list(f"{self.folder}/attempts/{unit.name}")
            if entries:
                newest = entries[-1].path
                markers.append((unit, int(newest.rsplit("/", 1)[1].split(".")[0]), json.loads(self.store.read(newest))))
        return markers

    def intend_publish(self, parts: Sequence[Publish], result: Mapping[str, Any], buckets: int | None = None) -> None:
        """Record everything that will be committed and, if it changes, the workspace's number of buckets.

        From here on the run can only be completed. Any job may complete it.
        """
        intent = {"parts": [asdict(part) for part in parts], "result": dict(result), "buckets": buckets}
        self._put("publish.json", intent)

    def publish_intent(self) -> tuple[list[Publish], dict[str, Any]] | None:
        raw = self._get("publish.json")
        return None if raw is None else ([Publish.from_dict(part) for part in raw["parts"]], raw["result"])

    def intended_buckets(self) -> int | None:
        """The number of buckets that the publish gives the workspace, or None if the number does not change."""
        return (self._get("publish.json") or {}).get("buckets")

    def trim(self) -> None:
        """Drop the per-unit records of a finished run. What it set out to do and how it ended is kept."""
        assert self.result() is not None, f"run {self.run_key} is open"
        for name in ("units", "attempts", "deaths", "journal", "usage", "plan"):
            self.store.delete_folder(f"{self.folder}/{name}")

    def finish(self, result: Mapping[str, Any]) -> None:
        """End the run: drop its staging folder, then write its result. In this order a kill leaves no folder behind."""
        self.store.delete_folder(self.staging)
        self._put("done.json", dict(result))

    def result(self) -> dict[str, Any] | None:
        """The result that the run ended with, or None while it is open."""
        return self._get("done.json")

    def abandon(self, why: str) -> None:
        """Give the run up, because its inputs or its recipe changed before it could publish."""
        assert self.publish_intent() is None, "a run that began to publish can only be completed"
        # The result goes first: a run whose staged files are gone must not look resumable.
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
        """The run keys by run number."""
        paths = [entry.path for entry in self.store.list(f"ledger/{self.job}/runs")]
        with ThreadPoolExecutor(16) as readers:
            found = [json.loads(data)["run_key"] for data in readers.map(self.store.read, paths)]
        return {int(path.rsplit("/", 1)[1].split(".")[0]): key for path, key in zip(paths, found, strict=True)}

    def newest(self) -> Run | None:
        """The newest run over all users that wrote its manifest, open or not."""
        return next((run for run, scope in self._newest_first() if scope == WHOLE), None)

    def finished(self) -> Iterator[Run]:
        """The runs over all users that ended and were not given up, newest first."""
        for run, scope in self._newest_first():
            result = run.result()
            if scope == WHOLE and result is not None and result["status"] != "abandoned":
                yield run

    def open_runs(self, scope: str) -> Iterator[Run]:
        """The unfinished runs of a scope, newest first.

        The search stops at the newest finished run of the scope, because that run gave up all runs that were open
        before it.
        """
        for run, found in self._newest_first():
            if found != scope:
                continue
            if run.result() is not None:
                return
            yield run

    def publishing(self) -> Iterator[Run]:
        """The unfinished runs of any scope that began to publish.

        The search stops at the newest finished run over all users, because that run completed all publishes before it.
        """
        for run, scope in self._newest_first():
            if run.result() is None:
                if run.publish_intent() is not None:
                    yield run
            elif scope == WHOLE:
                return

    def _newest_first(self) -> Iterator[tuple[Run, str]]:
        """The runs that wrote their manifest, each with its scope, newest first."""
        for _, run_key in sorted(self.numbers().items(), reverse=True):
            run = self.run(run_key)
            if self.store.exists(f"{run.folder}/manifest.json"):
                yield run, run.manifest["scope"]

    def drop(self, number: int, run_key: str) -> None:
        """Delete a finished run. Its number goes last, so that a deletion that was killed is done again."""
        self.store.delete_folder(self.run(run_key).folder)
        self.store.delete([f"ledger/{self.job}/runs/{number:08d}.json"])

    def run(self, run_key: str) -> Run:
        return Run(self.store, self.job, run_key)

    def open(self, run_key: str) -> Run | None:
        """The unfinished run of this key, or None if there is none."""
        run = self.run(run_key)
        return run if self.store.exists(f"{run.folder}/manifest.json") and run.result() is None else None

    def start(self, run_key: str, manifest: Mapping[str, Any], at_least: int = 1) -> Run:
        """Begin a new run: take the next number (at least `at_least`), then write the manifest.

        A finished run of the same key, whose output was taken back since, is replaced by the new one. A start that was
        killed before it wrote its manifest keeps its number, so that outputs that carry the number equal those of an
        uninterrupted run.
        """
        run = self.run(run_key)
        manifest_path = f"{run.folder}/manifest.json"
        numbers = self.numbers()
        number = max(numbers, default=0)
        if self.store.exists(manifest_path):
            assert run.result() is not None, f"run {run_key} is still open"
            # The manifest goes first: a kill during the deletion must not leave a manifest without a result, because
            # that would be an open run.
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
