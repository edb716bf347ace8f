"""Units on a real Ray of two workers: every unit ends with a receipt, whatever dies on the way."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray

from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.budget import Budget, Limits
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.units import UnitContext, run_units
from raypipe.storage.ledger import MAX_DEATHS, Counts, Ledger, Receipt, Run, Unit, Usage
from raypipe.storage.store import Store

# Ray's workers have no path to the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("ray_cluster")
TWO = ClusterConfig(workers=2)
ROWS = [f"row{n}" for n in range(6)]


class Rows:
    """Runs six rows in micro-batches of three; `trace` notes every row run.

    `poison` kills the process it runs in, or where it `hangs` never ends, in code that does not let go of Python's lock.
    """

    def __init__(self, trace: Path, poison: str = "", hangs: bool = False) -> None:
        self.trace = trace
        self.poison = poison
        self.hangs = hangs

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        rejected = []
        rest = [row for row in ROWS if row not in context.deaths]
        for batch in [rest[:3], rest[3:], *([row] for row in ROWS if row in context.deaths)]:
            if batch and context.deaths.get(batch[0], 0) >= MAX_DEATHS:
                rejected += batch
                continue
            context.journal(batch)
            for row in batch:
                with self.trace.open("a") as file:
                    file.write(f"{unit.name} {row} {os.getpid()}\n")
                if f"{unit.name} {row}" == self.poison:
                    if self.hangs:
                        ctypes.PyDLL(None).sleep(1000)
                    os.kill(os.getpid(), signal.SIGKILL)
        facts = {"rejected": rejected, "name": context.file_name()}
        return Receipt(unit, Counts(6, 6 - len(rejected), len(rejected)), facts=facts, attempt=context.attempt)


class WaitsForCompany:
    """Ends once units of two different processes have met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        (self.folder / f"pid-{os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("pid-*"))) < 2:
            assert time.monotonic() < deadline, "no second worker came"
            time.sleep(0.05)
        return Receipt(unit, Counts(1, 1))


class DiesAtOnce:
    """Kills its process before it names a row."""

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class DiesBesideABusyOne:
    """Unit 0 kills its process, once, while unit 1 runs in another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        if unit.index == 1:
            (self.folder / "busy").touch()
            time.sleep(1)
        elif context.attempt == 1:
            while not (self.folder / "busy").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return Receipt(unit, Counts(1, 1))


class DiesWithAllThatIsLeft:
    """Reserves ten calls; the first attempt ends its process with them."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        granted = self.budget.take(Usage(10))
        if context.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Receipt(unit, Counts(1, 1), facts={"granted": granted})


class DiesBesideOneThatReserved:
    """At first both units reserve five calls; then unit 0 ends its process, and later wants ten."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        self.folder = folder
        self.budget = budget

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        granted = True
        if context.attempt == 1:
            assert self.budget.take(Usage(5))
            DiesBesideABusyOne(self.folder).run(unit, context)
        elif unit.index == 0:
            granted = self.budget.take(Usage(10))
        return Receipt(unit, Counts(1, 1), facts={"granted": granted})


class DiesWhileItIsBuilt:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        raise AssertionError


class DiesWhereItArrives:
    """Kills every process but the driver's that reads it."""

    def __init__(self, driver: int) -> None:
        self.driver = driver
        if os.getpid() != driver:
            os.kill(os.getpid(), signal.SIGKILL)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.driver,)

    def __call__(self) -> DiesWhereItArrives:
        return self

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        raise AssertionError


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        if unit.index == 1:
            raise self.error
        return Receipt(unit, Counts(1, 1))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Ledger(Store(str(tmp_path / "workspace")), "test").start("k" * 32, {"scope": "all"})


def units(count: int) -> list[Unit]:
    return [Unit("bucket", index) for index in range(count)]


def go(run: Run, count: int, build: Callable, cluster: ClusterConfig = TWO) -> dict[Unit, Receipt]:
    return run_units(run, units(count), build, cluster, "test")


