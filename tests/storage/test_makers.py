"""Which runs made what is published: the newest of a variant, and those before it where it was killed."""

from __future__ import annotations

import pytest

from raypipe.storage.ledger import Ledger
from raypipe.storage.makers import all_makers, makers
from raypipe.storage.retention import runs_to_drop
from raypipe.storage.store import Store


@pytest.fixture
def ledger(workspace_uri: str) -> Ledger:
    return Ledger(Store(workspace_uri), "recommend")


def ran(ledger: Ledger, key: str, variant: str | None, status: str | None = "ok", scope: str = "all") -> None:
    facts = {} if variant is None else {"facts": {"variant": variant}}
    run = ledger.start(key, {"recipe": key, "pins": {}, "base": {}, "scope": scope, "created": 0, **facts})
    if status == "abandoned":
        run.abandon("another took its place")
    elif status is not None:
        run.finish({"status": status})


def keys(ledger: Ledger, variant: str) -> list[str]:
    return [run.run_key for run in makers(ledger, variant)]


def test_the_newest_run_of_a_variant_that_ended_made_its_rows(ledger: Ledger) -> None:
    ran(ledger, "a", "recommend-sasrec")
    ran(ledger, "b", "recommend-sasrec", "nothing_to_do")
    ran(ledger, "other", "recommend-gru4rec")
    ran(ledger, "without", None)
    ran(ledger, "canary", "recommend-sasrec", scope="c" * 32)
    ran(ledger, "given up", "recommend-sasrec", "abandoned")
    ran(ledger, "open", "recommend-sasrec", None)
    assert keys(ledger, "recommend-sasrec") == ["b"]
    assert keys(ledger, "recommend-gru4rec") == ["other"]
    assert keys(ledger, "recommend-dreamrec") == []
    assert [run.run_key for run in all_makers(ledger)] == ["other", "b"]


def test_beside_a_killed_run_of_which_some_buckets_were_published_those_before_it_count(ledger: Ledger) -> None:
    for key, status in (("a", "ok"), ("b", "ok"), ("c", "interrupted"), ("d", "interrupted")):
        ran(ledger, key, "recommend-sasrec", status)
    assert keys(ledger, "recommend-sasrec") == ["d", "c", "b"]


def test_a_run_that_made_what_is_published_stays_in_the_ledger(ledger: Ledger) -> None:
    ran(ledger, "older", "recommend-sasrec")
    ran(ledger, "maker", "recommend-sasrec")
    for number in range(4):
        ran(ledger, f"night {number}", "recommend-gru4rec")
    assert [key for _, key in runs_to_drop(ledger, 2)] == ["older", "night 0", "night 1"]
