"""Micro-batches with a real journal, ledger and budget: what runs in which company, what is named, granted and given back."""

from __future__ import annotations

import faulthandler
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from raypipe.pipeline.micro_batches import run_micro_batches
from raypipe.pipeline.rejects import WORKER_DIED
from raypipe.runtime.budget import Budget, Limits
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import MAX_DEATHS, Ledger, Run, Unit, Usage
from raypipe.storage.store import Store

UNIT = Unit("bucket", 0)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield Ledger(Store(str(tmp_path / "workspace")), "summarize").start("key", {"scope": "all"})
    # The clock that ends a worker which hangs, and would end this process.
    faulthandler.cancel_dump_traceback_later()


def died(run: Run, *rows: str, times: int = 1) -> None:
    for _ in range(times):
        run.journal(UNIT, rows)
        run.record_death(UNIT)
    run.journal(UNIT, [])


@dataclass(frozen=True)
class Answer:
    """Implements `Result`."""

    row: int
    reason: str = ""
    message: str = ""
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Job:
    """Rows r0, r1, … of these weights. A call of a row's weight takes 1 of the `bound` that are reserved, 10 prompt tokens and 2 of
    the answer. `events` tells what was asked of it, with the journal at that time."""

    def __init__(self, run: Run, weights: Sequence[int], bound: int = 1, unit: Unit = UNIT) -> None:
        self.names = [f"r{row}" for row in range(len(weights))]
        self.weights, self.bound = weights, bound
        self.context = UnitContext(run, unit, attempt=2, stall_s=600)
        self.events: list[tuple[str, list[str] | None]] = []
        self.ran: list[list[int]] = []
        self.poison = -1

    def work(self, budget: Budget, size: int, alike: Callable[[int], int] = lambda row: 0) -> dict[int, Answer]:
        return run_micro_batches(
            self.names,
            size,
            self.context,
            budget,
            read=self._read,
            weigh=self._weigh,
            most=self._most,
            run=self._run,
            rejected=Answer,
            alike=alike,
        )

    def _note(self, event: str) -> None:
        run, unit = self.context.run, self.context.unit
        journal = run.store.get(f"{run.folder}/journal/{unit.name}.json")
        self.events.append((event, None if journal is None else json.loads(journal)))

    def _read(self, rows: list[int]) -> tuple[int, ...]:
        self._note("read")
        return tuple(rows)

    def _weigh(self, rows: tuple[int, ...]) -> int:
        self._note("weigh")
        return sum(self.weights[row] for row in rows)

    def _most(self, weight: int) -> Usage:
        self._note(f"most {weight}")
        return Usage(weight * self.bound, weight * self.bound * 10, weight * self.bound * 2)

    def _run(self, rows: tuple[int, ...]) -> list[Answer]:
        self._note("run")
        assert self.poison not in rows, "poison"
        self.ran.append(list(rows))
        return [Answer(row, "", "", *(self.weights[row] * each for each in (1, 10, 2))) for row in rows]


class WatchedBudget(Budget):
    """`asked` has the calls of everything it was asked to grant."""

    def __init__(self, limits: Limits, spent: Usage) -> None:
        super().__init__(limits, spent)
        self.asked: list[int] = []

    def take(self, most: Usage) -> bool:
        self.asked.append(most.calls)
        return super().take(most)


def no_caps() -> Budget:
    return Budget(Limits(), Usage())


def test_rows_are_named_in_the_journal_before_they_run_and_after_what_is_built_for_all(run: Run) -> None:
    job = Job(run, [1] * 5)
    results = job.work(no_caps(), size=2)
    assert job.events == [
        ("read", None),
        ("most 0", None),
        ("run", ["r0", "r1"]),
        ("read", ["r0", "r1"]),
        ("most 0", ["r0", "r1"]),
        ("run", ["r2", "r3"]),
        ("read", ["r2", "r3"]),
        ("most 0", ["r2", "r3"]),
        ("run", ["r4"]),
    ]
    assert list(results) == [0, 1, 2, 3, 4]
    assert results[3] == Answer(3, "", "", 1, 10, 2)


def test_without_rows_nothing_is_built_or_named(run: Run) -> None:
    job = Job(run, [])
    assert job.work(no_caps(), size=2) == {}
    assert job.events == []


def test_suspects_run_alone_and_first_and_who_died_alone_before_the_others(run: Run) -> None:
    died(run, "r1", "r2")
    died(run, "r2", times=MAX_DEATHS - 1)
    job = Job(run, [1] * 6)
    results = job.work(no_caps(), size=3)
    assert job.ran == [[2], [1], [0, 3, 4], [5]]
    assert [journal for event, journal in job.events if event == "run"][:2] == [["r2"], ["r1"]]
    assert list(results) == [2, 1, 0, 3, 4, 5]
    assert not any(result.reason for result in results.values())


def test_the_deaths_of_a_poison_row_repeat_nobodys_answers(run: Run) -> None:
    answered = []
    # In company, then alone after the suspects before it, and from then on before everybody.
    for _ in range(1 + MAX_DEATHS):
        job = Job(run, [1] * 60)
        job.poison = 7
        with pytest.raises(AssertionError, match="poison"):
            job.work(no_caps(), size=5)
        answered.append([row for rows in job.ran for row in rows])
        run.record_death(UNIT)
    assert answered == [[0, 1, 2, 3, 4], [5, 6], [], []]
    job = Job(run, [1] * 60)
    assert job.work(no_caps(), size=5)[7] == Answer(7, *WORKER_DIED)
    assert sum(map(len, job.ran)) == 59


