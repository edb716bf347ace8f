"""Every row that cannot be used is counted once, with its reason, and costs only itself."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.data.splits import read_split

TIME = LogColumns(time="t")


def csv(*lines: str | bytes, header: str = "user_id,item_id,t") -> bytes:
    return b"\n".join(line.encode() if isinstance(line, str) else line for line in (header, *lines))


def by_reason(log) -> list[tuple[str, str]]:
    return [(bad["reason"], bad["key"].partition(":")[2]) for bad in log.rejects]


def test_each_reason_is_found_at_its_byte(write_text, read_log):
    lines = [
        "u,i,5",
        ",i,5",
        'u,"",5',
        "u,i,noon",
        "u,i,NaN",
        "u,i,",
        "u,i,-1",
        "u,i,4102444801",
        "u,i",
        "u,i,5,6",
        b"\xff,i,5",
        b"u,i\xe9,5",
        "x" * 1025 + ",i,5",
        "ü" * 512 + ",i,4102444800",
        "v,i,0x10",
        "v,i, 7 ",
        "v,i,1e3",
    ]
    path = write_text("log.csv", csv(*lines))
    log = read_log(path, TIME)
    at, starts = len("user_id,item_id,t\n"), []
    for line in lines:
        starts.append(str(at))
        at += len(line.encode() if isinstance(line, str) else line) + 1
    expected = {
        1: "null_user",
        2: "null_item",
        3: "bad_time",
        4: "bad_time",
        5: "bad_time",
        6: "impossible_time",
        7: "impossible_time",
        8: "malformed_row",
        9: "malformed_row",
        10: "bad_text",
        11: "bad_text",
        12: "id_too_long",
        14: "bad_time",
    }
    assert by_reason(log) == [(reason, starts[line]) for line, reason in expected.items()]
    assert [(e["user_id"], e["time"]) for e in log.events] == [
        ("u", 5_000),
        ("ü" * 512, 4_102_444_800_000),
        ("v", 7_000),
        ("v", 1_000_000),
    ]
    assert log.rejects[0]["key"] == f"log.csv:{starts[1]}"
    assert json.loads(log.rejects[0]["row"]) == {"user_id": "", "item_id": "i", "t": "5"}
    assert json.loads(log.rejects[9]["row"])["user_id"] == "\\xff"
    assert json.loads(log.rejects[7]["row"]) == {"line": "u,i"}
    assert read_log(path, TIME, split_bytes=1).rejects == log.rejects


def test_a_rejected_row_tells_whose_it_is_as_an_event_would(tmp_path):
    """A number as its id is written, whatever its column's type makes of it."""
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [17.0, None, 5.0], "item_id": ["i", "i", "i"], "t": ["noon", "5", "5"]}), path)
    log = open_log(LogConfig(path=str(path), columns=TIME, time_unit="seconds"))
    (chunk,) = read_split(log.splits[0])
    assert chunk.rejects["reason"].to_pylist() == ["bad_time", "null_user"]
    assert chunk.reject_users.to_pylist() == ["17", ""]


def test_an_unclosed_quote_costs_one_line(write_text, read_log):
    path = write_text("log.csv", csv("a,i,5", '"b,i,6', "c,i,7", 'd"d,i,8', '"e ""e""",i,9', "f,i\n,i,1", 'g,i,"5'))
    log = read_log(path, TIME)
    assert [e["user_id"] for e in log.events] == ["a", "c", 'd"d', 'e "e"']
    assert log.reasons() == {"malformed_row": 3, "null_user": 1}
    assert json.loads(log.rejects[0]["row"]) == {"line": '"b,i,6'}


def test_a_quote_in_the_middle_of_a_field_is_text_where_quotes_may_hold_line_breaks(write_text, read_log):
    lines = [f'u{n},i{n},{n},"a ""fine""\nnote"' if n % 2 else f"u{n},i{n},{n},plain" for n in range(1000)]
    lines[10] = 'u10,i10,10,24" tv'
    path = write_text("log.csv", csv(*lines, header="user_id,item_id,t,note"))
    log = read_log(path, TIME, quoted_newlines=True)
    assert (log.rows_in, len(log.events), log.rejects) == (1000, 1000, [])


