"""Splits of a log: small values that the driver sends to workers, and how a worker reads one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raypipe.data.columnar import BATCH_ROWS, read_row_groups
from raypipe.data.delimited import Dialect, parse_delimited
from raypipe.data.events import EventRules, LogChunk, cast_events
from raypipe.data.files import explained
from raypipe.data.jsonlines import JsonType, parse_json_lines
from raypipe.data.lines import BLOCK_BYTES, RawRows, record_blocks

Reader = Literal["delimited", "jsonl", "columnar"]


@dataclass(frozen=True)
class LogSplit:
    """A part of one file, with everything that a worker needs to read it.

    [start, end) are bytes of text files and row groups of Parquet files. `position` is the byte or row at which it
    starts in the file. `seq` is the position of the file's first byte or row in the whole log. `types` is for JSON
    lines. `constants` is for Parquet and Delta: columns that folder names or the table define and the file does not
    hold.
    """

    index: int
    uri: str
    name: str
    reader: Reader
    start: int
    end: int
    position: int
    seq: int
    rules: EventRules
    dialect: Dialect | None = None
    types: dict[str, JsonType] | None = None
    constants: dict[str, str | None] | None = None


def read_split(split: LogSplit) -> Iterator[LogChunk]:
    """Yield the checked rows of `split` in log order, at most about 500,000 at a time.

    The borders of chunks and splits change no row. Raises UsageError if the file is truncated or does not exist.
    """
    for raw in read_rows(split):
        yield cast_events(raw, split.rules, split.seq, split.name)


def read_rows(split: LogSplit, block_bytes: int = BLOCK_BYTES, batch_rows: int = BATCH_ROWS) -> Iterator[RawRows]:
    """Yield the rows of `split` as in its file, in pieces of `block_bytes` of text or `batch_rows` rows of Parquet."""
    columns = split.rules.columns
    if split.reader == "columnar":
        groups = range(split.start, split.end)
        yield from read_row_groups(split.uri, columns, split.constants or {}, groups, split.position, batch_rows)
        return
    delimiter = split.dialect.breaking if split.dialect is not None else None
    with explained(split.uri):
        for at, block in record_blocks(split.uri, split.start, split.end, delimiter, block_bytes):
            if split.reader == "jsonl":
                assert split.types is not None
                yield parse_json_lines(block, at, split.types)
            else:
                assert split.dialect is not None
                yield parse_delimited(block, at, split.dialect, columns)
