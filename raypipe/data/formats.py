"""The format of a log or a catalogue, and its files as parts that can be read piece by piece."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pyarrow as pa

from raypipe.data.columnar import ColumnarFile, is_delta
from raypipe.data.delimited import Dialect
from raypipe.data.files import FoundFile, explained, find_files, is_compressed, open_stream
from raypipe.data.jsonlines import json_objects
from raypipe.data.lines import UNKNOWN_END, record_blocks
from raypipe.data.movielens import find_layout
from raypipe.data.splits import Reader
from raypipe.errors import UsageError

Format = Literal["auto", "movielens", "csv", "parquet", "jsonl", "delta"]

_ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_SAMPLE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
# A byte of gzip becomes at most 1,032 bytes (deflate's limit). So the next file's position is known without reading
# this one.
_MOST_INFLATED = 1032
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """One file: its columns, how to read it, and the ranges (start, end, position) of its splits.

    `length` is the number of positions that it takes in the log. `schema` is known for Parquet only.
    """

    file: FoundFile
    reader: Reader
    columns: list[str]
    ranges: list[tuple[int, int, int]]
    length: int
    dialect: Dialect | None = None
    constants: dict[str, str | None] | None = None
    schema: pa.Schema | None = None


def detect_format(path: str, part: Literal["ratings", "items"]) -> Format:
    """The format of the files at `path`. Raises UsageError if it cannot be detected."""
    if is_delta(path):
        return "delta"
    files = find_files(path)
    if find_layout(files, part) is not None:
        return "movielens"
    formats = {_format_of(file) for file in [file for file in files if file.size_bytes] or files}
    if len(formats) > 1:
        shown = ", ".join(file.name for file in files[:5])
        raise UsageError(
            f"{path} holds files of several formats ({shown}).", "Name one file, or a glob such as part-*.parquet."
        )
    found = formats.pop() if formats else None
    if found is None:
        raise UsageError(
            f"The format of {path} cannot be told from its name or its first bytes.",
            "Set the format: csv, jsonl, parquet, delta or movielens.",
        )
    return found


def delimited_part(file: FoundFile, delimiter: str | None, quoted_newlines: bool, split_bytes: int) -> Part | None:
    """A CSV file with a header, or None if it is empty. Raises UsageError if its header cannot be read."""
    if delimiter is None:
        delimiter = "\t" if ".tsv" in file.name else ","
    header = _header(file)
    if not header.strip():
        return None
    try:
        text = header.removeprefix(_BOM).decode().rstrip("\r\n")
        columns = next(csv.reader([text], delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"The first line of {file.uri} is no CSV header in UTF-8: {error}.", "Convert the file, or set its format."
        ) from error
    return _text_part(
        file, "delimited", split_bytes, len(header), Dialect(tuple(columns), delimiter, True, quoted_newlines)
    )


def headless_part(file: FoundFile, dialect: Dialect, split_bytes: int) -> Part:
    """A delimited file without a header whose columns are known."""
    return _text_part(file, "delimited", split_bytes, 0, dialect)


def json_part(file: FoundFile, columns: list[str], split_bytes: int) -> Part:
    return _text_part(file, "jsonl", split_bytes, 0, columns=columns)


def columnar_part(columnar: ColumnarFile, split_bytes: int) -> Part:
    """A Parquet file. Neighbouring row groups share a split of up to `split_bytes` of uncompressed data."""
    ranges = []
    start = first_row = row = size = 0
    for group, (rows, bytes_) in enumerate(zip(columnar.group_rows, columnar.group_bytes, strict=True)):
        if group > start and size + bytes_ > split_bytes:
            ranges.append((start, group, first_row))
            start, first_row, size = group, row, 0
        row, size = row + rows, size + bytes_
    if row > first_row:
        ranges.append((start, len(columnar.group_rows), first_row))
    return Part(
        columnar.file,
        "columnar",
        columnar.columns,
        ranges,
        row,
        constants=columnar.constants,
        schema=columnar.schema,
    )


def json_sample(files: list[FoundFile]) -> list[dict[str, Any]]:
    """The objects in the first MiB of the first file that has any there; empty if no file has."""
    for file in files:
        with explained(file.uri):
            for _, block in record_blocks(file.uri, 0, UNKNOWN_END, block_bytes=_SAMPLE_BYTES):
                if rows := json_objects(block):
                    return rows
                break
    return []


def _text_part(
    file: FoundFile,
    reader: Reader,
    split_bytes: int,
    start: int,
    dialect: Dialect | None = None,
    columns: list[str] | None = None,
) -> Part:
    names = list(dialect.columns) if dialect is not None else columns or []
    if is_compressed(file.name):
        length = file.size_bytes * _MOST_INFLATED
        return Part(file, reader, names, [(start, UNKNOWN_END, start)], length, dialect)
    if dialect is not None and dialect.quoted_newlines:
        split_bytes = max(file.size_bytes, 1)
    borders = [*range(start, file.size_bytes, split_bytes), file.size_bytes]
    ranges = [(low, high, low) for low, high in pairwise(borders)]
    return Part(file, reader, names, ranges, file.size_bytes, dialect)


def _format_of(file: FoundFile) -> Format | None:
    name = file.name.removesuffix(".gz")
    for ending, found in _ENDINGS.items():
        if name.endswith(ending):
            return found
    with explained(file.uri), open_stream(file.uri) as stream:
        first = stream.read(64).removeprefix(_BOM).lstrip()
    if first.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if first.startswith(b"{") else None


def _header(file: FoundFile) -> bytes:
    """The first line with its line break, and with a byte order mark if there is one."""
    with explained(file.uri), open_stream(file.uri) as stream:
        header = b""
        while data := stream.read(64 << 10):
            header += data
            if header.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UsageError(f"{file.uri} is in UTF-16.", "Convert it to UTF-8.")
            end = header.find(b"\n")
            if end >= 0:
                return header[: end + 1]
            if len(header) > _MAX_HEADER_BYTES:
                raise UsageError(f"{file.uri} has no line break in its first MiB.", "Check that it is a CSV file.")
    return header