@pytest.mark.parametrize("broken", ['u10,i10,10,"24 tv', '"u10,i10,10,tv'])
def test_every_line_that_an_unclosed_quote_swallows_is_counted(write_text, read_log, broken):
    lines = [f"u{n},i{n},{n},plain" for n in range(1000)]
    lines[10] = broken
    log = read_log(write_text("log.csv", csv(*lines, header="user_id,item_id,t,note")), TIME, quoted_newlines=True)
    assert (log.rows_in, len(log.events), log.reasons()) == (1000, 10, {"malformed_row": 990})
    assert [json.loads(bad["row"])["line"] for bad in log.rejects] == lines[10:]


def test_a_malformed_line_that_is_not_utf8_costs_only_itself(write_text, read_log):
    log = read_log(write_text("log.csv", csv("a,i,5", b"\xff\xfe", "c,i,7")), TIME)
    assert [e["user_id"] for e in log.events] == ["a", "c"]
    assert [(bad["reason"], json.loads(bad["row"])) for bad in log.rejects] == [
        ("malformed_row", {"line": "\\xff\\xfe"})
    ]


def test_a_broken_json_line_keeps_its_neighbours(write_text, read_log):
    lines = [
        b'{"user_id": "a", "item_id": "i", "t": 5}',
        b'{"user_id": "b", "item_id": ',
        b'["c", "i", 5]',
        b'{"user_id": {"id": 1}, "item_id": "i", "t": 5}',
        b'{"user_id": "\xff", "item_id": "i", "t": 5}',
        b'{"user_id": "\\ud800", "item_id": "i", "t": 5}',
        b'{"user_id": null, "item_id": "i", "t": 5}',
        b'{"user_id": "d", "t": 5}',
        b'{"user_id": "e", "item_id": "i", "t": NaN}',
        b"",
        b'{"user_id": "f", "item_id": "i", "t": 5.5}',
    ]
    log = read_log(write_text("log.jsonl", b"\n".join(lines)), TIME)
    assert [(e["user_id"], e["time"]) for e in log.events] == [("a", 5000), ("f", 5500)]
    assert [bad["reason"] for bad in log.rejects] == [
        "malformed_row",
        "malformed_row",
        "malformed_row",
        "bad_text",
        "bad_text",
        "null_user",
        "null_item",
        "bad_time",
    ]
    assert log.rows_in == 10


@pytest.mark.parametrize("beside", [b'{"user_id": "c", "item_id": "i", "t": 7}', b"{"])
def test_an_integer_of_thousands_of_digits_is_judged_where_it_stands(write_text, read_log, beside):
    digits = b"1" * 5000
    lines = [
        b'{"user_id": "a", "item_id": "i", "t": 5}',
        b'{"user_id": "b", "item_id": "i", "t": ' + digits + b"}",
        b'{"user_id": ' + digits + b', "item_id": "i", "t": 6}',
        b'{"user_id": "d", "item_id": "i", "t": 8, "unused": ' + digits + b"}",
        beside,
    ]
    log = read_log(write_text("log.jsonl", b"\n".join([*lines, b""])), TIME)
    assert [e["user_id"] for e in log.events if e["user_id"] != "c"] == ["a", "d"]
    assert by_reason(log)[:2] == [("bad_time", "41"), ("id_too_long", str(41 + 40 + 5000))]
    assert log.rows_in == 5


