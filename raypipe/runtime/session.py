"""One job's stay in a workspace: locks, recovery of what a killed run began to publish, the run, and the publish.

Crash points, all of them: before the manifest (nothing happened), between units (receipts stand), before `publish.json`
(staged files wait for the resubmission), after it (any later job completes it), between two tables' commits (each is
recognised by its application transaction), before `done.json` (all tables are recognised; only the result is written).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from raypipe.errors import RaypipeError, UnavailableError, UsageError
from raypipe.runtime.budget import Budget, Limits
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import about, note, say
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.units import UnitWork, run_units
from raypipe.storage.fingerprint import fingerprint, schema_hash
from raypipe.storage.ledger import WHOLE, Publish, Receipt, Run, Unit, Usage, counts_of, usage_of
from raypipe.storage.locks import LEASE_S, Lock, check_held, hold
from raypipe.storage.night_runs import NightRuns, settle_all
from raypipe.storage.tables import Table
from raypipe.storage.workspace import Workspace, WorkspaceInfo

# Rejects are shared by all jobs and written for a moment at the end, as tables are that one job commits together: wait for the
# other job's moment.
_COMMITS_WAIT_S = 60.0
_POLL_S = 0.2


class Session:
    """A job that holds the locks of the tables it writes; of a `night` where it is one of its steps."""

    def __init__(
        self,
        workspace: Workspace,
        job: str,
        cluster: ClusterConfig,
        locks: Sequence[Lock],
        night: NightRuns | None = None,
    ) -> None:
        self.workspace = workspace
        self.job = job
        self.cluster = cluster
        self._locks = locks
        self._night = night
        self._resumes = False
        self.calls_before = 0
        """Model calls of the last phase that an earlier submission of its run has made, in units that were done."""

    @cached_property
    def info(self) -> WorkspaceInfo:
        """The workspace's, which nobody changes while its locks are held; raises UsageError for an empty one."""
        return self.workspace.require_info()

    def versions(self, *tables: str) -> dict[str, int]:
        """The newest versions of tables, to pin."""
        return {name: self.workspace.tables[name].version() for name in tables}

    def is_current(self, recipe: str, pins: Mapping[str, int]) -> bool:
        """Whether the newest run over everything is of this recipe, read these very versions and left nothing undone, and its
        output stands."""
        last = self.workspace.ledger(self.job).newest()
        result = last.result() if last is not None else None
        if last is None or result is None or result["status"] not in {"ok", "nothing_to_do"}:
            return False
        manifest = last.manifest
        after = {name: table["version"] for name, table in result["tables"].items()}
        expected = {**manifest["pins"], **manifest["base"], **after}
        return (
            manifest["recipe"] == recipe
            and not any(result["metrics"].get(left) for left in ("capped", "unfinished"))
            and self.versions(*expected) == expected
            and set(pins) <= set(expected)
        )

    def run(
        self, recipe: str, pins: Mapping[str, int], base: Mapping[str, int], scope: str, facts: Mapping[str, Any]
    ) -> Run:
        """The run of this recipe over these inputs: the one a killed job left open, or a new one.

        `pins` are the input versions no unit reads beyond, `base` the versions of the tables it will write, `scope` is
        "all" or the hash of a canary's users. An open run of another key is given up, and told where units of it were done: its
        inputs moved on, or its recipe.
        """
        ledger = self.workspace.ledger(self.job)
        key = _run_key(recipe, pins, base, scope)
        note(run_key=key)
        if (run := ledger.open(key)) is not None:
            say(f"{self.job}: resuming run {key[:12]}")
            self._resumes = True
        else:
            for other in list(ledger.open_runs(scope)):
                if other.publish_intent() is None:
                    self._give_up(other, key)
            # A finished run of this key, of whichever night it was, makes room for the new one.
            settle_all(self.workspace.store)
            published = max(self.workspace.tables[table].published_number(f"{table}:{self.job}") for table in base)
            manifest = {"recipe": recipe, "pins": dict(pins), "base": dict(base), "scope": scope, "facts": dict(facts)}
            run = ledger.start(key, {**manifest, "created": time.time()}, at_least=published + 1)
        if self._night is not None:
            self._night.add(run)
        return run

    def _give_up(self, run: Run, successor: str) -> None:
        if lost := run.receipts():
            say(
                f"{self.job}: run {run.run_key[:12]}, which has not ended, is given up for one of other inputs or options, and with it "
                f"{len(lost)} finished units of {usage_of(lost.values()).calls:,} model calls",
                "warning",
            )
        run.abandon(f"run {successor} took its place")

    def keep_finished(
        self,
        recipe: str,
        variant: str,
        reads: Sequence[str],
        writes: Sequence[str],
        reject_limit: RejectLimit | None = None,
    ) -> None:
        """Publish what a killed run over everything has finished, where what it read has moved on since, so that it cannot go on:
        its users who have not changed are not computed, and paid for, again. Its result is told as `interrupted`.

        So too that of another variant than this job's, whatever its recipe, for what is written now moves the tables under it; one of
        this variant only where it is of this recipe. For jobs whose units are buckets of users and whose runs tell their variant.
        Without the units that `reject_limit` would start again, and only where the rows that it would replace stand as it found them.
        """
        ledger = self.workspace.ledger(self.job)
        if ledger.open(_run_key(recipe, self.versions(*reads), self.versions(*writes), WHOLE)) is not None:
            return  # it goes on
        for run in reversed(list(ledger.open_runs(WHOLE))):  # as their transactions are numbered
            mine = run.manifest["facts"].get("variant", "")
            if run.publish_intent() is None and (mine != variant or run.manifest["recipe"] == recipe):
                why = (
                    "what it read has changed since" if mine == variant else f"another variant than {mine} is made now"
                )
                self._keep(run, mine, why, writes, reject_limit)

    def _keep(self, run: Run, variant: str, why: str, writes: Sequence[str], reject_limit: RejectLimit | None) -> None:
        tables = self.workspace.tables
        if any(
            tables[name].paths(before, variant=variant) != tables[name].paths(tables[name].version(), variant=variant)
            for name, before in run.manifest["base"].items()
        ):
            return
        receipts = run.receipts("users")
        undone = set() if reject_limit is None else set(reject_limit.undone(receipts))
        kept = [receipt for unit, receipt in receipts.items() if unit not in undone and self._are_current(receipt)]
        if not (parts := bucket_parts(kept, variant, writes)):
            return
        say(
            f"{self.job}: run {run.run_key[:12]} was killed and {why}; the {len(kept)} of {run.planned().get('users', 0)} buckets of "
            "users that it finished are published"
        )
        counts, usage = counts_of(kept), usage_of(kept)  # whose seconds are of all workers together, and no clock's
        metrics = {"users": counts.rows_in, "computed": counts.ok, "rejected": counts.rejected, **counts.skipped}
        cost = {"calls": usage.calls, "tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}
        rows = rows_of(parts, counts.rejected)
        self.publish(run, parts, JobResult(self.job, "interrupted", run.run_key, rows, {}, metrics, cost))

    def _are_current(self, receipt: Receipt) -> bool:
        """Whether what a unit staged has the schemas of today."""
        return all(
            staged_as == schema_hash(self.workspace.tables[table].spec.schema)
            for table, staged_as in receipt.schemas.items()
        )

    def budget(self, limits: Limits, run: Run) -> Budget:
        """What the caps leave, of which all attempts of the run have spent, and in a night all its runs of this job."""
        if not limits.any:
            return Budget(limits, Usage())
        self.cluster.connect()
        return Budget(limits, run.spent("users") if self._night is None else self._night.spent(self.job))

    def phase(
        self,
        run: Run,
        units: Sequence[Unit],
        build: Callable[[], UnitWork],
        what: str,
        reject_limit: RejectLimit | None = None,
        budget: Budget | None = None,
    ) -> dict[Unit, Receipt]:
        """Run the units that are left on the cluster; see `run_units`.

        Raises RaypipeError where receipts of an older raypipe staged files of another schema.
        """
        before = run.receipts(units[0].kind) if self._resumes and units else {}
        receipts = run_units(run, units, build, self.cluster, what, reject_limit, budget)
        for receipt in receipts.values():
            if not self._are_current(receipt):
                raise RaypipeError(
                    f"Run {run.run_key[:12]} was begun by a raypipe whose tables {', '.join(receipt.schemas)} had other schemas.",
                    f"Give it up with `raypipe status --discard {run.run_key[:12]}` and submit again.",
                )
        self.calls_before = usage_of(old for unit, old in before.items() if receipts.get(unit) == old).calls
        return receipts

    def publish(self, run: Run, parts: Sequence[Publish], result: JobResult, buckets: int | None = None) -> JobResult:
        """Commit all tables and finish the run; `rejects` first, then in the order given. Returns the result with the tables'
        versions.

        With `buckets` the workspace has so many from then on.
        """
        self.check_held()
        # Before the intent, for a run with one can no longer be given up.
        for part in parts:
            output_table(self.workspace, part.table, run.manifest["scope"], run.run_key).check_staged(part.files)
        self.check_held()  # looking at many files takes longer than a lease
        run.intend_publish(parts, result.to_dict(), buckets)
        final = JobResult.from_dict(complete(self.workspace, run))
        if self._night is not None:
            self._night.settle()
        return final

    def check_held(self) -> None:
        """Raise RaypipeError where the lease of one of the locks was lost, before anything is written under it."""
        check_held(self._locks)


def _run_key(recipe: str, pins: Mapping[str, int], base: Mapping[str, int], scope: str) -> str:
    return fingerprint({"recipe": recipe, "pins": dict(pins), "base": dict(base), "scope": scope})


def bucket_parts(receipts: Iterable[Receipt], variant: str, tables: Sequence[str]) -> list[Publish]:
    """What units of user buckets staged: each table's touched buckets of `variant` replaced, rejects appended."""
    touched = [receipt for receipt in receipts if receipt.staged]
    buckets: list[dict[str, str | int]] = [{"variant": variant, "bucket": receipt.unit.index} for receipt in touched]
    return [
        Publish(
            table,
            "append" if table == "rejects" else "overwrite",
            [file for receipt in touched for file in receipt.staged.get(table, [])],
            [] if table == "rejects" else buckets,
        )
        for table in ("rejects", *tables)
        if any(receipt.staged.get(table) for receipt in touched)
    ]


def rows_of(parts: Iterable[Publish], rejected: int) -> dict[str, dict[str, int]]:
    """The `tables` of a result that publishes these parts."""
    return {part.table: {"rows": sum(file.rows for file in part.files), "rejected": rejected} for part in parts}


def write_locks(job: str, scope: str, tables: Iterable[str]) -> list[str]:
    """What a run holds that writes the tables: their locks. A canary's tables are its own, and it holds one of its users, so that
    nobody makes the same twice."""
    return sorted(tables) if scope == WHOLE else [f"canary-{job}-{scope[:12]}"]


def refuse_open_runs(workspace: Workspace, job: str) -> None:
    """Raises UsageError where another job's run is open: it pins versions, and its staged files are no version's yet."""
    runs = [run for run in workspace.open_runs() if run.job != job]
    if runs:
        named = ", ".join(f"{run.job} {run.run_key[:12]}" for run in runs)
        raise UsageError(
            f"{job} waits for runs that are open: {named}.",
            "Submit their jobs again to complete them, or give them up with `raypipe status --discard KEY`.",
        )


@contextlib.contextmanager
def open_session(
    workspace: Workspace,
    job: str,
    writes: Sequence[str],
    cluster: ClusterConfig,
    lease_s: float = LEASE_S,
    night: NightRuns | None = None,
    scope: str = WHOLE,
) -> Iterator[Session]:
    """Check the workspace, take the locks, complete what killed runs began to publish. `scope` is that of the run."""
    workspace.info()
    workspace.store.check_writable()
    names = write_locks(job, scope, writes)
    with about(job=job), hold(workspace.store, names, job, lease_s) as locks:
        before = workspace.info()
        recover(workspace, job, set(names))
        if workspace.info() != before:
            raise RaypipeError(
                "The workspace was being split into more buckets when it was left, which is completed now.",
                "Submit the same command again.",
            )
        yield Session(workspace, job, cluster, locks, night)


def recover(workspace: Workspace, job: str, held: set[str]) -> None:
    """Complete every publish that a killed run began, of any job, so that no job reads half of it.

    Raises UnavailableError where a living job holds what it takes for longer than commits do.
    """
    for name in workspace.store.folders("ledger"):
        for run in list(workspace.ledger(name).publishing()):
            intent = run.publish_intent()
            assert intent is not None, "an intent stays as it was written"
            tables = {part.table for part in intent[0]} - {"rejects"}
            locks = set(write_locks(name, run.manifest["scope"], tables)) - held
            _complete_once_free(workspace, run, sorted(locks), f"{job} (completing {name})")


def _complete_once_free(workspace: Workspace, run: Run, locks: Sequence[str], owner: str) -> None:
    """Whoever holds the locks may be the run's own job, which is alive and ends, or another that completes it."""
    deadline = time.monotonic() + _COMMITS_WAIT_S
    while run.result() is None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold(workspace.store, locks, owner))
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
            else:
                if run.result() is None:
                    say(f"{run.job}: completing the publish of run {run.run_key[:12]}, which was interrupted")
                    complete(workspace, run)
                return
        time.sleep(_POLL_S)


