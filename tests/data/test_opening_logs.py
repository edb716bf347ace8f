"""What a user got wrong is told before any work, with the remedy."""

from __future__ import annotations

import hashlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from raypipe.data.files import explained
from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.errors import RaypipeError, UnavailableError, UsageError

GOOD = "user_id,item_id,timestamp\nu,i,5\n"
TIME = LogColumns(time="timestamp")


def refuse(path, match: str, columns: LogColumns = TIME, **config) -> None:
    with pytest.raises(UsageError, match=match):
        open_log(LogConfig(path=str(path), columns=columns, **config))


def test_a_missing_path_is_told(tmp_path):
    refuse(tmp_path / "none.csv", "There is nothing at .*none.csv")
    refuse(tmp_path / "*.csv", "There is no file at")
    refuse("gs://bucket/log.csv", "cannot read gs://.*s3://")


def test_a_missing_column_is_told_with_those_found_and_the_closest(write_text, tmp_path):
    path = write_text("log.csv", GOOD)
    refuse(
        path,
        r"no column time_stamp; it has: user_id, item_id, timestamp\. The closest is timestamp\.",
        LogColumns(time="time_stamp"),
    )
    refuse(path, "The closest is user_id", LogColumns(user="UserID", time="timestamp"))
    pq.write_table(pa.table({"userId": ["u"], "item_id": ["i"]}), tmp_path / "log.parquet")
    refuse(tmp_path / "log.parquet", "no column user_id; it has: userId, item_id. The closest is userId")
    refuse(
        write_text("log.jsonl", '{"user": "u", "item_id": "i", "timestamp": 1}'), "no column user_id.*closest is user"
    )


def test_another_delimiter_is_guessed_at(write_text, read_log):
    refuse(write_text("log.csv", GOOD.replace(",", ";")), r"set log\.delimiter")
    assert len(read_log(write_text("log.csv", GOOD.replace(",", ";")), TIME, delimiter=";").events) == 1


@pytest.mark.parametrize(
    "text", ["", "user_id,item_id,timestamp\n", "user_id,item_id,timestamp\n\n \r\n".replace(" ", "")]
)
def test_an_empty_log_is_told(write_text, text):
    refuse(write_text("log.csv", text), "has no rows")


def test_an_empty_parquet_or_json_log_is_told(write_text, tmp_path):
    pq.write_table(pa.table({"user_id": [], "item_id": [], "timestamp": []}), tmp_path / "log.parquet")
    refuse(tmp_path / "log.parquet", "has no rows")
    refuse(write_text("log.jsonl", "\n\n"), "has no rows")


def test_exactly_one_of_time_and_order_is_needed(write_text):
    path = write_text("log.csv", GOOD)
    refuse(path, "neither is set", LogColumns())
    refuse(path, "both .* are set", LogColumns(time="timestamp", order="timestamp"))


def test_settings_without_their_columns_are_told(write_text):
    path = write_text("log.csv", GOOD)
    refuse(path, "no rating column", min_rating=3)
    refuse(path, "belong together", event_weights={"buy": 1})
    refuse(path, "belong together", LogColumns(time="timestamp", event="item_id"))
    refuse(
        path, "weight of event type buy is -1", LogColumns(time="timestamp", event="item_id"), event_weights={"buy": -1}
    )


def test_a_format_that_cannot_be_told_is_told(write_text, tmp_path):
    refuse(write_text("log.dat", GOOD), "format of .*log.dat cannot be told")
    write_text("mixed/a.csv", GOOD)
    write_text("mixed/b.jsonl", "{}")
    refuse(tmp_path / "mixed", r"several formats \(a.csv, b.jsonl\)")
    refuse(write_text("log.parquet", GOOD), "log.parquet cannot be read")
    refuse(write_text("log.csv.gz", GOOD), "log.csv.gz cannot be read")
    refuse(write_text("utf16.csv", GOOD.encode("utf-16")), "UTF-16")


def test_magic_bytes_tell_a_format_without_an_ending(write_text, tmp_path):
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]}), tmp_path / "a")
    assert open_log(LogConfig(path=str(tmp_path / "a"), columns=TIME)).splits[0].reader == "columnar"
    path = write_text("b", '{"user_id": "u", "item_id": "i", "timestamp": 1}')
    assert open_log(LogConfig(path=str(path), columns=TIME)).splits[0].reader == "jsonl"


def test_a_time_column_of_an_impossible_type_or_unit_is_told(tmp_path, write_text):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [[1]]}), path)
    refuse(path, "is of type list")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]}), path)
    refuse(path, "has to hold timestamps or ISO text", time_unit="iso")
    refuse(write_text("log.csv", GOOD.replace("5", "soon")), "unit cannot be told.*log.time_unit")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_told(write_text):
    path = write_text("log.csv", GOOD)
    path.chmod(0)
    refuse(path, "may not be read by this user")


def test_a_log_knows_its_kind_checksum_and_splits(write_text):
    text = "user_id,item_id,timestamp\n" + "user,item,1500000000\n" * 5000
    path = write_text("log.csv", text)
    log = open_log(LogConfig(path=str(path), columns=TIME, split_bytes=1000))
    assert (log.kind, log.uri) == ("time", str(path))
    assert log.checksum == hashlib.sha256(text.encode()).hexdigest()
    assert [split.index for split in log.splits] == list(range(105))
    assert open_log(LogConfig(path=str(path), columns=LogColumns(order="timestamp"))).kind == "order"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (GenericError("503 Slow Down"), UnavailableError),
        (PermissionDeniedError("403"), UsageError),
        (FileNotFoundError("nothing"), UsageError),
        (pa.ArrowInvalid("no Parquet"), UsageError),
    ],
)
def test_what_may_pass_is_told_from_what_stays(raised: Exception, told: type[RaypipeError]) -> None:
    """By the exit code: whoever schedules the job tries the first again and not the others."""
    with pytest.raises(RaypipeError) as ended, explained("s3://bucket/log"):
        raise raised
    assert type(ended.value) is told
    assert ended.value.exit_code == (1 if told is UnavailableError else 2)
