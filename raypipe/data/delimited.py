"""Delimited text: comma- and tab-separated values, and MovieLens' `::` and pipes.

Arrow parses blocks of records. If Arrow finds another number of records than there are, because a quote is never
closed, the block is parsed record by record (about 0.7 M rows/s), so that a broken line spoils only itself. Every line
of a broken record becomes a rejected row: a quote that swallows half a file shows in the number of rejects.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from raypipe.data.lines import RawRows, record_starts
from raypipe.data.rejects import Reject, line_json

# Replaces a delimiter of two characters while Arrow parses, because Arrow supports only single characters.
_UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Dialect:
    """How a delimited file is written. `columns` are all its columns, in order."""

    columns: tuple[str, ...]
    delimiter: str = ","
    quoting: bool = True
    quoted_newlines: bool = False

    @property
    def breaking(self) -> str | None:
        """The delimiter if quoted fields may hold line breaks, else None.

        It is then needed to find the ends of records.
        """
        return self.delimiter if self.quoted_newlines else None


def parse_delimited(block: bytes, at: int, dialect: Dialect, wanted: list[str]) -> RawRows:
    """Parse the records of `block`, which starts at byte `at` of its file.

    Columns `wanted` are returned as unchecked binary.
    """
    starts, ends = record_starts(block, dialect.breaking)
    if not starts.size:
        return RawRows(_empty(wanted), starts, [])
    wrong: list[tuple[int, int]] = []

    def note(row: arrow_csv.InvalidRow) -> str:
        wrong.append((row.number - 1, row.actual_columns))
        return "skip"

    # Arrow passes malformed rows to `note` as text, which fails for bytes that are not UTF-8. Without `note` it gives
    # up.
    table, ended = _parse_with_arrow(block, dialect, wanted, note if _is_utf8(block) else None)
    if table is None or table.num_rows + len(wrong) != starts.size or not ended:
        return _parse_each(block, at, starts, ends, dialect, wanted)
    rejects = [
        reject
        for row, fields in wrong
        for reject in _rejected(block, at, int(starts[row]), int(ends[row]), _wrong_width(fields, dialect))
    ]
    positions = np.delete(starts, [row for row, _ in wrong]) + at
    return RawRows(table, positions, rejects)


def _parse_with_arrow(
    block: bytes, dialect: Dialect, wanted: list[str], note: object | None
) -> tuple[pa.Table | None, bool]:
    """The rows of `block` (None if it is broken), and whether the block ends outside of quotes.

    A row of our own after the last one shows that: an unclosed quote swallows it.
    """
    delimiter = dialect.delimiter
    block += f"\n{delimiter.join(['.'] * len(dialect.columns))}\n".encode()
    if len(delimiter) > 1:
        block, delimiter = block.replace(delimiter.encode(), _UNIT_SEPARATOR.encode()), _UNIT_SEPARATOR
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(block),
            arrow_csv.ReadOptions(column_names=dialect.columns, use_threads=False, block_size=len(block) + 1),
            arrow_csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if dialect.quoting else False,
                newlines_in_values=dialect.quoted_newlines,
                invalid_row_handler=note,
            ),
            arrow_csv.ConvertOptions(
                column_types={name: pa.binary() for name in wanted},
                include_columns=wanted,
                strings_can_be_null=False,
                check_utf8=False,
            ),
        )
    except pa.ArrowInvalid:
        return None, False
    ended = table.num_rows > 0 and table.column(0)[-1].as_py() == b"."
    return table.slice(0, max(table.num_rows - 1, 0)), ended


def _parse_each(
    block: bytes, at: int, starts: np.ndarray, ends: np.ndarray, dialect: Dialect, wanted: list[str]
) -> RawRows:
    """The same as `parse_delimited`, one record at a time."""
    places = [dialect.columns.index(name) for name in wanted]
    values: list[list[bytes]] = [[] for _ in wanted]
    good: list[int] = []
    rejects: list[Reject] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        record = block[start:end]
        try:
            fields = _fields(record, dialect)
        except csv.Error as error:
            rejects += _rejected(block, at, start, end, str(error))
            continue
        if len(fields) != len(dialect.columns):
            rejects += _rejected(block, at, start, end, _wrong_width(len(fields), dialect))
            continue
        good.append(at + start)
        for place, column in zip(places, values, strict=True):
            column.append(fields[place])
    table = pa.table([pa.array(column, pa.binary()) for column in values], names=wanted)
    return RawRows(table, np.array(good, np.int64), rejects)


def _rejected(block: bytes, at: int, start: int, end: int, message: str) -> list[Reject]:
    """A reject for each line of the broken record block[start:end]."""
    record = block[start:end]
    lines = zip(*record_starts(record), strict=True)
    return [
        Reject(int(at + start + first), "malformed_row", message, line_json(record[first:last]))
        for first, last in lines
    ]


def _fields(record: bytes, dialect: Dialect) -> list[bytes]:
    # latin-1 maps every byte to one character and back, so the bytes stay as they are.
    text = record.rstrip(b"\r\n").decode("latin-1")
    if not dialect.quoting:
        return [field.encode("latin-1") for field in text.split(dialect.delimiter)]
    # Not splitlines(): it also breaks at \x85, which is a byte of many UTF-8 characters.
    lines = [line + "\n" for line in text.split("\n")]
    # Arrow reads `"a"b` as ab, and so does a non-strict csv reader. A line of our own after the record shows whether
    # its last quote was closed: if not, that line becomes part of the record.
    rows = list(csv.reader([*lines, "."], delimiter=dialect.delimiter))
    if len(rows) != 2:
        raise csv.Error("a quote is not closed in its line; line breaks in quotes need log.quoted_newlines: true")
    return [field.encode("latin-1") for field in rows[0]]


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _wrong_width(fields: int, dialect: Dialect) -> str:
    return f"the line has {fields} columns, the file {len(dialect.columns)}"


def _empty(wanted: list[str]) -> pa.Table:
    return pa.table([pa.array([], pa.binary()) for _ in wanted], names=wanted)
