"""JSON lines: one object a line.

Arrow parses blocks with the types of the first rows. A block that does not fit (a broken line, or a number where there
were strings) is parsed line by line in Python, about 0.4 M rows/s, so that a broken line spoils only itself.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from raypipe.data.lines import RawRows, record_starts
from raypipe.data.rejects import Reject, line_json

JsonType = Literal["string", "integer", "number"]

_ARROW_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64()}


def parse_json_lines(block: bytes, at: int, types: dict[str, JsonType]) -> RawRows:
    """Parse the lines of `block`, which starts at byte `at` of its file, into the columns of `types`.

    Values are unchecked.
    """
    starts, ends = record_starts(block)
    table = _parse_with_arrow(block, types) if starts.size else None
    if table is None or table.num_rows != starts.size:
        return _parse_each(block, at, starts, ends, list(types))
    return RawRows(table, starts + at, [])


def json_objects(block: bytes) -> list[dict[str, Any]]:
    """The objects among the lines of `block`. Other lines are skipped."""
    starts, ends = record_starts(block)
    rows = (parse_object(block[start:end]) for start, end in zip(starts, ends, strict=True))
    return [row for row in rows if isinstance(row, dict)]


def json_types(rows: list[dict[str, Any]], exact: list[str], numbers: list[str]) -> dict[str, JsonType]:
    """The type with which Arrow should read each column, judged by `rows`.

    Columns of `exact` (ids) are never read as floating point, because that would change large whole numbers.
    """
    types: dict[str, JsonType] = {}
    for name in [*exact, *numbers]:
        kinds = {type(row[name]) for row in rows if row.get(name) is not None}
        if kinds == {int}:
            types[name] = "integer"
        elif kinds and kinds <= {int, float} and name in numbers:
            types[name] = "number"
        else:
            types[name] = "string"
    return types


def scalar_text(value: Any) -> str | None:
    """A JSON value as the text that it has in a table. Raises TypeError for a list or an object."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else pa.scalar(value).cast(pa.string()).as_py()
    raise TypeError(f"a {'list' if isinstance(value, list) else 'nested object'} where one value belongs")


def _parse_with_arrow(block: bytes, types: dict[str, JsonType]) -> pa.Table | None:
    schema = pa.schema([(name, _ARROW_TYPES[kind]) for name, kind in types.items()])
    try:
        return arrow_json.read_json(
            pa.BufferReader(block),
            arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None


def _parse_each(block: bytes, at: int, starts: np.ndarray, ends: np.ndarray, names: list[str]) -> RawRows:
    columns: dict[str, list[bytes | None]] = {name: [] for name in names}
    good, rejects = [], []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        line = block[start:end]
        row = parse_object(line)
        if isinstance(row, Reject):
            rejects.append(Reject(at + start, row.reason, row.message, line_json(line)))
            continue
        try:
            texts = [scalar_text(row.get(name)) for name in names]
        except TypeError as error:
            rejects.append(Reject(at + start, "malformed_row", str(error), line_json(line)))
            continue
        good.append(at + start)
        for name, text in zip(names, texts, strict=True):
            # A lone surrogate stays bytes that are not UTF-8, and is rejected as such.
            columns[name].append(None if text is None else text.encode(errors="surrogatepass"))
    table = pa.table({name: pa.array(values, pa.binary()) for name, values in columns.items()})
    return RawRows(table, np.array(good, np.int64), rejects)


def parse_object(line: bytes) -> dict[str, Any] | Reject:
    """The object of a line, or a Reject that says why there is none.

    The caller fills in the reject's position and row.
    """
    try:
        row = _loaded(line.decode())
    except UnicodeDecodeError:
        return Reject(0, "bad_text", "the line is not valid UTF-8", "")
    except (json.JSONDecodeError, RecursionError) as error:
        return Reject(0, "malformed_row", f"the line is not valid JSON: {error}", "")
    if not isinstance(row, dict):
        return Reject(0, "malformed_row", "the line is not a JSON object", "")
    return row


def _loaded(text: str) -> Any:
    """Parse JSON. Integers with more digits than Python parses become text, so every column judges them as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits
