"""Every format gives the same events, however it is cut into splits."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.data.splits import read_split
from raypipe.errors import UsageError

TIME = LogColumns(time="t")
IDS = ["u 1", 'qu"ote', "🦊", "a,b", "1.0", " lead", "-7", "ü"]
ROWS = [(IDS[n % len(IDS)], f"i{n % 7}", 1_500_000_000 + n // 3) for n in range(200)]


def key(events) -> list[tuple]:
    return [(e["user_id"], e["item_id"], e["time"], e["weight"]) for e in events]


EXPECTED = [(user, item, time * 1000, 1.0) for user, item, time in ROWS]


def quote(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & {",", '"'} else text


def csv_text(line_end: str = "\n") -> str:
    return line_end.join(["user_id,item_id,t", *(",".join(map(quote, row)) for row in ROWS)])


def json_text() -> str:
    rows = ({"user_id": user, "item_id": item, "t": time, "extra": [1, {"a": 2}]} for user, item, time in ROWS)
    return "\n".join(json.dumps(row, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows))


def table() -> pa.Table:
    users, items, times = zip(*ROWS, strict=True)
    return pa.table({"user_id": users, "item_id": items, "t": times})


@pytest.mark.parametrize("split_bytes", [1, 7, 40, 333, 1 << 20])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_reads_the_same_however_it_is_split(write_text, read_log, split_bytes, line_end):
    path = write_text("log.csv", csv_text(line_end) + "\n\n")
    whole = read_log(path, TIME)
    split = read_log(path, TIME, split_bytes=split_bytes)
    assert key(whole.events) == EXPECTED
    assert split.events == whole.events
    assert (whole.splits, split.splits > 1) == (1, split_bytes < 1 << 20)


@pytest.mark.parametrize("split_bytes", [1, 50, 777])
def test_json_lines_read_the_same_however_they_are_split(write_text, read_log, split_bytes):
    path = write_text("log.jsonl", json_text())
    whole = read_log(path, TIME)
    assert key(whole.events) == EXPECTED
    assert read_log(path, TIME, split_bytes=split_bytes).events == whole.events


@pytest.mark.parametrize("row_group_size", [200, 17, 1])
def test_parquet_reads_the_same_however_it_is_split(tmp_path, read_log, row_group_size):
    path = tmp_path / "log.parquet"
    pq.write_table(table(), path, row_group_size=row_group_size)
    whole = read_log(path, TIME)
    split = read_log(path, TIME, split_bytes=1)
    assert key(whole.events) == EXPECTED
    assert split.events == whole.events
    assert split.splits == -(-200 // row_group_size)


@pytest.mark.parametrize(("name", "text"), [("log.csv.gz", csv_text()), ("log.jsonl.gz", json_text())])
def test_a_compressed_file_is_one_split(write_text, read_log, name, text):
    log = read_log(write_text(name, gzip.compress(text.encode())), TIME, split_bytes=10)
    assert (key(log.events), log.splits) == (EXPECTED, 1)


def test_parts_of_a_folder_are_one_log_in_the_order_of_their_names(write_text, read_log, tmp_path):
    header, *lines = csv_text().split("\n")
    write_text("log/part-2.csv.gz", gzip.compress("\n".join([header, *lines[50:120]]).encode()))
    write_text("log/part-1.csv", "\n".join([header, *lines[:50]]))
    write_text("log/part-3.csv", "t,user_id,item_id\n" + "\n".join(f"{t},{quote(u)},{i}" for u, i, t in ROWS[120:]))
    write_text("log/part-4.csv", "")
    write_text("log/_SUCCESS", "")
    write_text("log/part-5.csv", header + "\n")
    log = read_log(tmp_path / "log", TIME, split_bytes=100)
    assert key(log.events) == EXPECTED
    assert key(read_log(tmp_path / "log" / "part-[12]*", TIME).events) == EXPECTED[:120]


def test_folder_names_are_columns_of_parquet(tmp_path, read_log):
    for event, rows in (("buy", slice(0, 2)), ("view", slice(2, 5))):
        folder = tmp_path / f"event={event}"
        folder.mkdir()
        pq.write_table(table()[rows], folder / "part.parquet")
    columns = LogColumns(time="t", event="event")
    log = read_log(tmp_path, columns, event_weights={"buy": 2.0, "view": 0.5})
    assert [e["weight"] for e in log.events] == [2.0, 2.0, 0.5, 0.5, 0.5]


def test_delta_is_pinned_at_the_version_that_was_opened(tmp_path, read_log):
    path = str(tmp_path / "log")
    day = pa.array(["a"] * 150 + ["b"] * 50)
    write_deltalake(path, table().append_column("day", day), partition_by=["day"])
    before = open_log(LogConfig(path=path, columns=TIME))
    assert key(read_log(path, TIME).events) == EXPECTED
    later = pa.table({"user_id": ["new"], "item_id": ["i"], "t": [1_600_000_000], "day": ["c"]})
    write_deltalake(path, later, mode="append")
    after = open_log(LogConfig(path=path, columns=TIME))
    assert before.checksum != after.checksum
    assert len(read_log(path, TIME).events) == 201


def test_rows_deleted_from_delta_are_gone_and_added_columns_are_null(tmp_path, read_log):
    path = str(tmp_path / "log")
    write_deltalake(path, table())
    DeltaTable(path).delete("item_id = 'i0'")
    rated = pa.table({"user_id": ["new"], "item_id": ["i"], "t": [1_600_000_000], "stars": [5.0]})
    write_deltalake(path, rated, mode="append", schema_mode="merge")
    log = read_log(path, LogColumns(time="t", rating="stars"))
    kept = sum(item != "i0" for _, item, _ in ROWS)
    assert (len(log.events), log.reasons()) == (1, {"bad_rating": kept})


def test_numeric_ids_become_their_text(tmp_path, read_log):
    path = tmp_path / "log.parquet"
    columns = {
        "user_id": pa.array([1, 2**62, -3]),
        "item_id": pa.array([1.0, 2.5, 10.0]),
        "t": pa.array([1, 2, 3], pa.timestamp("s")),
    }
    pq.write_table(pa.table(columns), path)
    assert [(e["user_id"], e["item_id"], e["time"]) for e in read_log(path, TIME).events] == [
        ("1", "1", 1000),
        (str(2**62), "2.5", 2000),
        ("-3", "10", 3000),
    ]


def test_decimal_ids_keep_every_digit(tmp_path, read_log):
    path = tmp_path / "log.parquet"
    users = [Decimal(1234567890123456789), Decimal(1234567890123456790), Decimal(0), Decimal(10**20)]
    items = [Decimal("100"), Decimal("2.50"), Decimal(0), Decimal("0.000000001")]
    columns = {
        "user_id": pa.array(users, pa.decimal128(38, 0)),
        "item_id": pa.array(items, pa.decimal128(38, 10)),
        "t": pa.array([Decimal(time) for time in (9007199254740993, -1, 10**20, 4)], pa.decimal128(38, 0)),
    }
    pq.write_table(pa.table(columns), path)
    log = read_log(path, LogColumns(order="t"))
    assert [(e["user_id"], e["item_id"], e["time"]) for e in log.events] == [
        ("1234567890123456789", "100", 9007199254740993),
        ("1234567890123456790", "2.5", -1),
        ("100000000000000000000", "0.000000001", 4),
    ]
    assert log.reasons() == {"bad_order": 1}
    assert json.loads(log.rejects[0]["row"])["t"] == "100000000000000000000"


def test_json_ids_may_change_between_numbers_and_strings(write_text, read_log):
    lines = ['{"user_id": 1, "item_id": "a", "t": 5}', '{"user_id": "1", "item_id": 2.0, "t": "6"}']
    log = read_log(write_text("log.jsonl", "\n".join(lines * 3)), TIME)
    assert key(log.events) == [("1", "a", 5000, 1.0), ("1", "2", 6000, 1.0)] * 3


def test_dictionary_columns_of_parquet_are_read(tmp_path, read_log):
    encoded = table().set_column(0, "user_id", table()["user_id"].dictionary_encode())
    pq.write_table(encoded, tmp_path / "log.parquet")
    assert key(read_log(tmp_path / "log.parquet", TIME).events) == EXPECTED


def test_line_breaks_in_quotes_are_read_when_announced_and_refused_when_not(write_text, read_log):
    text = 'user_id,review,item_id,t\nu1,"two\nlines, ""quoted""",i1,5\nu2,plain,i2,6\n'
    path = write_text("log.csv", text)
    log = read_log(path, TIME, quoted_newlines=True, split_bytes=5)
    assert (key(log.events), log.splits) == ([("u1", "i1", 5000, 1.0), ("u2", "i2", 6000, 1.0)], 1)
    with pytest.raises(UsageError, match=r"line breaks in quotes.*log\.quoted_newlines"):
        read_log(path, TIME)


