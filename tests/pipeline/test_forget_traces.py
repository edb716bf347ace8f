"""Users among rejected rows of logs and in files of older versions: found whatever they are called, and each looked at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypipe.data.rejects import line_json, row_json
from raypipe.pipeline.forget_traces import Sought
from raypipe.storage.schemas import REJECTS
from raypipe.storage.tables import StagedFile, Table
from raypipe.storage.workspace import Workspace
from tests.made import make_ready

USERS = [f"member {n}@example.org" for n in range(5_000)]
ODD = ["Олег", "🎬", "--", 'a"b', "tab\there", "17", "漢 字", "back\\slash", "x-1", "1-x", "end\u2028"]


def rejects(rows: list[str]) -> pa.Table:
    return pa.table({**{field.name: pa.nulls(len(rows), field.type) for field in REJECTS.columns}, "row": rows})


def plainly(row: str, users: list[str]) -> bool:
    """Whether a row is of one of the users, one by one."""
    told = json.loads(row)
    if set(told) == {"line"}:
        return any(re.search(rf"(?<!\w){re.escape(user)}(?!\w)", told["line"]) for user in users)
    return any(str(value) in users for value in told.values())


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rows that are looked at one by one from here on."""
    rows: list[str] = []
    look = Sought._is_theirs

    def watched(self: Sought, row: str, words: Any) -> bool:
        rows.append(row)
        return look(self, row, words)

    monkeypatch.setattr(Sought, "_is_theirs", watched)
    return rows


def test_of_many_rows_those_alone_are_looked_at_that_hold_a_word_of_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = looked_at(monkeypatch)
    others = [{"user_id": f"member {n}@example.org", "item_id": "i", "t": "noon"} for n in range(5_000, 25_000)]
    rows = [row_json(row) if n % 2 else line_json(f"{row['user_id']},i".encode()) for n, row in enumerate(others)]
    rows[7] = row_json({"user_id": USERS[4_321], "item_id": "i", "t": "noon"})
    rows[8] = line_json(f"i;{USERS[17]};".encode())
    rows[9] = line_json(f"a{USERS[18]}".encode())  # a longer word before it: somebody else
    rows[10] = line_json(f"i,{USERS[19]}a".encode())
    rows[11] = line_json(b"19 things")
    stay = Sought(Workspace("unused"), USERS).rejects_to_keep(rejects(rows), "histories")
    assert np.flatnonzero(~stay).tolist() == [7, 8]
    assert looked == rows[7:12]


@pytest.mark.parametrize("user", ODD)
def test_an_id_is_found_whatever_it_is_made_of(user: str) -> None:
    around = ["", " ", ",", "\t", '"', "\\", "a", "_", "я", "1", "…", "\u2028", "é"]
    lines = [f"{before}{user}{after}" for before in around for after in around]
    rows = [line_json(line.encode()) for line in lines] + [row_json({"user_id": line, "item_id": 3}) for line in lines]
    rows += [row_json({"user_id": 17.0, "item_id": 3}), row_json({"user_id": 17, "item_id": 3}), row_json({})]
    stay = Sought(Workspace("unused"), [user, "nobody"]).rejects_to_keep(rejects(rows), "histories")
    expected = [not plainly(row, [user]) for row in rows]
    expected[-3] = user != "17"  # a whole number is an id without its point
    assert stay.tolist() == expected
    assert 0 < np.count_nonzero(~stay) < len(rows)


def test_a_file_that_many_versions_share_is_read_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ready(str(tmp_path))
    workspace = Workspace(str(tmp_path))
    table = workspace.tables["histories"]
    first = table.version()
    for number in range(2, 6):
        rows = table.read(first, table.spec.columns.names, bucket=0)
        staged = table.stage(rows, f"again-{number}", {"bucket": 0})
        table.publish([staged], mode="overwrite", app="again", number=number, replaces=[{"bucket": 0}])
    read: list[str] = []
    read_files = Table.read_files

    def watched(self: Table, files: Iterator[StagedFile], columns: Any = None) -> pa.Table:
        found = list(files)
        read.extend(file.path for file in found)
        return read_files(self, found, columns)

    monkeypatch.setattr(Table, "read_files", watched)
    versions = range(first, table.version() + 1)
    strangers = Sought(workspace, [f"stranger {n}" for n in range(50)])
    assert not any(strangers.are_in("histories", version) for version in versions for _ in range(3))
    # Three buckets that stayed, and five files of the one that was written again.
    assert len(read) == len(set(read)) == 3 + len(versions)
    assert all(Sought(workspace, ["u1"]).are_in("histories", version) for version in versions)