def settled_versions(workspace: Workspace, *tables: str) -> dict[str, int] | None:
    """The newest versions of tables, where no job is between its commits of them: they belong together as it left them.

    Waits for a publish that is under way; None where it stays so, as that of a killed run does until a session completes it.
    """
    deadline = time.monotonic() + _COMMITS_WAIT_S
    while True:
        versions = {name: workspace.tables[name].version() for name in tables}
        if not _is_publishing(workspace, tables):
            # A publish may have ended since the first of these versions was read.
            if all(workspace.tables[name].version() == version for name, version in versions.items()):
                return versions
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(_POLL_S)


def _is_publishing(workspace: Workspace, tables: Sequence[str]) -> bool:
    """Whether a run that began to publish one of the tables has not ended."""
    for job in workspace.store.folders("ledger"):
        for run in workspace.ledger(job).publishing():
            intent = run.publish_intent()
            assert intent is not None, "an intent stays as it was written"
            if run.manifest["scope"] == WHOLE and any(part.table in tables for part in intent[0]):
                return True
    return False


def complete(workspace: Workspace, run: Run) -> dict[str, Any]:
    """Carry out a written publish intent; what is already committed is left alone. Returns the run's result."""
    intent = run.publish_intent()
    assert intent is not None, "only a written intent can be completed"
    parts, result = intent
    number = run.number
    versions: dict[str, int] = {}
    places: Counter[str] = Counter()
    for part in sorted(parts, key=lambda part: part.table != "rejects"):
        # One transaction replaces partitions along one column: a table may need several.
        places[part.table] += 1
        app = f"{part.table}:{run.job}" + (f":{places[part.table]}" if places[part.table] > 1 else "")
        table = output_table(workspace, part.table, run.manifest["scope"], run.run_key)
        lock = hold(workspace.store, ["rejects"] if part.table == "rejects" else [], run.job, wait_s=_COMMITS_WAIT_S)
        with lock:
            versions[part.table] = table.publish(
                part.files,
                mode=part.mode,
                app=app,
                number=number,
                replaces=part.replaces,
                metadata={"raypipe.run_key": run.run_key, "raypipe.job": run.job},
            )
    if (buckets := run.intended_buckets()) is not None:
        workspace.record_buckets(buckets)
    tables = {name: {"version": version, **result["tables"].get(name, {})} for name, version in versions.items()}
    final = {**result, "tables": tables}
    run.finish(final)
    return final


def output_table(workspace: Workspace, name: str, scope: str, run_key: str) -> Table:
    """The table a run writes: the workspace's own, or for a canary one below `canary/<run_key>` that nobody reads."""
    table = workspace.tables[name]
    if scope == WHOLE:
        return table
    return Table(workspace.store, table.spec, folder=f"canary/{run_key}/{name}")