def test_a_byte_order_mark_belongs_to_no_column(write_text, read_log):
    assert key(read_log(write_text("log.csv", "\ufeffuser_id,item_id,t\nu,i,5\n"), TIME).events) == [
        ("u", "i", 5000, 1.0)
    ]
    line = '\ufeff{"user_id": "u", "item_id": "i", "t": 5}'
    assert key(read_log(write_text("log.jsonl", line), TIME).events) == [("u", "i", 5000, 1.0)]


def test_a_long_log_comes_in_chunks_in_order(tmp_path, read_log):
    rows = 300_000
    numbers = np.arange(rows)
    pq.write_table(pa.table({"user_id": numbers, "item_id": numbers % 10, "t": numbers}), tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet", LogColumns(order="t"))
    assert [e["time"] for e in log.events[:: rows // 4]] == [0, 75_000, 150_000, 225_000]
    assert [e["seq"] for e in log.events] == list(range(rows))


@pytest.mark.parametrize(
    ("name", "events", "users", "items"),
    [("ml-1m", 1_000_209, 6_040, 3_706), ("amazon-industrial", 22_743, 3_285, 3_541)],
)
def test_real_order_logs_have_their_published_counts(shared_data: Path, name, events, users, items):
    log = open_log(LogConfig(path=str(shared_data / name / "interactions.csv.gz"), columns=LogColumns(order="pos")))
    assert log.kind == "order"
    table = pa.concat_tables([chunk.events for split in log.splits for chunk in read_split(split)])
    assert table.num_rows == events
    assert (len(table["user_id"].unique()), len(table["item_id"].unique())) == (users, items)
