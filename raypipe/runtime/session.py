"""A job's session in a workspace: locks, recovery of interrupted publishes, the run, and its publish.

All crash points are: before the manifest (nothing happened); between units (receipts stand); before `publish.json`
(staged files wait for the resubmission); after it (any later job completes the publish); between two tables' commits
(each commit is recognised by its application transaction); before `done.json` (all commits are recognised, and only the
result is written).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.budget import Budget, Limits
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import about, note, say
from raypipe.runtime.publishing import bucket_parts, complete, output_table, recover, rows_of, write_locks
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.units import UnitWork, run_units
from raypipe.storage.fingerprint import fingerprint, schema_hash
from raypipe.storage.ledger import WHOLE, Publish, Receipt, Run, Unit, Usage, counts_of, usage_of
from raypipe.storage.locks import LEASE_S, Lock, check_held, hold
from raypipe.storage.night_runs import NightRuns, settle_all
from raypipe.storage.workspace import Workspace, WorkspaceInfo


class Session:
    """A job that holds the locks of the tables it writes. `night` is set if the job is a step of a night."""

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
        """The workspace's info, which does not change while its locks are held.

        Raises UsageError for an empty workspace.
        """
        return self.workspace.require_info()

    def versions(self, *tables: str) -> dict[str, int]:
        """The newest versions of the tables, to be pinned."""
        return {name: self.workspace.tables[name].version() for name in tables}

    def is_current(self, recipe: str, pins: Mapping[str, int]) -> bool:
        """Whether the output of the newest run over all users is still current, so that there is nothing to do.

        That run must have this recipe and must have left nothing undone. The tables that it read and wrote, the tables
        in `pins` among them, must still be at the versions that it read and wrote.
        """
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
        """The run of this recipe over these inputs: the open run that a killed job left, or a new one.

        `pins` are the input versions that all units read. `base` are the versions of the tables that the run will
        write. `scope` is "all" or the hash of a canary's users. Open runs of other keys are given up, because their
        inputs or their recipe changed. A warning says so if they had finished units.
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
            # A finished run of this key, of any night, is replaced by the new one, so its results are noted before.
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
        """Publish the finished buckets of killed runs over all users that can no longer resume.

        They cannot resume because what they read has changed. Publishing saves computing, and paying for, their users
        who have not changed. The result's status is `interrupted`.

        A run of another variant is published whatever its recipe is, because this job is about to change the tables
        under it. A run of this variant is published only if it has this recipe. Units that `reject_limit` would start
        again are left out. Nothing is published if the rows it would replace have changed since the run began. Use it
        in jobs whose units are buckets of users and whose runs record their variant.
        """
        ledger = self.workspace.ledger(self.job)
        if ledger.open(_run_key(recipe, self.versions(*reads), self.versions(*writes), WHOLE)) is not None:
            return  # this run resumes
        for run in reversed(list(ledger.open_runs(WHOLE))):  # oldest first, the order of their transaction numbers
            mine = run.manifest["facts"]["variant"]
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
        counts, usage = counts_of(kept), usage_of(kept)  # no seconds: they are summed over workers, not wall-clock time
        metrics = {"users": counts.rows_in, "computed": counts.ok, "rejected": counts.rejected, **counts.skipped}
        cost = {"calls": usage.calls, "tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}
        rows = rows_of(parts, counts.rejected)
        self.publish(run, parts, JobResult(self.job, "interrupted", run.run_key, rows, {}, metrics, cost))

    def _are_current(self, receipt: Receipt) -> bool:
        """Whether the schemas of what a unit staged are today's schemas."""
        return all(
            staged_as == schema_hash(self.workspace.tables[table].spec.schema)
            for table, staged_as in receipt.schemas.items()
        )

    def budget(self, limits: Limits, run: Run) -> Budget:
        """The budget that the caps leave.

        All attempts of the run count as spent. In a night, all runs of this job in that night count.
        """
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

        Raises RaypipeError if the receipts of an older raypipe staged files with another schema.
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
        """Commit all tables and finish the run. Returns the result with the tables' versions.

        `rejects` is committed first, then the other tables in the given order. If `buckets` is given, it becomes the
        workspace's number of buckets. Raises RaypipeError if a staged file is missing or truncated, or if a lock's
        lease was lost.
        """
        self.check_held()
        # Check before the intent is written, because a run with an intent can no longer be given up.
        for part in parts:
            output_table(self.workspace, part.table, run.manifest["scope"], run.run_key).check_staged(part.files)
        self.check_held()  # checking many files takes longer than a lease
        run.intend_publish(parts, result.to_dict(), buckets)
        final = JobResult.from_dict(complete(self.workspace, run))
        if self._night is not None:
            self._night.settle()
        return final

    def check_held(self) -> None:
        """Raise RaypipeError if the lease of one of the locks was lost.

        Call it before anything is written under the locks.
        """
        check_held(self._locks)


def _run_key(recipe: str, pins: Mapping[str, int], base: Mapping[str, int], scope: str) -> str:
    return fingerprint({"recipe": recipe, "pins": dict(pins), "base": dict(base), "scope": scope})


def refuse_open_runs(workspace: Workspace, job: str) -> None:
    """Raise UsageError if another job's run is open.

    An open run pins versions, and no version names its staged files yet.
    """
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
    """Open a session: check the workspace, take the locks, and complete publishes that killed runs began.

    `scope` is that of the run. Raises UsageError if the workspace cannot be written, UnavailableError if a lock is
    held, and RaypipeError if recovery changed the workspace's number of buckets.
    """
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