def test_who_died_too_often_is_rejected_without_being_run_or_named(run: Run) -> None:
    died(run, "r0", "r1", "r2")
    died(run, "r1", times=MAX_DEATHS)
    job = Job(run, [1] * 4)
    results = job.work(no_caps(), size=4)
    assert job.ran == [[0], [2], [3]]
    assert list(results) == [1, 0, 2, 3]
    assert results[1] == Answer(1, *WORKER_DIED)
    assert all("r1" not in (journal or []) for _, journal in job.events)


def test_where_all_died_too_often_nothing_is_built(run: Run) -> None:
    died(run, "r0", times=MAX_DEATHS)
    job = Job(run, [1])
    assert job.work(no_caps(), size=4) == {0: Answer(0, *WORKER_DIED)}
    assert job.events == []


def test_rows_that_are_alike_go_together_and_suspects_before_all_of_them(run: Run) -> None:
    died(run, "r1", "r6")
    job = Job(run, [1] * 7)
    lengths = [20, 5, 20, 10, 20, 10, 10]
    assert list(job.work(no_caps(), size=2, alike=lengths.__getitem__)) == [1, 6, 3, 5, 0, 2, 4]
    assert job.ran == [[1], [6], [3, 5], [0, 2], [4]]


@pytest.mark.usefixtures("ray_cluster")
def test_a_cap_that_does_not_do_for_a_micro_batch_halves_it_until_one_row_is_refused(run: Run) -> None:
    budget = WatchedBudget(Limits(calls=7), Usage())
    job = Job(run, [1] * 12)
    results = job.work(budget, size=4)
    assert job.ran == [[0, 1, 2, 3], [4, 5], [6]]
    # Of the next four two are granted and one, the last one is refused; after a refusal it is asked whether 1 could be had.
    assert budget.asked == [4, 4, 1, 2, 2, 1, 1, 1, 1]
    assert list(results) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("ray_cluster")
def test_what_was_not_used_is_given_back_and_the_ledger_is_told_what_was(run: Run) -> None:
    budget = Budget(Limits(calls=10), Usage())
    job = Job(run, [1] * 8, bound=3)
    assert len(job.work(budget, size=2)) == 8
    # 6 are reserved for two rows and 2 used; after the third two, 4 are left.
    assert job.ran == [[0, 1], [2, 3], [4, 5], [6], [7]]
    assert run.spent("bucket") == Usage(8, 80, 16)
    assert not budget.take(Usage(3))
    assert budget.take(Usage(2))


def test_what_a_micro_batch_took_is_in_the_ledger_although_a_later_one_ends_the_attempt(run: Run) -> None:
    job = Job(run, [1, 2, 4, 8])
    job.poison = 3
    with pytest.raises(AssertionError, match="poison"):
        job.work(no_caps(), size=1)
    assert job.ran == [[0], [1], [2]]
    assert job.events[-1] == ("run", ["r3"])
    assert run.spent("bucket") == Usage(7, 70, 14)


@pytest.mark.usefixtures("ray_cluster")
def test_as_much_as_was_refused_is_not_asked_for_again_and_smaller_rows_go_on_while_anything_is_left(run: Run) -> None:
    budget = WatchedBudget(Limits(calls=6), Usage())
    job = Job(run, [3, 5, 4, 7, 4, 2, 1, 1, 1])
    results = job.work(budget, size=1)
    assert list(results) == [0, 5, 6]
    # 3 of 6; 5 refused, but 1 could be had; 4 refused, 1 could be had; not 7 or 4; 2 and 1; then 1 is refused, and no more.
    assert budget.asked == [3, 5, 1, 4, 1, 2, 1, 1, 1]
    assert [event for event, _ in job.events].count("weigh") == 8


@pytest.mark.usefixtures("ray_cluster")
def test_after_the_deadline_nothing_runs(run: Run) -> None:
    budget = WatchedBudget(Limits(deadline=time.time() - 1), Usage())
    job = Job(run, [1] * 100)
    assert job.work(budget, size=2) == {}
    assert (job.ran, budget.asked) == ([], [2, 1])


@pytest.mark.usefixtures("ray_cluster")
def test_whatever_the_caps_and_the_deaths_no_row_runs_twice_and_no_more_is_spent(run: Run) -> None:
    rng = random.Random(7)
    cap, spent, missed = 400, 0, 0
    budget = Budget(Limits(calls=cap), Usage())
    for number in range(30):
        unit, count = Unit("bucket", number), rng.randrange(1, 30)
        job = Job(run, [rng.randrange(1, 6) for _ in range(count)], bound=rng.randrange(1, 4), unit=unit)
        suspects = rng.sample(range(count), min(count, rng.randrange(4)))
        deaths = {row: rng.randrange(MAX_DEATHS + 1) for row in suspects}
        job.context.deaths = {f"r{row}": times for row, times in deaths.items()}
        results = job.work(budget, size=rng.randrange(1, 9))
        ran = [row for rows in job.ran for row in rows]
        assert set(Counter(ran).values()) <= {1}
        rejected = {row for row, result in results.items() if result.reason}
        assert rejected <= {row for row, times in deaths.items() if times >= MAX_DEATHS}
        assert rejected.isdisjoint(ran)
        assert {*ran, *rejected} == set(results)
        assert all(len(rows) == 1 for rows in job.ran if deaths.keys() & set(rows))
        assert [row in deaths for row in ran] == sorted((row in deaths for row in ran), reverse=True)
        spent += sum(job.weights[row] for row in ran)
        assert spent <= cap
        missed += len(results) < count
    assert 0 < missed < 30
    # What was left is less than three times the heaviest row: the largest bound there was.
    assert cap - 3 * 5 < spent
