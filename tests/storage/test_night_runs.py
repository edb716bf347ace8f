"""What a night spends: all its runs over all its submissions, whatever became of them, until it is over."""

from __future__ import annotations

import pytest

from raypipe.storage.ledger import WHOLE, Counts, Ledger, Receipt, Run, Unit, Usage
from raypipe.storage.night_runs import NightRun, NightRuns, settle_all
from raypipe.storage.nights import Nights
from raypipe.storage.store import Store

UNIT = Unit("users", 0)
DONE = {"status": "ok", "metrics": {"computed": 1}, "tables": {}}


@pytest.fixture
def store(workspace_uri: str) -> Store:
    return Store(workspace_uri)


def begun(store: Store, night: NightRuns, key: str, job: str = "summarize", calls: int = 0) -> Run:
    """A run of the night that has spent so many calls in an attempt which has not ended."""
    run = Ledger(store, job).start(key, {"scope": WHOLE})
    night.add(run)
    run.record_usage(UNIT, run.begin_attempt(UNIT, {}), Usage(calls, 10 * calls, calls))
    return run


def test_runs_count_that_ended_that_were_given_up_and_that_are_open(store: Store) -> None:
    night = NightRuns(store, "2026-01-05")
    assert (night.all(), night.spent("summarize")) == ([], Usage())
    ended, given_up, opened = (begun(store, night, key, calls=calls) for key, calls in (("a", 3), ("b", 5), ("c", 7)))
    begun(store, night, "d", "explain", 100)
    ended.commit(Receipt(UNIT, Counts(), Usage(2, 20, 2), attempt=2))
    ended.finish(DONE)
    given_up.abandon("its inputs moved on")
    assert night.spent("summarize") == Usage(3 + 2 + 5 + 7, 170, 17)
    assert [run.result for run in night.all()] == [None, DONE, None, None]
    # Whoever reads it, in a later submission too, finds the same.
    opened.record_usage(UNIT, 1, Usage(8, 80, 8))
    assert NightRuns(store, "2026-01-05").spent("summarize").calls == 18
    assert NightRuns(store, "2026-01-06").all() == []
    night.close()
    assert (night.all(), Nights(store).dates()) == ([], [])


def test_what_a_run_spent_stays_counted_when_the_ledger_forgets_it(store: Store) -> None:
    night = NightRuns(store, "2026-01-05")
    trimmed, restarted = begun(store, night, "a", calls=3), begun(store, night, "b", calls=5)
    for run in (trimmed, restarted):
        run.finish(DONE)
    night.settle()
    trimmed.trim()
    begun(store, night, "b", calls=20)
    kept = Usage(3, 30, 3), Usage(5, 50, 5), Usage(20, 200, 20)
    assert night.all() == [
        NightRun("summarize", "a", kept[0], DONE),
        NightRun("summarize", "b", kept[1], DONE),
        NightRun("summarize", "b", kept[2], None),
    ]


def test_what_a_run_spent_that_was_given_up_stays_counted_when_the_ledger_forgets_it(store: Store) -> None:
    night = NightRuns(store, "2026-01-05")
    given_up = begun(store, night, "a", calls=900)
    given_up.abandon("discarded by hand")
    settle_all(store)
    given_up.trim()
    assert (night.spent("summarize").calls, night.all()[0].result) == (900, None)
    Ledger(store, "summarize").drop(given_up.number, "a")
    assert night.spent("summarize").calls == 900
