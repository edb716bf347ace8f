"""The result of jobs over buckets of users."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from raypipe.pipeline.job import cost_of
from raypipe.runtime.budget import Limits
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import rows_of
from raypipe.runtime.session import Session
from raypipe.storage.ledger import Publish, Receipt, Run, counts_of, usage_of


def users_result(
    session: Session,
    run: Run,
    receipts: Collection[Receipt],
    parts: Sequence[Publish],
    limits: Limits,
    started: float,
    figures: Mapping[str, Any] | None = None,
    rows: str = "users",
) -> JobResult:
    """The result of a run that publishes `parts`.

    `rows` names what the run counts, `figures` are further metrics of its job, and `started` is on the monotonic clock.
    The cost is that of all submissions, except for its seconds, which are those of the last one. `calls_before` is how
    many of the calls were made before the last one.
    """
    counts, usage = counts_of(receipts), usage_of(receipts)
    if capped := counts.skipped.get("capped"):
        say(f"{session.job}: a cap or the deadline left {capped:,} {rows} for the next run")
    metrics: dict[str, Any] = {
        rows: counts.rows_in,
        "computed": counts.ok,
        "rejected": counts.rejected,
        **counts.skipped,
        "stale": sum(receipt.facts["stale"] for receipt in receipts),
        **(figures or {}),
        "bytes_written": sum(file.size for part in parts for file in part.files),
    }
    cost = {**cost_of(usage, time.monotonic() - started), "money": round(limits.money(usage), 6)}
    if session.calls_before:
        cost["calls_before"] = session.calls_before
    status = "ok" if parts else "nothing_to_do"
    return JobResult(session.job, status, run.run_key, rows_of(parts, counts.rejected), metrics=metrics, cost=cost)
