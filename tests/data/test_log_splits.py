"""Whatever stands in a text file, splitting it changes no row."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.data.splits import read_split
from raypipe.errors import UsageError

CSV = ['"', '"', ",", ",", "\n", "\n", "\r\n", "a", "1", " ", "é", '""', "0x10", "u,i,5\n", 'v,"j",6\n', '"x,y",i,7\n']
JSON = [
    "{",
    "}",
    '"',
    "\n",
    "\n",
    '{"user_id": "u", "item_id": 1, "t": 5}',
    '{"user_id": 2, "t": 1.5}',
    "\\ud800",
    "[]",
]


def read(path: Path, split_bytes: int) -> tuple[list, list]:
    config = LogConfig(path=str(path), columns=LogColumns(time="t"), time_unit="seconds", split_bytes=split_bytes)
    chunks = [chunk for split in open_log(config).splits for chunk in read_split(split)]
    for chunk in chunks:
        assert chunk.rows_in == chunk.events.num_rows + chunk.rejects.num_rows + chunk.filtered
    events = [row for chunk in chunks for row in chunk.events.to_pylist()]
    return events, [(row["key"], row["reason"]) for chunk in chunks for row in chunk.rejects.to_pylist()]


@pytest.mark.parametrize(
    ("name", "start", "pieces"),
    [("log.csv", "user_id,item_id,t\nu,i,5\n", CSV), ("log.jsonl", '{"user_id": "u", "item_id": "i", "t": 5}\n', JSON)],
)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_splits_change_no_row_of_any_text(name, start, pieces, data):
    body = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=40)))
    cut = data.draw(st.integers(1, 30))
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(start.encode() + body.encode() + data.draw(st.sampled_from([b"", b"\xff", b"\n"])))
        try:
            whole = read(path, 1 << 20)
        except UsageError as error:
            assert "quoted_newlines" in str(error)  # noqa: PT017 - the only refusal these texts can meet
            return
        assert read(path, cut) == whole
        assert len(whole[0]) >= 1 or whole[1]
