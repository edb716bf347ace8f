"""`raypipe rebucket --buckets N`: split the user buckets of a workspace that grew.

N is a power of two and a multiple of the present number, so that every bucket is split where it lies: a row only moves
to a part of its own bucket. The tables and the workspace's number of buckets change together. After a kill they do so
when the next job completes the change. Nights published before keep the buckets they were published with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from raypipe.config import free
from raypipe.errors import UsageError
from raypipe.pipeline.job import cost_of
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.session import open_session, refuse_open_runs
from raypipe.runtime.units import UnitContext
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import stable_hash
from raypipe.storage.ledger import WHOLE, Counts, Publish, Receipt, Unit, Usage
from raypipe.storage.schemas import TABLES
from raypipe.storage.tables import ABSENT, StagedFile
from raypipe.storage.workspace import Workspace, choose_buckets

JOB = "rebucket"
STEP_VERSION = 1
BUCKETED = tuple(name for name, spec in TABLES.items() if "bucket" in spec.partition_by)


class RebucketConfig(JobConfig):
    """Configuration of `rebucket`."""

    buckets: int | None = free(None, "how many, a power of two; unset: about 5,000 users each", ge=4)


def run_rebucket(config: RebucketConfig) -> JobResult:
    """Split every bucket; see the module.

    Raises UsageError for a number of buckets that cannot be, and while a run is open.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    histories = workspace.tables["histories"]
    with open_session(workspace, JOB, BUCKETED, config.cluster, config.lock_lease_s) as session:
        present = session.info.buckets
        buckets = config.buckets or max(present, choose_buckets(histories.rows(histories.version())))
        _check(buckets, present)
        if buckets == present:
            say(f"{JOB}: there are {buckets} buckets, which is right")
            return JobResult(JOB, "nothing_to_do", metrics={"buckets": buckets})
        refuse_open_runs(workspace, JOB)
        base = session.versions(*BUCKETED)
        recipe = fingerprint({"step": STEP_VERSION, "buckets": buckets})
        run = session.run(recipe, {}, base, WHOLE, {"buckets": buckets})
        units = [Unit("bucket", index) for index in range(present)]
        work = partial(SplitBucket, workspace, base, present, buckets)
        receipts = list(session.phase(run, units, work, JOB).values())
        parts = _parts(workspace, base, receipts)
        rows = {part.table: {"rows": sum(file.rows for file in part.files), "rejected": 0} for part in parts}
        metrics = {
            "buckets_before": present,
            "buckets": buckets,
            "bytes_written": sum(file.size for part in parts for file in part.files),
        }
        cost = cost_of(Usage(), time.monotonic() - started)
        result = JobResult(JOB, "ok", run.run_key, rows, metrics=metrics, cost=cost)
        return session.publish(run, parts, result, buckets)


def _check(buckets: int, present: int) -> None:
    if buckets & (buckets - 1):
        raise UsageError(f"buckets is {buckets}, which is no power of two.", "Use 8, 16, 32, ...")
    if buckets < present:
        raise UsageError(
            f"There are {present} buckets, and {buckets} are fewer.",
            "Buckets are split and never joined; small ones cost little.",
        )


def _parts(workspace: Workspace, base: Mapping[str, int], receipts: Sequence[Receipt]) -> list[Publish]:
    """The new files of every table, to be published. Raises AssertionError if a row is missing."""
    parts = []
    for name, version in base.items():
        if version == ABSENT:
            continue
        files = [file for receipt in receipts for file in receipt.staged.get(name, [])]
        before, after = workspace.tables[name].rows(version), sum(file.rows for file in files)
        assert before == after, f"{name} had {before} rows and would have {after}"
        parts.append(Publish(name, "overwrite", files))
    return parts


class SplitBucket:
    """Splits one bucket of every table into the buckets that it becomes, by the users' hashes."""

    def __init__(self, workspace: Workspace, base: Mapping[str, int], present: int, buckets: int) -> None:
        self.workspace = workspace
        self.base = base
        self.present = present
        self.buckets = buckets

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        staged: dict[str, list[StagedFile]] = {}
        rows = 0
        for name, version in self.base.items():
            table = self.workspace.tables[name]
            for values, files in table.partitions(version, bucket=unit.index):
                found = table.read_files(files, table.spec.columns.names)
                rows += found.num_rows
                places = stable_hash(found["user_id"].combine_chunks()) % np.uint64(self.buckets)
                for bucket in range(unit.index, self.buckets, self.present):
                    mine = found.filter(pa.array(places == bucket))
                    if mine.num_rows:
                        partition = {**values, "bucket": bucket}
                        staged.setdefault(name, []).append(table.stage(mine, context.file_name(), partition))
        counts = Counts(rows, rows)
        assert sum(file.rows for files in staged.values() for file in files) == rows, "a row belongs to another bucket"
        usage = Usage(seconds=time.monotonic() - started)
        return Receipt(unit, counts, usage, staged, attempt=context.attempt)
