"""The ledger: receipts once, attempts, journals and deaths, numbers that only grow, publishes that roll forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from raypipe.storage.ledger import Counts, Ledger, Publish, Receipt, Run, Unit, Usage
from raypipe.storage.store import Store
from raypipe.storage.tables import StagedFile

UNIT = Unit("bucket", 3)
MANIFEST = {"recipe": "r", "pins": {}, "base": {}, "scope": "all", "created": 0}


@pytest.fixture
def ledger(workspace_uri: str) -> Ledger:
    return Ledger(Store(workspace_uri), "ingest")


@pytest.fixture
def run(ledger: Ledger) -> Run:
    return ledger.start("key-1", MANIFEST)


def test_a_receipt_comes_back_as_it_was_committed(run: Run) -> None:
    file = StagedFile("bucket=3/x.parquet", 10, 2, "ab", {"bucket": "3"})
    receipt = Receipt(
        UNIT,
        Counts(5, 2, 1, {"duplicate": 2}),
        Usage(3, 100, 20, 0.5),
        {"histories": [file]},
        {"histories": "hash"},
        {"users": 2, "title": "naïve – 日本"},
        2,
    )
    assert run.commit(receipt)
    assert run.receipts() == {UNIT: receipt}


def test_the_first_receipt_of_a_unit_stands(run: Run) -> None:
    assert run.commit(Receipt(UNIT, Counts(1, 1)))
    assert not run.commit(Receipt(UNIT, Counts(2, 2)))
    assert run.receipts()[UNIT].counts == Counts(1, 1)


def test_a_receipt_that_lost_a_row_is_never_committed(run: Run) -> None:
    with pytest.raises(AssertionError, match="lost rows"):
        run.commit(Receipt(UNIT, Counts(5, 2, 1, {"duplicate": 1})))
    assert run.receipts() == {}


def test_receipts_are_told_apart_by_phase(run: Run) -> None:
    for unit in (Unit("split", 0), Unit("bucket", 1), Unit("bucket", 0)):
        run.commit(Receipt(unit, Counts()))
    assert list(run.receipts("bucket")) == [Unit("bucket", 0), Unit("bucket", 1)]
    assert set(run.receipts()) == {Unit("split", 0), Unit("bucket", 0), Unit("bucket", 1)}


def test_counts_and_usage_add_up_by_kind() -> None:
    total = Counts(5, 2, 1, {"duplicate": 2}) + Counts(3, 1, 0, {"filtered": 2})
    assert total == Counts(8, 3, 1, {"duplicate": 2, "filtered": 2})
    assert total.balanced
    assert Usage(1, 2, 3, 4.0) + Usage(1, 1, 1, 1.0) == Usage(2, 3, 4, 5.0)


def test_attempts_are_numbered_from_one_and_the_newest_names_its_worker(run: Run) -> None:
    assert run.begin_attempt(UNIT, {"pid": 1}) == 1
    assert run.begin_attempt(UNIT, {"pid": 2}) == 2
    assert run.attempt_markers([UNIT, Unit("bucket", 9)]) == [(UNIT, 2, {"pid": 2})]


def test_attempts_that_begin_at_once_get_different_numbers(run: Run) -> None:
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda n: run.begin_attempt(UNIT, {"pid": n}), range(6)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_a_death_in_company_only_makes_suspects(run: Run) -> None:
    run.journal(UNIT, ["a", "b"])
    for _ in range(3):
        run.record_death(UNIT)
    assert run.deaths(UNIT) == {"a": 0, "b": 0}


def test_a_death_alone_counts(run: Run) -> None:
    run.journal(UNIT, ["a", "b"])
    run.record_death(UNIT)
    run.journal(UNIT, ["b"])
    run.record_death(UNIT)
    run.record_death(UNIT)
    assert run.deaths(UNIT) == {"a": 0, "b": 2}
    assert run.deaths(Unit("bucket", 4)) == {}


def test_a_death_without_a_journal_is_counted_under_no_name(run: Run) -> None:
    run.record_death(UNIT)
    run.record_death(UNIT)
    assert run.deaths(UNIT) == {"": 2}


def test_what_an_earlier_attempt_was_doing_has_no_part_in_a_later_death(run: Run) -> None:
    run.begin_attempt(UNIT, {"pid": 1})
    run.journal(UNIT, ["a"])
    run.record_death(UNIT)
    for _ in range(2):
        run.begin_attempt(UNIT, {"pid": 2})
        run.record_death(UNIT)
    assert run.deaths(UNIT) == {"a": 1, "": 2}
    run.journal(UNIT, ["b"])
    run.journal(UNIT, [])
    run.record_death(UNIT)
    assert run.deaths(UNIT) == {"a": 1, "": 3}


def test_a_plan_tells_the_units_of_every_phase(run: Run) -> None:
    run.plan("split", [Unit("split", 0)])
    run.plan("bucket", [Unit("bucket", index) for index in range(4)])
    assert run.planned() == {"split": 1, "bucket": 4}


def test_what_was_spent_counts_once_whether_an_attempt_ended_or_not(run: Run) -> None:
    other = Unit("bucket", 4)
    run.record_usage(UNIT, 1, Usage(1, 10, 1))
    run.record_usage(UNIT, 1, Usage(3, 30, 3))  # killed
    run.record_usage(UNIT, 2, Usage(5, 50, 5))
    run.commit(Receipt(UNIT, Counts(), Usage(6, 60, 6, 0.5), attempt=2))
    run.record_usage(other, 1, Usage(100, 1000, 100))
    run.commit(Receipt(Unit("bucket", 5), Counts(), Usage(7)))
    run.record_usage(Unit("split", 0), 1, Usage(10_000))
    assert run.spent("bucket") == Usage(116, 1060 + 30, 109, 0.5)
    assert run.spent("split") == Usage(10_000)
    assert run.spent("users") == Usage()


def test_run_numbers_only_grow(ledger: Ledger) -> None:
    numbers = []
    for key in ("a", "b", "a", "c"):
        run = ledger.start(key, MANIFEST)
        numbers.append(run.number)
        run.finish({"status": "ok"})
    assert numbers == [1, 2, 3, 4]
    assert ledger.start("d", MANIFEST, at_least=9).number == 9
    assert ledger.numbers() == {1: "a", 2: "b", 3: "a", 4: "c", 9: "d"}


def test_a_run_of_a_finished_key_starts_from_nothing(ledger: Ledger) -> None:
    run = ledger.start("a", MANIFEST)
    run.commit(Receipt(UNIT, Counts(1, 1)))
    run.finish({"status": "ok"})
    again = ledger.start("a", MANIFEST)
    assert (again.receipts(), again.result()) == ({}, None)


def test_a_start_killed_before_its_manifest_keeps_its_number(ledger: Ledger, run: Run) -> None:
    ledger.store.put("ledger/ingest/runs/00000002.json", b'{"run_key": "key-2"}')
    assert ledger.start("key-2", MANIFEST).number == 2
    ledger.store.put("ledger/ingest/runs/00000003.json", b'{"run_key": "key-3"}')
    assert ledger.start("key-4", MANIFEST).number == 4


def test_a_restart_killed_before_its_manifest_finds_nothing_of_the_run_before(ledger: Ledger, run: Run) -> None:
    run.commit(Receipt(UNIT, Counts()))
    run.finish({"status": "ok"})
    ledger.store.delete(["ledger/ingest/key-1/manifest.json"])  # how far the killed restart came
    again = ledger.start("key-1", MANIFEST, at_least=2)
    assert (again.number, again.receipts(), again.result()) == (2, {}, None)


def test_a_run_is_open_until_it_is_finished(ledger: Ledger, run: Run) -> None:
    assert ledger.open("no such key") is None
    found = ledger.open("key-1")
    assert found is not None
    assert found.manifest["run_key"] == "key-1"
    run.finish({"status": "ok", "title": "é"})
    assert ledger.open("key-1") is None
    assert run.result() == {"status": "ok", "title": "é"}


def test_finishing_a_run_clears_its_staging_folder_only(run: Run) -> None:
    run.store.put(f"{run.staging}/spill/x.arrow", b"-")
    run.store.put("staging/other/x.arrow", b"-")
    run.finish({"status": "ok"})
    assert [entry.path for entry in run.store.list("staging")] == ["staging/other/x.arrow"]


def test_the_newest_run_is_the_newest_with_a_manifest(ledger: Ledger, run: Run) -> None:
    # Killed between taking its number and writing its manifest.
    ledger.store.create(f"ledger/ingest/runs/{2:08d}.json", b'{"run_key":"dead"}')
    newest = ledger.newest()
    assert newest is not None
    assert newest.run_key == "key-1"
    assert ledger.start("key-2", MANIFEST).number == 3
    assert Ledger(ledger.store, "summarize").newest() is None


def test_a_publish_intent_comes_back_as_it_was_written(run: Run) -> None:
    assert run.publish_intent() is None
    file = StagedFile("bucket=3/x.parquet", 10, 2, "ab", {"bucket": "3"})
    parts = [Publish("rejects", "append", [file]), Publish("histories", "overwrite", [file], [{"bucket": 3}])]
    run.intend_publish(parts, {"status": "ok"})
    intent = run.publish_intent()
    assert intent is not None
    assert [(part.table, part.mode, list(part.files), list(part.replaces)) for part in intent[0]] == [
        ("rejects", "append", [file], []),
        ("histories", "overwrite", [file], [{"bucket": 3}]),
    ]
    assert intent[1] == {"status": "ok"}


def test_a_run_that_began_to_publish_cannot_be_given_up(run: Run) -> None:
    run.intend_publish([], {})
    with pytest.raises(AssertionError, match="only be completed"):
        run.abandon("test")
    assert run.result() is None


def test_an_abandoned_run_says_why(run: Run) -> None:
    run.abandon("its inputs moved on")
    assert run.result() == {"status": "abandoned", "why": "its inputs moved on"}
