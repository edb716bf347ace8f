"""Run units on workers: Ray Data hands units to a pool of actors, and the ledger says which units are left.

Ray's own retries are off. A worker writes an attempt marker before the first row. When its process dies, the driver
finds the unit by that marker, makes the rows of its journal suspects, releases what is reserved of the budget, and
starts the units that are left again. A suspect runs alone; the work rejects a row that killed its process `MAX_DEATHS`
times while it ran alone. Deaths of the driver or of a node do not count. A process in which nothing moves for `stall_s`
seconds ends itself, and counts as dead.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from raypipe.errors import RaypipeError
from raypipe.runtime.budget import Budget
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.memory import WorkingMemory
from raypipe.runtime.metrics import WorkMetrics
from raypipe.runtime.progress import Progress, about, say, speak
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.storage.ledger import MAX_DEATHS, Receipt, Run, Unit, Usage

# Ray gives a node that does not answer 5 chances, 3 s apart; 11 s were seen on 2 cores.
_NODE_VERDICT_S = 30.0
_KILLED = re.compile(r"Actor\(([0-9a-f]+)\)[^\n]*actual memory used=([0-9.]+)GB")
# Ray Data takes about 0.1 s from one task's end to the next one's start (measured). A small unit takes no longer to
# run.
_TASKS_PER_WORKER = 8


class UnitContext:
    """The runner's services for the work on one unit: its attempt, its journal, and its suspects."""

    def __init__(self, run: Run, unit: Unit, attempt: int, stall_s: float) -> None:
        self.run = run
        self.unit = unit
        self.attempt = attempt
        self.stall_s = stall_s
        self.deaths = run.deaths(unit) if attempt > 1 else {}
        self._spent = Usage()

    def journal(self, rows: Sequence[str]) -> None:
        """Record the rows that are about to run, so that a death can be traced to them, and restart the stall timer.

        Pass no rows before work for which no row can be blamed.
        """
        self.run.journal(self.unit, rows)
        _end_after(self.stall_s)

    def spent(self, usage: Usage) -> None:
        """Record what the micro-batch in the journal used. It counts against caps even if this attempt never ends."""
        self._spent = self._spent + usage
        self.run.record_usage(self.unit, self.attempt, self._spent)

    def file_name(self) -> str:
        """A name for staged files that no other attempt uses."""
        return f"{self.run.run_key[:12]}-{self.unit.name}-{self.attempt:04d}"


class UnitWork(Protocol):
    """The work of one phase, built once per worker.

    `run` stages files and returns the receipt; the runner commits it.
    """

    def run(self, unit: Unit, context: UnitContext) -> Receipt: ...


def run_units(
    run: Run,
    units: Sequence[Unit],
    build: Callable[[], UnitWork],
    cluster: ClusterConfig,
    what: str,
    reject_limit: RejectLimit | None = None,
    budget: Budget | None = None,
) -> dict[Unit, Receipt]:
    """Run every unit that has no receipt yet and return all receipts of the phase.

    `budget` is the budget that the work asks, if it has one. Raises RaypipeError if a unit failed (with the worker's
    message), if workers die again and again, or if `reject_limit` is exceeded. Finished units keep their receipts.
    """
    if not units:
        return {}
    kind = units[0].kind
    run.plan(kind, units)
    done = run.receipts(kind)
    progress = Progress(what, len(units), "rows")
    if done:
        say(f"{what}: {len(done)} of {len(units)} units were done before")
        if reject_limit is not None and (undone := reject_limit.undone(done)):
            say(f"{what}: too much was rejected in {len(undone)} of them, which start again")
            run.undo(undone)
            done = {unit: receipt for unit, receipt in done.items() if unit not in undone}
    progress.resume(len(done))
    if all(unit in done for unit in units):
        return {unit: done[unit] for unit in units}
    cluster.connect()
    metrics = WorkMetrics(run.job)
    unexplained = 0
    try:
        while todo := [unit for unit in units if unit not in done]:
            death = None
            metrics.units_left(len(todo))
            if reject_limit is not None:
                reject_limit.count(done.values())
            execution = _execute(run, todo, build, cluster)
            try:
                for receipt in execution:
                    done[receipt.unit] = receipt
                    metrics.units_left(len(units) - len(done))
                    progress.step(receipt.counts.rows_in)
                    unexplained = 0
                    if reject_limit is not None:
                        reject_limit.count([receipt])
                        reject_limit.check()
            except _worker_deaths() as error:
                death = _Death.of(error)
            except RaypipeError:
                execution.close()
                _release_workers()
                raise
            if death is not None:
                _release_workers()
                if budget is not None:
                    budget.release()  # when one worker dies, Ray Data ends all the others
                done = run.receipts(kind)
                if not _account_for_death(run, [unit for unit in todo if unit not in done], death):
                    unexplained += 1
                    _check_explained(unexplained, death)
    finally:
        # Units left after this phase ends must raise no alarm. If the driver is killed, Ray drops the gauge itself.
        metrics.units_left(0)
    return {unit: done[unit] for unit in units}