def traced(trace: Path) -> list[list[str]]:
    return [line.split() for line in trace.read_text().splitlines()] if trace.exists() else []


def test_two_workers_run_units_at_the_same_time(run: Run, tmp_path: Path) -> None:
    assert len(go(run, 2, partial(WaitsForCompany, tmp_path))) == 2


def test_every_unit_gets_its_receipt(run: Run, tmp_path: Path) -> None:
    receipts = go(run, 8, partial(Rows, tmp_path / "trace"))
    assert list(receipts) == units(8)
    assert receipts == run.receipts()
    lines = traced(tmp_path / "trace")
    assert len(lines) == 48
    assert run.planned() == {"bucket": 8}
    assert {receipt.facts["name"] for receipt in receipts.values()} == {
        f"kkkkkkkkkkkk-bucket-{n:06d}-0001" for n in range(8)
    }


def test_work_begins_though_not_every_worker_finds_a_place(run: Run, tmp_path: Path) -> None:
    receipts = go(run, 8, partial(Rows, tmp_path / "trace"), ClusterConfig(workers=6))
    assert [receipts[Unit("bucket", index)].counts for index in range(8)] == [Counts(6, 6)] * 8


def test_a_resumed_run_runs_only_the_units_without_a_receipt(run: Run, tmp_path: Path) -> None:
    for index in (0, 2):
        run.commit(Receipt(Unit("bucket", index), Counts(1, 1), facts={"from": "before"}))
    receipts = go(run, 4, partial(Rows, tmp_path / "trace"))
    assert {unit for unit, _, _ in traced(tmp_path / "trace")} == {"bucket-000001", "bucket-000003"}
    assert receipts[Unit("bucket", 0)].facts == {"from": "before"}
    assert len(receipts) == 4


def test_nothing_to_run_starts_no_worker(run: Run, tmp_path: Path) -> None:
    assert go(run, 0, partial(Rows, tmp_path / "trace")) == {}
    run.commit(Receipt(Unit("bucket", 0), Counts(1, 1)))
    assert list(go(run, 1, DiesWhileItIsBuilt)) == [Unit("bucket", 0)]


def test_a_row_that_kills_its_process_is_rejected_after_three_deaths_alone_and_no_other_is(
    run: Run, tmp_path: Path, capsys
) -> None:
    trace = tmp_path / "trace"
    receipts = go(run, 3, partial(Rows, trace, poison="bucket-000001 row4"))
    assert {unit.index: receipt.facts["rejected"] for unit, receipt in receipts.items()} == {0: [], 1: ["row4"], 2: []}
    assert receipts[Unit("bucket", 1)].counts == Counts(6, 5, 1)
    # Once in company, which makes suspects of its batch, then alone until it is out.
    assert run.deaths(Unit("bucket", 1)) == {"row3": 0, "row4": MAX_DEATHS, "row5": 0}
    assert sum(line[:2] == ["bucket-000001", "row4"] for line in traced(trace)) == 1 + MAX_DEATHS
    assert receipts[Unit("bucket", 1)].attempt == 2 + MAX_DEATHS
    assert "A worker died while it worked on bucket-000001" in capsys.readouterr().err