def test_parquet_columns_are_checked_value_by_value(tmp_path, read_log):
    users = pa.array([b"ok", b"\xff", None, b"", b"fine"]).view(pa.string())
    table = pa.table({"user_id": users, "item_id": [1.0, 2.0, 3.0, 4.0, float("nan")], "t": [1.5, 1.0, 1.0, 1.0, 1.0]})
    pq.write_table(table, tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet", TIME)
    assert [(e["user_id"], e["item_id"], e["time"]) for e in log.events] == [("ok", "1", 1500)]
    assert by_reason(log) == [("bad_text", "1"), ("null_user", "2"), ("null_user", "3"), ("null_item", "4")]


def test_timestamps_out_of_range_are_impossible_and_nulls_are_bad(tmp_path, read_log):
    for unit, factor in (("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        last = 4_102_444_800 * factor
        values = [0, -1, last, last + factor, None, -(2**62)]
        path = tmp_path / f"{unit}.parquet"
        times = pa.array(values, pa.timestamp(unit, "UTC"))
        pq.write_table(pa.table({"user_id": ["u"] * 6, "item_id": ["i"] * 6, "t": times}), path)
        log = read_log(path, TIME)
        assert [e["time"] for e in log.events] == [0, 4_102_444_800_000]
        assert log.reasons() == {"impossible_time": 3, "bad_time": 1}


@pytest.mark.parametrize("stray", [[], ["never", "2020-02-30", "2020-01-01T25:00:00", "99"]])
def test_iso_times_mean_the_same_beside_broken_ones(write_text, read_log, stray):
    times = {
        "2020-01-01": 1577836800000,
        "2020-01-01 10:30": 1577874600000,
        "2020-01-01T10:30:15.123456": 1577874615123,
        "2020-01-01T10:30:15Z": 1577874615000,
        "2020-01-01T10:30:15+02:00": 1577867415000,
        "2020-01-01T10:30:15-0530": 1577894415000,
        "2020-02-29T23:59:59.999999999Z": 1583020799999,
        "2000-12-31": 978220800000,
    }
    log = read_log(write_text("log.csv", csv(*(f"u,i,{time}" for time in [*times, *stray]))), TIME)
    assert [e["time"] for e in log.events] == list(times.values())
    assert log.reasons() == ({"bad_time": 4} if stray else {})
    for time, expected in times.items():
        alone = read_log(write_text("alone.csv", csv(f"u,i,{time}")), TIME)
        assert [e["time"] for e in alone.events] == [expected], time


def test_a_time_before_1970_is_impossible_in_iso_too(write_text, read_log):
    log = read_log(write_text("log.csv", csv("u,i,1969-12-31", "u,i,2100-01-02", "u,i,1970-01-01")), TIME)
    assert (log.reasons(), [e["time"] for e in log.events]) == ({"impossible_time": 2}, [0])


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1500000000", "12"], [1_500_000_000_000, 12_000]),
        (["1500000000000", "12"], [1_500_000_000_000, 12]),
        (["1500000000.25", "12"], [1_500_000_000_250, 12_000]),
        (["junk", "1500000000"], [1_500_000_000_000]),
    ],
)
def test_the_unit_of_numbers_is_judged_once_by_the_first_rows(write_text, read_log, times, expected):
    path = write_text("log.csv", csv(*(f"u,i,{time}" for time in times)))
    for split_bytes in (1, 1 << 20):
        assert [e["time"] for e in read_log(path, TIME, split_bytes=split_bytes).events] == expected


def test_orders_are_whole_numbers(write_text, read_log):
    path = write_text("log.csv", csv("u,i,3", "u,i,-1", "u,i,2.0", "u,i,2.5", "u,i,x", "u,i,", "u,i,9007199254740993"))
    log = read_log(path, LogColumns(order="t"))
    assert [e["time"] for e in log.events] == [3, -1, 2, 9007199254740993]
    assert log.reasons() == {"bad_order": 3}


def test_event_types_have_weights_and_ratings_a_minimum(write_text, read_log):
    rows = [
        "u,i,1,buy,5",
        "u,i,2,view,",
        "u,i,3,view,2",
        "u,i,4,hover,5",
        "u,i,5,hover,1",
        "u,i,6,like,5",
        "u,i,7,buy,x",
    ]
    path = write_text("log.csv", csv(*rows, header="user_id,item_id,t,what,stars"))
    columns = LogColumns(time="t", event="what", rating="stars")
    log = read_log(path, columns, event_weights={"buy": 2.5, "view": 1.0, "hover": 0.0}, min_rating=3)
    assert [(e["time"], e["weight"]) for e in log.events] == [(1000, 2.5)]
    assert (log.filtered, log.reasons()) == (3, {"bad_rating": 2, "unknown_event": 1})


def test_long_values_are_cut_in_the_rejected_row(write_text, read_log):
    log = read_log(write_text("log.csv", csv("x" * 5000 + ",i,5", "u,i,5")), TIME)
    assert json.loads(log.rejects[0]["row"])["user_id"] == "x" * 2000 + "…"
