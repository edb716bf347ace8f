"""Ingest on a real Ray: every row accounted for, every log once, whatever comes late, twice, tied or unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raypipe.storage.tombstones import tombstone_rows
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.pipeline.small_logs import (
    DAY,
    START,
    balanced,
    expected_histories,
    histories_of,
    newest,
    random_events,
    write_catalogue,
    write_log,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")
TIME = ("--log.columns.time", "time")
ORDER = ("--log.columns.order", "place")


def keys_of(uri: str) -> dict[str, str]:
    rows = newest(uri, "histories")
    return dict(zip(rows["user_id"].to_pylist(), rows["history_key"].to_pylist(), strict=True))


def test_two_nights_of_logs_equal_the_plain_reference_and_the_same_log_again_is_nothing(
    raypipe: Run, workspace_uri: str, files: Path
) -> None:
    first = random_events(1, users=30, items=40, events=400)
    log = write_log(files / "monday.csv", first)
    catalogue = write_catalogue(files / "items.csv", 40)
    words = ("ingest", "--workspace", workspace_uri, *TIME, "--log.split_bytes", 4000, "--cluster.workers", 2)

    monday = raypipe(*words, "--log.path", log, "--catalogue.path", catalogue)
    assert (monday.code, monday.status) == (0, "ok")
    assert histories_of(workspace_uri) == expected_histories(first)
    assert monday.metrics["rows_in"] == len(first)
    assert monday.metrics["events_added"] == sum(map(len, expected_histories(first).values()))
    assert balanced(monday.metrics)
    assert monday.metrics["users"] == len(expected_histories(first))

    renamed = log.rename(files / "copy.csv")
    again = raypipe(*words, "--log.path", renamed, "--catalogue.path", catalogue)
    assert (again.code, again.status) == (0, "nothing_to_do")

    # Tomorrow: new users, known users, events later, earlier and at the very moment of known ones, and known ones again.
    late = [
        ("u1", "i3", START - DAY),
        ("u1", "i4", START + 20 * DAY),
        ("u2", "i5", START + 99 * DAY),
        ("new", "i1", START),
    ]
    second = [*late, *first[:25], *random_events(2, users=10, items=40, events=40)]
    tuesday = raypipe(*words, "--log.path", write_log(files / "tuesday.csv", second))
    assert tuesday.status == "ok"
    assert histories_of(workspace_uri) == expected_histories(first, second)
    assert balanced(tuesday.metrics)
    assert (
        tuesday.metrics["events_added"]
        == sum(map(len, expected_histories(first, second).values())) - monday.metrics["events_added"]
    )
    logs = newest(workspace_uri, "logs").sort_by("ingest").to_pylist()
    assert [row["rows_in"] for row in logs] == [len(first), len(second)]
    assert [row["rows_ok"] for row in logs] == [monday.metrics["events_added"], tuesday.metrics["events_added"]]
    assert Workspace(workspace_uri).store.list("staging") == []


def test_splits_workers_and_formats_of_one_log_give_the_same_tables(raypipe: Run, tmp_path: Path, files: Path) -> None:
    events = random_events(3, users=20, items=30, events=300)
    catalogue = write_catalogue(files / "items.csv", 30)
    log = write_log(files / "log.csv", events)
    tables = []
    for name, options in (("one", ()), ("many", ("--log.split_bytes", 1500, "--cluster.workers", 2))):
        uri = str(tmp_path / name)
        assert (
            raypipe(
                "ingest", "--workspace", uri, *TIME, "--log.path", log, "--catalogue.path", catalogue, *options
            ).code
            == 0
        )
        tables.append(newest(uri, "histories").sort_by("user_id"))
    assert tables[0].equals(tables[1])


def test_an_order_workspace_appends_what_comes_after_what_exists(raypipe: Run, tmp_path: Path, files: Path) -> None:
    uri = str(tmp_path / "workspace")
    words = ("ingest", "--workspace", uri, *ORDER)
    header = ("user_id", "item_id", "place")
    catalogue = write_catalogue(files / "items.csv", 9)
    first = write_log(files / "1.csv", [("a", "i3", 7), ("a", "i1", 2), ("b", "i2", 1)], header)
    second = write_log(files / "2.csv", [("a", "i5", 1), ("a", "i1", 2), ("c", "i2", 1)], header)
    assert raypipe(*words, "--log.path", first, "--catalogue.path", catalogue).code == 0
    result = raypipe(*words, "--log.path", second)
    # c's history is b's to the letter, and must not be taken for it.
    assert histories_of(uri) == {
        "a": [("i1", 0), ("i3", 1), ("i5", 2), ("i1", 3)],
        "b": [("i2", 0)],
        "c": [("i2", 0)],
    }
    assert (result.metrics["events_added"], result.metrics["users_changed"]) == (3, 2)


def test_a_catalogue_that_changes_rekeys_exactly_the_users_who_touched_what_changed(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    events = [
        ("a", "i1", START),
        ("b", "i2", START),
        ("b", "i3", START),
        ("c", "i3", START),
        ("d", "i1", START),
        ("d", "i3", START),
    ]
    titles = {f"i{n}": f"Title {n}" for n in (1, 2, 3)}
    log = write_log(files / "log.csv", events)
    raypipe(
        "ingest",
        "--workspace",
        uri,
        *TIME,
        "--log.path",
        log,
        "--catalogue.path",
        write_catalogue(files / "1.csv", titles),
    )
    before, rows_before = keys_of(uri), histories_of(uri)

    # i1 gets another title, i2 is gone, i4 is new.
    titles = {"i4": "Title 4", "i3": "Title 3", "i1": "Another title"}
    catalogue = write_catalogue(files / "2.csv", titles, i3="War", i1="Drama", i4="War")
    changed = raypipe("ingest", "--workspace", uri, "--catalogue.path", catalogue)
    assert (changed.code, changed.status) == (0, "ok")
    assert {user for user, key in keys_of(uri).items() if key != before[user]} == {"a", "d"}
    assert changed.metrics["users_changed"] == 2
    assert histories_of(uri) == rows_before
    items = {row["item_id"]: row for row in newest(uri, "items").to_pylist()}
    assert {name: (row["index"], row["available"]) for name, row in items.items()} == {
        "i1": (1, True),
        "i2": (2, False),
        "i3": (3, True),
        "i4": (4, True),
    }
    assert raypipe("ingest", "--workspace", uri, "--catalogue.path", catalogue).status == "nothing_to_do"

    partial = write_catalogue(files / "3.csv", {"i5": "Title 5"})
    added = raypipe("ingest", "--workspace", uri, "--catalogue.path", partial, "--partial_catalogue")
    assert (added.metrics["items_added"], added.metrics["items_unavailable"], added.metrics["users_changed"]) == (
        1,
        1,
        0,
    )
    assert newest(uri, "items").num_rows == 5


def test_what_cannot_be_used_is_rejected_with_its_reason_and_what_is_not_wanted_is_counted(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    header = ("user_id", "item_id", "time", "stars")
    good = [(f"u{n}", "i1", START + n, 5) for n in range(20)]
    odd = [
        ("u1", "i99", START, 5),
        ("u1", "i2", START, 1),
        ("", "i1", START, 5),
        ("forgotten", "i1", START, 5),
        good[0],
    ]
    workspace = Workspace(uri)
    table = workspace.tables["tombstones"]
    table.publish([table.stage(tombstone_rows(["forgotten"]), "one")], mode="append", app="tombstones:forget", number=1)

    log = write_log(files / "log.csv", [*good, *odd], header)
    options = (
        "--log.columns.rating",
        "stars",
        "--log.min_rating",
        3,
        "--catalogue.path",
        write_catalogue(files / "i.csv", 3),
    )
    result = raypipe("ingest", "--workspace", uri, *TIME, "--log.path", log, *options)
    assert result.code == 0
    counts = {
        name: result.metrics[name]
        for name in ("rows_in", "events_added", "rejected", "duplicate", "filtered", "forgotten")
    }
    assert counts == {"rows_in": 25, "events_added": 20, "rejected": 2, "duplicate": 1, "filtered": 1, "forgotten": 1}
    assert "forgotten" not in histories_of(uri)
    rejects = {row["reason"]: row for row in newest(uri, "rejects").to_pylist()}
    assert set(rejects) == {"unknown_item", "null_user"}
    assert json.loads(rejects["unknown_item"]["row"])["item_id"] == "i99"
    assert rejects["unknown_item"]["table"] == "histories"
    assert rejects["unknown_item"]["run_key"] == result.result["run_key"]
    # The key is file and byte, so that the row is found again.
    name, position = rejects["unknown_item"]["key"].split(":")
    assert (files / name).read_bytes()[int(position) :].startswith(b"u1,i99,")

    raypipe(
        "ingest",
        "--workspace",
        uri,
        "--catalogue.path",
        write_catalogue(files / "more.csv", {"i99": "Found"}),
        "--partial_catalogue",
    )
    retried = raypipe("retry-rejected", "--workspace", uri, "--table", "histories")
    assert (retried.code, retried.metrics["retried"]) == (0, 1)
    assert ("i99", START) in histories_of(uri)["u1"]
    assert newest(uri, "rejects")["reason"].to_pylist() == ["null_user"]


def test_rows_of_a_forgotten_user_that_cannot_be_used_are_no_rejects_and_are_told_nowhere(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    workspace = Workspace(uri)
    table = workspace.tables["tombstones"]
    table.publish([table.stage(tombstone_rows(["alice"]), "one")], mode="append", app="tombstones:forget", number=1)
    hers = [("alice", "i1", START), ("alice", "no-such-item", START), ("alice", "i1", "noon"), ("alice", "", START)]
    others = [("u1", "no-such-item", START), ("u2", "i1", "noon"), ("", "i1", START), ("u3", "i1", START, "more")]
    log = write_log(files / "log.csv", [*hers, ("alice", "i1"), *others, ("u4", "i1", START)])
    words = ("ingest", "--workspace", uri, *TIME, "--log.path", log)
    words += ("--catalogue.path", write_catalogue(files / "items.csv", 3))
    refused = raypipe(*words)
    assert "5 of 10 rows" in refused.stderr
    receipts = workspace.ledger("ingest").newest().receipts()
    assert "alice" not in refused.stderr + json.dumps(refused.result) + str(list(receipts.values()))
    ended = raypipe(*words, "--max_reject_rate", 1)
    counts = [ended.metrics[name] for name in ("rows_in", "events_added", "rejected", "forgotten")]
    assert counts == [10, 1, 5, len(hers)]
    assert "alice" not in ended.stderr
    rejects = newest(uri, "rejects").to_pylist()
    assert not any("alice" in str(row) for row in rejects)
    # Of a line that is no row nobody can tell whose it is: her line and the other one have kept their place alone.
    lines = [(row["key"], row["row"]) for row in rejects if row["reason"] == "malformed_row"]
    at = [log.read_bytes().index(line) for line in (b"alice,i1\r", b"u3,i1")]
    assert lines == [(f"log.csv:{place}", "{}") for place in at]
    told = {row["reason"]: json.loads(row["row"])["user_id"] for row in rejects if row["reason"] != "malformed_row"}
    assert told == {"unknown_item": "u1", "bad_time": "u2", "null_user": ""}


def test_a_log_of_mostly_unusable_rows_publishes_nothing_until_that_is_allowed(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    log = write_log(files / "log.csv", [("a", "i1", START), ("b", "i77", START), ("c", "i78", START)])
    words = (
        "ingest",
        "--workspace",
        uri,
        *TIME,
        "--log.path",
        log,
        "--catalogue.path",
        write_catalogue(files / "i.csv", 3),
    )
    refused = raypipe(*words)
    assert (refused.code, refused.status) == (2, "failed")
    assert "2 of 3 rows" in refused.stderr
    assert "unknown_item 2" in refused.stderr
    assert {name: table.version() for name, table in Workspace(uri).tables.items() if table.version() >= 0} == {}
    allowed = raypipe(*words, "--max_reject_rate", 0.7)
    assert (allowed.code, allowed.metrics["events_added"], allowed.metrics["rejected"]) == (0, 1, 2)
    assert newest(uri, "rejects").num_rows == 2


def test_a_run_that_goes_on_with_other_splits_loses_and_doubles_nothing(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    """Receipts of the old splits are of other rows than the new ones of the same numbers."""
    uri = str(tmp_path / "workspace")
    log = write_log(files / "log.csv", [(f"u{n % 50}", "i1" if n % 3 else "i77", START + n) for n in range(600)])
    words = ("ingest", "--workspace", uri, *TIME, "--log.path", log)
    words += ("--catalogue.path", write_catalogue(files / "items.csv", 3))
    assert raypipe(*words, "--log.split_bytes", 4000).code == 2
    ended = raypipe(*words, "--log.split_bytes", 1_000_000, "--max_reject_rate", 1)
    assert ended.code == 0, ended.stderr
    assert [ended.metrics[name] for name in ("rows_in", "events_added", "rejected")] == [600, 400, 200]


def test_rejected_catalogue_rows_are_told_once(raypipe: Run, tmp_path: Path, files: Path) -> None:
    uri = str(tmp_path / "workspace")
    catalogue = write_catalogue(files / "items.csv", {"i1": "One", "i2": "", "i3": "Three"})
    log = write_log(files / "log.csv", [("a", "i1", START), ("b", "i3", START)])
    words = ("ingest", "--workspace", uri, "--catalogue.path", catalogue)
    result = raypipe(*words, "--log.path", log, *TIME)
    assert result.code == 0
    assert [(row["table"], row["reason"]) for row in newest(uri, "rejects").to_pylist()] == [("items", "missing_title")]
    assert raypipe(*words).status == "nothing_to_do"
    assert newest(uri, "rejects").num_rows == 1
