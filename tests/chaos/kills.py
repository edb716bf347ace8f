"""Kills at points drawn from a seed, and the resubmissions after them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import psutil

from tests.chaos.nights import Command, Submission

# Every moment between two steps of a night at which a death could leave something half done.
DRIVER_FAULTS = (
    "driver before ledger/ingest/*/manifest.json",
    "driver after ledger/ingest/*/manifest.json",
    "driver before ledger/ingest/*/publish.json",
    "driver after ledger/ingest/*/publish.json",
    "driver after tables/rejects",
    "driver after tables/items",
    "driver after tables/histories",
    "driver after tables/logs",
    "driver after ledger/ingest/*/done.json",
    "driver before ledger/summarize/*/manifest.json",
    "driver before ledger/summarize/*/publish.json",
    "driver after ledger/summarize/*/publish.json",
    "driver after tables/block_summaries",
    "driver after tables/summaries",
    "driver after ledger/summarize/*/done.json",
    "driver before nights/2*.json",
    "driver before nights/current.json",
    "driver after nights/current.json",
)
WORKER_FAULTS = (
    "raylet after ledger/summarize/*/journal/* 2",
    "worker after staging/*/spill/*",
    "worker after tables/histories/*",
    "worker after tables/block_summaries/*",
    "worker after tables/summaries/*",
    "worker before ledger/*/units/split-*",
    "worker before ledger/*/units/bucket-*",
    "worker before ledger/*/units/users-*",
    "worker after ledger/*/units/*",
    "worker after ledger/summarize/*/journal/*",
)
# Two helpers of Ray that, when their raylet is killed, take a minute to give up on its dead head (measured). They touch nothing.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")
_MOST_SUBMISSIONS = 6
_POLL_S = 0.02


@dataclass(frozen=True)
class Kill:
    """SIGKILL of the driver, of one worker or of the raylet: `units` receipts into the submission, `seconds` later.

    Points counted in units fall into the work whatever the machine's speed; the others, with `units` 0, anywhere.
    """

    target: str
    units: int
    seconds: float

    def __str__(self) -> str:
        place = f"after {self.units} units " if self.units else "after start "
        return f"{self.target} {place}+ {self.seconds:.2f} s"

    def strike(self, command: Command, submission: Submission, rng: random.Random) -> bool:
        """Wait for the point, then for the target to be there, and kill it; False where the command ended before."""
        goal = command.units_done() + self.units
        while self.units and command.units_done() < goal:
            if submission.ended:
                return False
            time.sleep(0.1)
        deadline = time.monotonic() + self.seconds
        while not submission.ended:
            victims = self._victims(submission)
            if victims and time.monotonic() >= deadline:
                try:
                    rng.choice(victims).kill()
                except psutil.NoSuchProcess:
                    continue
                return True
            time.sleep(_POLL_S)
        return False

    def _victims(self, submission: Submission) -> list[psutil.Process]:
        children = submission.children()
        if self.target == "driver":
            return [submission.driver]
        return sorted((child for child in children if _role(child) == self.target), key=lambda process: process.pid)


def _role(process: psutil.Process) -> str:
    try:
        if process.name() == "raylet":
            return "raylet"
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "gone"
    title = " ".join(words)
    if title.startswith("ray::MapWorker"):
        return "worker"
    return "agent" if any(name in title for name in _AGENTS) else "other"


@dataclass
class Ordeal:
    """What a command went through."""

    struck: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def submissions(self) -> int:
        return len(self.codes)


def survive(command: Command, kills: list[Kill | str], rng: random.Random) -> Ordeal:
    """Submit the command, kill it at each point in turn, and submit it again until it ends well.

    A string is a fault: it needs a submission of its own. After a worker's death the same submission has to go on.
    """
    ordeal = Ordeal()
    submissions: list[Submission] = []
    left = list(kills)
    try:
        while True:
            fault = left.pop(0) if left and isinstance(left[0], str) else ""
            assert isinstance(fault, str)
            number = len(submissions)
            submission = command.submit(fault)
            submissions.append(submission)
            must_end_well = True
            while not fault and left and isinstance(left[0], Kill):
                kill = left.pop(0)
                if not kill.strike(command, submission, rng):
                    ordeal.missed.append(str(kill))
                    break
                ordeal.struck.append(str(kill))
                must_end_well = kill.target == "worker"
                if not must_end_well:
                    break
            while not submission.ended:
                submission.children()
                time.sleep(0.1)
                assert time.monotonic() - submission.started < 300, f"hangs:\n{submission.log()}"
            code = submission.wait()
            ordeal.codes.append(code)
            if fault:
                hit = command.struck(number).exists()
                (ordeal.struck if hit else ordeal.missed).append(fault)
                must_end_well = not hit or fault.startswith("worker") or bool(command.address)
            if code == 0:
                ordeal.statuses.append(submission.result()["status"])
                if not left:
                    break
            assert code == 0 or not must_end_well, f"exit code {code}:\n{submission.log()}"
            assert len(submissions) < _MOST_SUBMISSIONS + len(kills), f"no end:\n{submission.log()}"
        ordeal.orphans = _orphans(submissions)
        return ordeal
    finally:
        for submission in submissions:
            submission.end()


def _orphans(submissions: list[Submission]) -> list[str]:
    """What killed submissions left running, after a moment to notice that they are alone."""
    deadline = time.monotonic() + 20
    while True:
        alive = [process for submission in submissions for process in submission.orphans()]
        found = [process for process in alive if _role(process) not in {"agent", "gone"}]
        if not found or time.monotonic() > deadline:
            return [" ".join(process.cmdline()) for process in found]
        time.sleep(0.2)
