"""A phase that rejects too much is stopped, and what it costs to know that grows with its units."""

from __future__ import annotations

import pytest

from raypipe.errors import RaypipeError
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.storage.ledger import Counts, Receipt, Unit


def receipt(index: int, ok: int, rejected: int, **reasons: str) -> Receipt:
    return Receipt(Unit("users", index), Counts(ok + rejected, ok, rejected), facts={"reasons": reasons})


def test_more_rejects_than_the_limit_stop_the_phase_and_each_unit_counts_once() -> None:
    limit = RejectLimit(0.2)
    limit.count([receipt(0, 90, 10, empty_output="Nothing.")])
    for _ in range(20):  # after a death all receipts are read once more
        limit.count([receipt(0, 90, 10), receipt(1, 0, 5, refused="HTTP 400.")])
        limit.check()
    limit.count([receipt(2, 0, 15)])
    with pytest.raises(
        RaypipeError, match=r"30 of the first 120 rows .* 20%\. empty_output: Nothing\. refused: HTTP 400\."
    ):
        limit.check()


def test_a_handful_of_rejects_stops_nothing() -> None:
    limit = RejectLimit(0.2)
    limit.count([receipt(0, 0, 9)])
    limit.check()
    assert limit.undone({Unit("users", 0): receipt(0, 0, 9)}) == []


def test_of_a_phase_that_was_stopped_the_units_start_again_that_rejected_too_much() -> None:
    found = {one.unit: one for one in (receipt(0, 30, 1), receipt(1, 5, 20))}
    assert RejectLimit(0.2).undone(found) == [Unit("users", 1)]
    assert RejectLimit(0.9).undone(found) == []


def test_receipts_are_added_up_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = Counts.__add__

    def counted(one: Counts, other: Counts) -> Counts:
        added.append(other)
        return add(one, other)

    monkeypatch.setattr(Counts, "__add__", counted)
    limit = RejectLimit(0.2)
    for index in range(300):
        limit.count([receipt(index, 10, 0)])
        limit.check()
    assert len(added) == 300
