"""Delta tables: pinned reads and publishes that are whole, once, and of the named partitions only."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema

from raypipe.errors import RaypipeError
from raypipe.storage.schemas import HISTORIES, LOGS, SUMMARIES, TABLES
from raypipe.storage.store import Store
from raypipe.storage.tables import ABSENT, StagedFile, Table
from tests.chaos.flaky_store import LosesAnswers
from tests.conftest import S3Server

APP = "tombstones:test"


@pytest.fixture
def store(workspace_uri: str) -> Store:
    return Store(workspace_uri)


@pytest.fixture
def tombstones(store: Store) -> Table:
    return Table(store, TABLES["tombstones"])


def rows(*digests: str) -> pa.Table:
    return pa.table({"hash": pa.array([0] * len(digests), pa.int64()), "digest": list(digests)})


def history(*users: str) -> pa.Table:
    count = len(users)
    return pa.table(
        {
            "user_id": list(users),
            "items": [[1]] * count,
            "times": [[5]] * count,
            "seqs": [[0]] * count,
            "weights": [[1.0]] * count,
            "history_key": ["k"] * count,
        }
    )


def users_of(table: Table, version: int, **partition: int) -> list[tuple[str, int]]:
    found = table.read(version, ["user_id", "bucket"], **partition).to_pylist()
    return sorted((row["user_id"], row["bucket"]) for row in found)


def publish(table: Table, staged: list[StagedFile], number: int, mode: str = "append", **options) -> int:
    return table.publish(staged, mode=mode, app=APP, number=number, **options)


def test_an_absent_table_has_no_version_no_files_and_no_rows(tombstones: Table) -> None:
    assert tombstones.version() == ABSENT
    assert tombstones.files(ABSENT) == []
    assert tombstones.read(ABSENT).schema.names == ["hash", "digest"]
    assert (tombstones.read(ABSENT).num_rows, tombstones.rows(ABSENT)) == (0, 0)
    assert tombstones.published_number(APP) == 0


def test_staged_rows_are_seen_by_nobody_before_the_publish(tombstones: Table) -> None:
    staged = tombstones.stage(rows("a"), "one")
    assert tombstones.version() == ABSENT
    assert publish(tombstones, [staged], 1) == 0
    assert tombstones.read(0)["digest"].to_pylist() == ["a"]
    tombstones.stage(rows("b"), "two")
    assert tombstones.read(tombstones.version())["digest"].to_pylist() == ["a"]


def test_a_publish_of_the_same_number_is_left_alone(tombstones: Table) -> None:
    assert publish(tombstones, [tombstones.stage(rows("a"), "one")], 7) == 0
    assert publish(tombstones, [tombstones.stage(rows("b"), "two")], 7) == 0
    assert publish(tombstones, [tombstones.stage(rows("c"), "three")], 6) == 0
    assert tombstones.read(tombstones.version())["digest"].to_pylist() == ["a"]
    assert tombstones.published_number(APP) == 7
    assert tombstones.published_number("tombstones:other") == 0


def test_a_pinned_version_never_shows_newer_rows(tombstones: Table) -> None:
    publish(tombstones, [tombstones.stage(rows("a"), "one")], 1)
    assert publish(tombstones, [tombstones.stage(rows("b"), "two")], 2) == 1
    fresh = Table(tombstones.store, tombstones.spec)
    assert fresh.read(0)["digest"].to_pylist() == ["a"]
    assert sorted(fresh.read(1)["digest"].to_pylist()) == ["a", "b"]


def test_overwriting_a_table_without_partitions_replaces_all_of_it(tombstones: Table) -> None:
    publish(tombstones, [tombstones.stage(rows("a", "b"), "one")], 1)
    version = publish(tombstones, [tombstones.stage(rows("c"), "two")], 2, "overwrite")
    assert tombstones.read(version)["digest"].to_pylist() == ["c"]


def test_overwriting_replaces_exactly_the_named_partitions(store: Store) -> None:
    table = Table(store, HISTORIES)
    first = [table.stage(history(f"u{bucket}"), "one", {"bucket": bucket}) for bucket in range(4)]
    assert publish(table, first, 1, "overwrite", replaces=[{"bucket": bucket} for bucket in range(4)]) == 0
    second = [table.stage(history("new", "er"), "two", {"bucket": 1})]
    # Bucket 3 is named and gets nothing: it ends empty.
    version = publish(table, second, 2, "overwrite", replaces=[{"bucket": 1}, {"bucket": 3}])
    assert users_of(table, version) == [("er", 1), ("new", 1), ("u0", 0), ("u2", 2)]
    assert users_of(table, version, bucket=1) == [("er", 1), ("new", 1)]
    assert users_of(table, version, bucket=3) == []
    assert users_of(table, 0) == [("u0", 0), ("u1", 1), ("u2", 2), ("u3", 3)]


def test_overwriting_a_variant_leaves_the_other_variants_alone(store: Store) -> None:
    table = Table(store, SUMMARIES)

    def stage(variant: str, user: str, name: str) -> StagedFile:
        columns = {
            column: pa.nulls(1, type_)
            for column, type_ in zip(SUMMARIES.columns.names, SUMMARIES.columns.types, strict=True)
        }
        return table.stage(pa.table({**columns, "user_id": [user]}), name, {"variant": variant, "bucket": 0})

    for number, variant in enumerate(("a", "b"), 1):
        publish(
            table,
            [stage(variant, f"{variant}1", "one")],
            number,
            "overwrite",
            replaces=[{"variant": variant, "bucket": 0}],
        )
    version = publish(table, [stage("a", "a2", "two")], 3, "overwrite", replaces=[{"variant": "a", "bucket": 0}])
    assert table.read(version, variant="a")["user_id"].to_pylist() == ["a2"]
    assert table.read(version, variant="b")["user_id"].to_pylist() == ["b1"]


@pytest.mark.parametrize("harm", ["cut short", "gone"])
def test_a_harmed_staged_file_refuses_the_whole_publish(tombstones: Table, harm: str) -> None:
    publish(tombstones, [tombstones.stage(rows("a"), "one")], 1)
    good, bad = tombstones.stage(rows("b"), "two"), tombstones.stage(rows("c"), "three")
    path = f"{tombstones.folder}/{bad.path}"
    if harm == "gone":
        tombstones.store.delete([path])
    else:
        tombstones.store.put(path, tombstones.store.read(path)[:-10])
    with pytest.raises(RaypipeError, match=r"three\.parquet of table tombstones is missing or not"):
        publish(tombstones, [good, bad], 2)
    assert tombstones.version() == 0
    assert tombstones.read(0)["digest"].to_pylist() == ["a"]


def test_a_commit_whose_answer_is_lost_is_taken_for_what_it_is(
    s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LosesAnswers(s3_server.url) as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
        table = Table(Store(s3_uri), TABLES["tombstones"])
        assert publish(table, [table.stage(rows("a"), "a")], 1) == 0
        assert publish(table, [table.stage(rows("b"), "b")], 2) == 1
        assert flaky.failures >= 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    found = Table(Store(s3_uri), TABLES["tombstones"])
    assert sorted(found.read(1)["digest"].to_pylist()) == ["a", "b"]
    assert found.published_number(APP) == 2


def test_a_second_writer_who_raced_is_refused(tombstones: Table, monkeypatch) -> None:
    publish(tombstones, [tombstones.stage(rows("a"), "one")], 1)
    mine = tombstones.stage(rows("mine"), "mine")
    opened = tombstones._open

    def open_then_lose(version: int | None = None):
        table = opened(version)
        if not raced:
            return table
        raced.clear()
        other = Table(tombstones.store, tombstones.spec)
        other.publish([other.stage(rows("theirs"), "theirs")], mode="overwrite", app="tombstones:other", number=1)
        return table

    raced: list[bool] = []
    real_number = tombstones.published_number
    monkeypatch.setattr(tombstones, "_open", open_then_lose)
    monkeypatch.setattr(tombstones, "published_number", lambda app: (real_number(app), raced.append(True))[0])
    with pytest.raises(RaypipeError, match="Another writer changed table tombstones"):
        publish(tombstones, [mine], 2, "overwrite")
    fresh = Table(tombstones.store, tombstones.spec)
    assert fresh.read(fresh.version())["digest"].to_pylist() == ["theirs"]


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_a_column_more_is_null_in_older_files_and_named_from_the_next_publish_on(store: Store, mode: str) -> None:
    def one(*words: str) -> pa.Table:
        nulls = {name: pa.nulls(len(words), kind) for name, kind in zip(full.names, full.types, strict=True)}
        return pa.table({**nulls, "user_id": list(words), "carry": list(words)})

    full = SUMMARIES.columns
    older = replace(SUMMARIES, columns=full.remove(full.get_field_index("carry")))
    before, place = Table(store, older), {"variant": "v", "bucket": 1}
    publish(before, [before.stage(one("a"), "one", place)], 1, mode, replaces=[place])
    after, other = Table(store, SUMMARIES), {"variant": "v", "bucket": 2}
    assert after.read(0) == before.read(0).cast(older.schema).append_column("carry", pa.nulls(1, pa.string())).select(
        SUMMARIES.schema.names
    )
    assert after.read(0, ["carry", "bucket"]).to_pylist() == [{"carry": None, "bucket": 1}]
    version = publish(after, [after.stage(one("b"), "two", other)], 2, mode, replaces=[other])
    found = after.read(version, ["user_id", "carry"]).to_pylist()
    assert sorted(found, key=str) == [{"user_id": "a", "carry": None}, {"user_id": "b", "carry": "b"}]
    named = DeltaTable(after.uri).schema().fields
    assert {column.name for column in named} == set(SUMMARIES.schema.names)
    assert publish(after, [after.stage(one("c"), "three", other)], 3, mode, replaces=[other]) == version + 1


def test_a_version_of_months_ago_is_read_as_before(tmp_path: Path) -> None:
    folder = tmp_path / "tables/tombstones"
    folder.mkdir(parents=True)
    options = {"delta.checkpointInterval": "5"}
    DeltaTable.create(str(folder), Schema.from_arrow(TABLES["tombstones"].schema), configuration=options)
    table = Table(Store(str(tmp_path)), TABLES["tombstones"])
    for number in range(1, 14):
        publish(table, [table.stage(rows(f"{number}"), f"file-{number}")], number, "overwrite")
        for path in (folder / "_delta_log").glob("0*"):
            days = 100 * (number - int(path.name.split(".")[0]))
            os.utime(path, (time.time() - 86_400 * days,) * 2)
    assert len(list((folder / "_delta_log").glob("*.checkpoint.parquet"))) == 2
    fresh = Table(table.store, table.spec)
    assert [fresh.read(version)["digest"].to_pylist() for version in (1, 7, 13)] == [["1"], ["7"], ["13"]]
    # What another program cut off is no reason to keep nothing tidy.
    for path in (folder / "_delta_log").glob("0000000000000000000[0-8].*"):
        path.unlink()
    assert {file.path for file in fresh.unneeded([3, 11])} == {f"file-{n}.parquet" for n in range(1, 13) if n != 11}


def test_rows_that_do_not_fit_the_schema_are_never_staged(tombstones: Table) -> None:
    with pytest.raises(pa.ArrowInvalid):
        tombstones.stage(pa.table({"hash": ["no number"], "digest": ["a"]}), "bad")
    with pytest.raises(KeyError):
        tombstones.stage(pa.table({"digest": ["a"]}), "bad")
    assert tombstones.store.list(tombstones.folder) == []


def test_a_read_returns_the_schema_of_the_spec_whatever_was_staged(store: Store) -> None:
    table = Table(store, LOGS)
    counts = {name: [1] for name in LOGS.columns.names if name.startswith("rows_")}
    staged = table.stage(
        pa.table({"uri": ["x"], "checksum": ["y"], "ingest": pa.array([3], pa.int64()), **counts}), "one"
    )
    assert table.read(publish(table, [staged], 1)).schema == LOGS.schema
