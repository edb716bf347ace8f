"""What finished runs of an engine tell for a plan: how fast it was, and how long its answers were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.storage.workspace import Workspace

_MOST = 5


@dataclass(frozen=True)
class PastRun:
    """Calls per second of the wall clock (`rate`), and generated tokens per call (`answer`)."""

    rate: float
    answer: float


def past_runs(workspace: Workspace, job: str, engine: str) -> list[PastRun]:
    """The newest finished runs of the job with this engine that called a model at all; five at most."""
    ledger, found = workspace.ledger(job), []
    for _, key in sorted(ledger.numbers().items(), reverse=True):
        run = ledger.run(key)
        if (result := run.result()) is None or run.manifest["facts"]["engine"] != engine:
            continue
        cost = result.get("cost", {})
        calls = cost.get("calls", 0)
        # The seconds of a run that was resumed are those of its last submission, so only the calls of that one count.
        if (fresh := calls - cost.get("calls_before", 0)) and cost.get("seconds"):
            found.append(PastRun(fresh / cost["seconds"], cost.get("tokens_out", 0) / calls))
        if len(found) == _MOST:
            break
    return found


def seconds_of(calls: int, past: Sequence[PastRun]) -> dict[str, int | None]:
    """The seconds that so many calls take by the median of the past runs, and by the fastest and the slowest of them.

    All are None if there are no past runs.
    """
    if not past:
        return {"seconds": None, "seconds_least": None, "seconds_most": None}
    rates = [run.rate for run in past]
    found = {"seconds": float(np.median(rates)), "seconds_least": max(rates), "seconds_most": min(rates)}
    return {name: round(calls / rate) for name, rate in found.items()}