def _execute(
    run: Run, units: Sequence[Unit], build: Callable[[], UnitWork], cluster: ClusterConfig
) -> Generator[Receipt]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # What Ray Data logs as errors is raised too. A handler that keeps records would keep their tracebacks, and so the
    # actors, alive.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.actor_task_retry_on_errors = False
    context.log_internal_stack_trace = False
    # By default Ray Data restarts a dead actor without end, and it has no named parameter to change that.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    rows = [{"kind": unit.kind, "index": unit.index} for unit in units]
    workers = min(cluster.size(), len(rows))
    tasks = _tasks(len(rows), workers)
    dataset = ray.data.from_items(rows, override_num_blocks=tasks).map_batches(
        _Worker,
        fn_constructor_args=(build, run, cluster.stall_s),
        batch_size=None,
        batch_format="numpy",
        # A task queued behind a busy worker saves the wait for dispatch. With few tasks it would leave another worker
        # idle.
        compute=ActorPoolStrategy(
            size=workers, max_tasks_in_flight_per_actor=2 if tasks >= workers * _TASKS_PER_WORKER else 1
        ),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
        max_restarts=0,
        max_task_retries=0,
    )
    results = dataset.iter_rows()
    for row in results:
        if row["error"]:
            raise RaypipeError(row["error"], row["remedy"])
        yield Receipt.from_json(row["receipt"])


def _release_workers() -> None:
    """Collect garbage, so that the actors of an aborted execution end and release their CPUs.

    Ray Data ends these actors by dropping their handles, but its own exceptions keep the handles in reference cycles.
    Without collection the next execution would wait for their CPUs for ever.
    """
    gc.collect()


