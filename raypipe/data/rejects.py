"""Rows that cannot be used, each with its key, its reason and the row itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAX_ID_BYTES = 1024
MAX_VALUE_CHARACTERS = 2000

REJECTS = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("key", "reason", "message", "row")],
)


@dataclass(frozen=True)
class Reject:
    """One unusable row.

    `position` is its byte (text formats) or row number (Parquet) in its file. `user` is the row's user id: "" if the
    row names none, None if it never became columns.
    """

    position: int
    reason: str
    message: str
    row: str
    user: str | None = None


def row_json(row: Mapping[str, Any]) -> str:
    """`row` as JSON text. Bytes that are not UTF-8 become backslash escapes; values are cut after 2,000 characters."""
    return json.dumps({name: _readable(value) for name, value in row.items()}, ensure_ascii=False)


def line_json(line: bytes) -> str:
    """A line that never became columns, as the JSON text of a row."""
    return row_json({"line": line.rstrip(b"\r\n")})


def reject_table(rejects: Iterable[Reject], file_name: str) -> pa.Table:
    """`rejects` with the columns of REJECTS, ordered by position. The key is file name + ":" + position."""
    ordered = sorted(rejects, key=lambda reject: reject.position)
    rows = [
        {"key": f"{file_name}:{bad.position}", "reason": bad.reason, "message": bad.message, "row": bad.row}
        for bad in ordered
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [_readable(part) for part in value]
    text = str(value)
    # JSON can spell a lone surrogate, but UTF-8 cannot encode it.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "…"