def test_a_row_that_hangs_is_rejected_like_one_that_kills_and_no_other_is(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    cluster = ClusterConfig(workers=2, stall_s=1.0)
    receipts = go(run, 3, partial(Rows, trace, "bucket-000001 row4", hangs=True), cluster)
    assert {unit.index: receipt.facts["rejected"] for unit, receipt in receipts.items()} == {0: [], 1: ["row4"], 2: []}
    assert sum(line[:2] == ["bucket-000001", "row4"] for line in traced(trace)) == 1 + MAX_DEATHS


def test_a_death_gives_the_other_workers_back_though_python_never_collects(run: Run, tmp_path: Path) -> None:
    gc.disable()
    try:
        go(run, 2, partial(DiesBesideABusyOne, tmp_path))
        deadline = time.monotonic() + 40
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources().get("CPU") == 2
    finally:
        gc.enable()


def test_what_a_worker_that_died_had_reserved_is_there_for_the_next_attempt(run: Run) -> None:
    budget = Budget(Limits(calls=10), Usage())
    receipts = run_units(run, units(1), partial(DiesWithAllThatIsLeft, budget), TWO, "test", budget=budget)
    assert receipts[Unit("bucket", 0)].facts == {"granted": True}


def test_a_death_gives_back_what_the_other_workers_had_reserved_too(run: Run, tmp_path: Path) -> None:
    budget = Budget(Limits(calls=10), Usage())
    build = partial(DiesBesideOneThatReserved, tmp_path, budget)
    receipts = run_units(run, units(2), build, TWO, "test", budget=budget)
    assert receipts[Unit("bucket", 0)].facts == {"granted": True}


def test_a_unit_that_dies_three_times_before_it_names_a_row_is_a_clear_error(run: Run) -> None:
    with pytest.raises(
        RaypipeError, match=r"bucket-000000 killed its worker 3 times before any row could be blamed"
    ) as caught:
        go(run, 1, DiesAtOnce)
    assert "resumes when you submit it again" in caught.value.remedy
    assert run.deaths(Unit("bucket", 0)) == {"": 3}


def test_a_worker_that_dies_while_its_work_is_built_ends_the_same_way(run: Run) -> None:
    with pytest.raises(RaypipeError, match="killed its worker 3 times"):
        go(run, 1, DiesWhileItIsBuilt)


def test_an_exception_in_the_work_names_its_unit_and_the_others_keep_their_receipts(run: Run) -> None:
    with pytest.raises(RaypipeError, match=r"Unit bucket-000001 failed: ZeroDivisionError\('division by zero'\)"):
        go(run, 2, partial(Raises, ZeroDivisionError("division by zero")), ClusterConfig(workers=1))
    assert list(run.receipts()) == [Unit("bucket", 0)]


def test_a_problem_the_work_explains_reaches_the_driver_in_its_own_words(run: Run) -> None:
    with pytest.raises(RaypipeError) as caught:
        go(run, 2, partial(Raises, RaypipeError("The disk is full.", "Free some.")))
    assert (caught.value.problem, caught.value.remedy) == ("The disk is full.", "Free some.")


def test_workers_read_and_commit_on_an_object_store(s3_uri: str, tmp_path: Path) -> None:
    run = Ledger(Store(s3_uri), "test").start("k" * 32, {"scope": "all"})
    assert len(go(run, 3, partial(Rows, tmp_path / "trace"))) == 3
    assert len(run.receipts("bucket")) == 3


def test_errors_keep_problem_and_remedy_on_their_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UsageError("What happened.", "What to do.")))
    assert (error.problem, error.remedy, error.exit_code) == ("What happened.", "What to do.", 2)


def test_as_many_workers_as_the_cluster_has_cpus_unless_told_otherwise() -> None:
    assert ClusterConfig().size() == 2
    assert ClusterConfig(cpus_per_worker=0.5).size() == 4
    assert ClusterConfig(cpus_per_worker=5).size() == 1
    assert ClusterConfig(workers=3).size() == 3
    assert ClusterConfig(gpus_per_worker=1).size() == 1


def test_the_first_seconds_show_no_progress_and_later_ones_rate_and_time_left() -> None:
    from raypipe.runtime.progress import Progress

    progress = Progress("summarize", 10, "rows")
    progress.resume(2)
    for _ in range(3):
        progress.step(50)
    assert progress.line(progress._started + 10) == "summarize: 5/10  15 rows/s  0:17 left"
    assert progress.line(time.monotonic()).startswith("summarize: 5/10")


def test_deaths_that_nothing_explains_end_the_phase(run: Run) -> None:
    """The process goes before it says what it works on."""
    with pytest.raises(RaypipeError, match=f"{MAX_DEATHS} workers in a row died before a unit was done"):
        go(run, 2, DiesWhereItArrives(os.getpid()))