def _tasks(units: int, workers: int) -> int:
    """The number of tasks into which the units are cut.

    There are enough to even out their lengths, and few enough not to wait for dispatch.
    """
    return -(-units // max(1, units // (workers * _TASKS_PER_WORKER)))


class _Worker:
    """The actor: it builds the work once, then runs unit after unit and commits each receipt."""

    def __init__(self, build: Callable[[], UnitWork], run: Run, stall_s: float) -> None:
        import ray

        context = ray.get_runtime_context()
        self.run = run
        self.worker = {
            "actor": context.get_actor_id(),
            "node": context.get_node_id(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.build = build
        self.stall_s = stall_s
        self.work: UnitWork | None = None
        self.memory = WorkingMemory()
        self.metrics = WorkMetrics(run.job)
        # A worker's lines go to Ray's log files, which machines read.
        speak("json", job=run.job, run_key=run.run_key)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        for kind, index in zip(batch["kind"], batch["index"], strict=True):
            unit = Unit(str(kind), int(index))
            try:
                yield _row(self._run(unit))
            except RaypipeError as error:
                say("unit failed", "error", unit=unit.name, error=error.problem)
                yield _row(None, error.problem, error.remedy)
                return
            except Exception as error:
                say("unit failed", "error", unit=unit.name, error=repr(error))
                problem = f"Unit {unit.name} failed: {error!r}\n{traceback.format_exc()}"
                yield _row(
                    None,
                    problem,
                    "The run resumes where it stopped when you submit it again; report this if it repeats.",
                )
                return

    def _run(self, unit: Unit) -> Receipt:
        attempt = self.run.begin_attempt(unit, {**self.worker, "started": time.time()})
        with about(unit=unit.name, attempt=attempt):
            say("unit begins")
            receipt = self._work(unit, attempt)
            self.memory.settle()
            say("unit done", **asdict(receipt.counts), **asdict(receipt.usage))
        if self.run.commit(receipt):
            self.metrics.unit_done(receipt)
            return receipt
        return self.run.receipts(unit.kind)[unit]

    def _work(self, unit: Unit, attempt: int) -> Receipt:
        _end_after(self.stall_s)
        try:
            if self.work is None:
                self.work = self.build()
                # Imported modules and what the work holds live to the end. Scanning them again and again in garbage
                # collection took a sixth of the time of a unit of summaries (measured).
                gc.freeze()
            return self.work.run(unit, UnitContext(self.run, unit, attempt, self.stall_s))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _end_after(seconds: float) -> None:
    """End this process in `seconds`, unless it is called again or the unit ends before.

    The process's stacks go to the worker's log. The timer is a C thread, so that code that hangs while it holds
    Python's lock is ended too.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr.fileno())


def _row(receipt: Receipt | None, error: str = "", remedy: str = "") -> dict[str, list[Any]]:
    return {"receipt": [receipt.to_json() if receipt else b""], "error": [error], "remedy": [remedy]}


def _worker_deaths() -> tuple[type[BaseException], ...]:
    """The exceptions that Ray Data raises when a worker's process dies.

    They are imported late, because most nights have nothing to run.
    """
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)


@dataclass(frozen=True, slots=True)
class _Death:
    """What Ray reported of a dead worker.

    The exception itself is not kept, because its traceback keeps the execution it ended alive.
    """

    actors: Sequence[str]
    preempted: bool
    unavailable: bool
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> _Death:
        from ray.exceptions import ActorUnavailableError

        return cls(
            actors=[str(actor)] if (actor := getattr(error, "actor_id", None)) else _killed_for_memory(str(error)),
            preempted=bool(getattr(error, "preempted", False)),
            unavailable=isinstance(error, ActorUnavailableError),
            reason=(str(error).strip().splitlines() or [""])[0][:300],
        )


def _killed_for_memory(told: str) -> list[str]:
    """The actors that Ray's memory monitor killed, the one that used the most memory first.

    Only the text of Ray's message names them. The monitor kills several at once, and the largest is to blame.
    """
    found = [(float(memory), actor) for actor, memory in _KILLED.findall(told)]
    return [actor for _, actor in sorted(found, reverse=True)]


def _account_for_death(run: Run, left: Sequence[Unit], death: _Death) -> bool:
    """Find the unit that the dead worker worked on and make the rows of its journal suspects, unless its node was lost.

    Returns False if the dead worker worked on no unit. Raises RaypipeError if one unit kills every worker it is given.
    """
    markers = {worker["actor"]: (unit, worker) for unit, _, worker in run.attempt_markers(left)}
    for unit, worker in (markers[actor] for actor in death.actors if actor in markers):
        if death.preempted or _lost_node(worker["node"], death):
            say(f"Node {worker['node'][:8]} was lost while it worked on {unit.name}; the unit starts again.")
            return True
        run.record_death(unit)
        say(
            f"A worker died while it worked on {unit.name} (process {worker['pid']} on {worker['host']}); trying again."
        )
        _check_bounded(run, unit)
        return True
    say("A worker died between two units; the units that are left start again.")
    return False


def _lost_node(node: str, death: _Death) -> bool:
    """Whether the worker died because its node did.

    If a process died on a living node, Ray reports that. If a process merely stopped answering, Ray cannot tell until
    the node has missed its heartbeats.
    """
    import ray

    deadline = time.monotonic() + (_NODE_VERDICT_S if death.unavailable else 0.0)
    while any(found["NodeID"] == node and found["Alive"] for found in ray.nodes()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _check_explained(deaths: int, death: _Death) -> None:
    if deaths >= MAX_DEATHS:
        raise RaypipeError(
            f"{deaths} workers in a row died before a unit was done, and it cannot be told of what: {death.reason}",
            "Look at the nodes' memory and at Ray's logs; finished units are kept and the run resumes when you submit it again.",
        )


def _check_bounded(run: Run, unit: Unit) -> None:
    deaths = run.deaths(unit)
    if deaths.get("", 0) >= MAX_DEATHS:
        raise RaypipeError(
            f"Unit {unit.name} killed its worker {MAX_DEATHS} times before any row could be blamed.",
            "The worker probably ran out of memory: give workers more (--cluster.workers lower), or split the work finer "
            "(more buckets); finished units are kept and the run resumes when you submit it again.",
        )
