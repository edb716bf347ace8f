"""The nights that get killed: generated input, the command in a process of its own, and what it published.

The input has everything that is counted: 300 users, rows of unknown items and of impossible times, repeated events, and a
second log of 5 %. It is small, cut into many splits and buckets, so that a kill finds work done and work left.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raypipe.storage.nights import Nights
from raypipe.storage.schemas import TABLES
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace

USERS, ITEMS, EVENTS, LATER_EVENTS = 300, 120, 9_000, 450
SPLITS, BUCKETS = 8, 16
UNITS = SPLITS + 2 * BUCKETS
COMPARED = ("items", "histories", "block_summaries", "summaries", "logs", "rejects")
# Two runs may differ in these: which run wrote a reject, and at which attempt.
_RUN_COLUMNS = {"run_key", "attempts"}
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Log:
    """A generated log and what is in it."""

    path: Path
    rows: int
    rejected: int
    duplicates: int
    users: int


def write_catalogue(path: Path) -> Path:
    genres = ("Drama", "War", "Film-Noir")
    lines = [f"i{n},The {n}th Film,{genres[n % 3]}\n" for n in range(ITEMS)]
    path.write_text("item_id,title,genres\n" + "".join(lines))
    return path


def write_log(path: Path, seed: int, events: int, users: int, start: int) -> Log:
    """A log of `events` distinct events of `users` users, with bad rows and repeats among them."""
    rng = random.Random(seed)
    drawn: dict[tuple[str, str, int], None] = {}
    for user in range(users):
        drawn[f"user {user}", f"i{user % ITEMS}", start] = None
    while len(drawn) < events:
        drawn[
            f"user {rng.randrange(users)}", f"i{int(rng.random() ** 2 * ITEMS)}", start + 60 * rng.randrange(1_000_000)
        ] = None
    good = list(drawn)
    rng.shuffle(good)
    rows = list(good)
    rejected = duplicates = 0
    for number, (user, item, moment) in enumerate(good):
        if number % 100 == 50:
            rows.insert(rng.randrange(len(rows)), (user, "no-such-item", moment))
            rejected += 1
        if number % 150 == 50:
            rows.insert(rng.randrange(len(rows)), (user, item, "not a time"))
            rejected += 1
        if number % 90 == 20:
            rows.append((user, item, moment))
            duplicates += 1
    path.write_text("user_id,item_id,time\n" + "".join(f"{user},{item},{moment}\n" for user, item, moment in rows))
    return Log(path, len(rows), rejected, duplicates, users)


class Submission:
    """The command in a process of its own."""

    def __init__(self, command: list[str], environment: Mapping[str, str], output: Path) -> None:
        self.started = time.monotonic()
        self._out, self._err = output.with_suffix(".out"), output.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(command, cwd=_ROOT, env=dict(environment), stdout=out, stderr=err)
        self.driver = psutil.Process(self._process.pid)
        self._family: set[psutil.Process] = set()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def children(self) -> list[psutil.Process]:
        """Everything the driver started, and what that started: Ray's processes and workers."""
        try:
            found = self.driver.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._family.update(found)
        return found

    def wait(self, timeout_s: float = 240.0) -> int:
        """The exit code; -9 where it was killed. Fails where it hangs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.log()}") from None

    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        return json.loads(self._out.read_text().splitlines()[-1])

    def log(self) -> str:
        return f"{self._out.read_text()[-2000:]}\n{self._err.read_text()[-4000:]}"

    def orphans(self) -> list[psutil.Process]:
        """Processes of this submission that still live."""
        return [process for process in self._family if process.is_running() and process.status() != "zombie"]

    def end(self) -> None:
        """Kill whatever is left of it, by process."""
        for process in [*self.children(), *self.orphans(), self.driver]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


@dataclass(frozen=True)
class Command:
    """A job on a workspace: the same each time it is submitted."""

    workspace: str
    words: tuple[str, ...]
    output: Path
    ray_folder: Path
    address: str = ""

    def submit(self, fault: str = "") -> Submission:
        """Start the command; `fault` is a death at a named moment (tests/chaos/faults.py)."""
        program = ["-c", "from tests.chaos.faults import main; main()"] if fault else ["-m", "raypipe.cli.main"]
        shared = ["--workspace", self.workspace, "--tracking", "off", "--cluster.workers", "2"]
        if self.address:
            shared += ["--cluster.address", self.address]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(_ROOT), "RAY_TMPDIR": str(self.ray_folder)}
        self.output.mkdir(parents=True, exist_ok=True)
        number = len(list(self.output.glob("*.out")))
        if fault:
            environment |= {"CHAOS_FAULT": fault, "CHAOS_STRUCK": str(self.struck(number))}
        return Submission([sys.executable, *program, *self.words, *shared], environment, self.output / f"{number}")

    def struck(self, submission: int) -> Path:
        """The file that a fault leaves where it struck."""
        return self.output / f"{submission}.struck"

    def deaths(self) -> list[str]:
        """Units with rows under suspicion, because a worker died with them in its journal."""
        return [entry.path for entry in Store(self.workspace).list("ledger") if "/deaths/" in entry.path]

    def units_done(self) -> int:
        """Receipts in the ledger, of all jobs."""
        return sum("/units/" in entry.path for entry in Store(self.workspace).list("ledger"))


def night_of(log: Log, catalogue: Path, date: str, workspace: str, output: Path, ray_folder: Path) -> Command:
    """One night over a log."""
    options = {
        "date": date,
        "ingest.log.path": log.path,
        "ingest.log.columns.time": "time",
        "ingest.log.split_bytes": log.path.stat().st_size // SPLITS + 100,
        "ingest.buckets": BUCKETS,
        "ingest.catalogue.path": catalogue,
        "summarize.engine.engine": "echo",
        "summarize.micro_batch_users": 4,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return Command(workspace, ("nightly", *words), output, ray_folder)


@dataclass(frozen=True)
class Published:
    """What a reader finds: the night in force, the versions it names, and every row at those versions, by key."""

    date: str
    versions: dict[str, int]
    tables: dict[str, dict[tuple[Any, ...], dict[str, Any]]]

    @staticmethod
    def of(uri: str) -> Published:
        workspace = Workspace(uri)
        night = Nights(workspace.store).current()
        assert night is not None, f"no night is in force in {uri}"
        newest = {name: table.version() for name, table in workspace.tables.items() if table.version() >= 0}
        assert newest == dict(night.tables), "tables moved on without a night"
        # Where nothing was rejected there are no rejects.
        tables = {name: _rows(workspace, name, newest[name]) if name in newest else {} for name in COMPARED}
        return Published(night.date, newest, tables)

    def users(self, table: str) -> set[str]:
        return {row["user_id"] for row in self.tables[table].values()}


def _rows(workspace: Workspace, name: str, version: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    key = [column for column in TABLES[name].key if column not in _RUN_COLUMNS]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in workspace.tables[name].read(version).to_pylist():
        place = tuple(row[column] for column in key)
        assert place not in found, f"{name} holds {place} twice"
        found[place] = {column: value for column, value in row.items() if column not in _RUN_COLUMNS}
    return found


def differences(one: Published, other: Published) -> list[str]:
    """What is not the same, in words; empty where the two are equal row for row and version for version."""
    found = [] if one.date == other.date else [f"night {one.date} / {other.date}"]
    if one.versions != other.versions:
        found.append(f"versions {one.versions} / {other.versions}")
    for name in COMPARED:
        mine, theirs = one.tables[name], other.tables[name]
        for place in sorted(mine.keys() ^ theirs.keys(), key=repr)[:3]:
            found.append(f"{name} {place} is in one only")
        for place in [place for place in mine if place in theirs and mine[place] != theirs[place]][:3]:
            found.append(f"{name} {place}: {mine[place]} / {theirs[place]}")
    return found


def unbalanced(uri: str) -> list[str]:
    """Units and logs whose rows do not add up: rows in = ok + rejected + skipped."""
    workspace = Workspace(uri)
    runs = {entry.path.split("/")[1:3][0]: None for entry in workspace.store.list("ledger")}
    found = []
    for job in runs:
        for run_key in set(workspace.ledger(job).numbers().values()):
            run = workspace.ledger(job).run(run_key)
            found += [f"{job} {unit.name}" for unit, receipt in run.receipts().items() if not receipt.counts.balanced]
    for row in workspace.tables["logs"].read(workspace.tables["logs"].version()).to_pylist():
        parts = ("rows_ok", "rows_rejected", "rows_duplicate", "rows_filtered", "rows_forgotten")
        if row["rows_in"] != sum(row[part] for part in parts):
            found.append(f"log {row}")
    return found


def copy_workspace(source: str, target: str) -> None:
    """Every object but the locks, from one workspace to another, on whatever store."""
    there, here = Store(source), Store(target)
    for entry in there.list(""):
        if not entry.path.startswith("locks/"):
            here.put(entry.path, there.read(entry.path))
