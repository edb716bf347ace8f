"""The rows of a catalogue of any format, as one table of text, numbers and lists of text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.casting import flat, is_text, to_text
from raypipe.data.columnar import BATCH_ROWS, ColumnarFile, delta_files, parquet_files, read_row_groups
from raypipe.data.delimited import parse_delimited
from raypipe.data.files import FoundFile, explained, find_files
from raypipe.data.formats import Format, Part, delimited_part
from raypipe.data.jsonlines import parse_object, scalar_text
from raypipe.data.lines import UNKNOWN_END, RawRows, record_blocks, record_starts
from raypipe.data.movielens import Movie, find_layout, read_movies
from raypipe.data.rejects import Reject, line_json, reject_table, row_json
from raypipe.errors import UsageError


@dataclass(frozen=True)
class ItemRows:
    """Rows of a catalogue, the file of each and its position in that file, and the rejected rows."""

    table: pa.Table
    files: pa.Array
    positions: np.ndarray
    rejects: pa.Table


def read_item_rows(path: str, format_: Format, delimiter: str | None) -> ItemRows:
    """All rows at `path`. Columns are string, list<string> or numbers. Raises UsageError if they cannot be read."""
    if format_ in ("parquet", "delta"):
        columnar = delta_files(path) if format_ == "delta" else parquet_files(path)
        return _gather([(file.file, _columnar_rows(file)) for file in columnar])
    files = find_files(path)
    if format_ == "movielens":
        found = find_layout(files, "items")
        if found is None:
            raise UsageError(
                f"There is no MovieLens catalogue at {path}.", "It needs u.item, movies.dat or movies.csv as published."
            )
        layout, file = found
        return _gather([(file, _movie_rows(read_movies(layout, file)))])
    if format_ == "jsonl":
        return _gather([(file, _json_rows(file)) for file in files])
    parts = [part for file in files if (part := delimited_part(file, delimiter, True, 1)) is not None]
    return _gather([(part.file, _delimited_rows(part)) for part in parts])


def _gather(pieces: list[tuple[FoundFile, RawRows]]) -> ItemRows:
    checked = [(file, _without_bad_text(rows)) for file, rows in pieces]
    tables = [rows.table for _, rows in checked if rows.table.num_rows] or [rows.table for _, rows in checked[:1]]
    names = [np.full(rows.positions.size, file.name, object) for file, rows in checked]
    with explained(pieces[0][0].uri if pieces else "the catalogue"):
        table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    return ItemRows(
        table.combine_chunks(),
        pa.array(np.concatenate([np.array([], object), *names]), pa.string()),
        np.concatenate([np.array([], np.int64), *(rows.positions for _, rows in checked)]),
        pa.concat_tables([reject_table([], ""), *(reject_table(rows.rejects, file.name) for file, rows in checked)]),
    )


def _without_bad_text(rows: RawRows) -> RawRows:
    """Text columns as strings. Rows with a value that is not UTF-8 become rejects.

    Columns of lists of lists or of lists of records are dropped.
    """
    columns: dict[str, pa.Array] = {}
    bad = np.zeros(rows.table.num_rows, bool)
    for name in rows.table.column_names:
        column = flat(rows.table.column(name))
        if is_text(column.type):
            column, wrong = to_text(column)
            bad |= wrong
        elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            if pa.types.is_nested(column.type.value_type):
                continue
            column = column.cast(pa.list_(pa.string()))
        columns[name] = column
    if not bad.any():
        return RawRows(pa.table(columns), rows.positions, rows.rejects)
    shown = rows.table.filter(pa.array(bad)).to_pylist()
    found = [
        Reject(int(position), "bad_text", "the row is not valid UTF-8", row_json(row))
        for position, row in zip(rows.positions[bad].tolist(), shown, strict=True)
    ]
    return RawRows(pa.table(columns).filter(pa.array(~bad)), rows.positions[~bad], [*rows.rejects, *found])


def _delimited_rows(part: Part) -> RawRows:
    """The rows of a CSV file, whose quoted fields may hold line breaks.

    If some rows are broken, a stray quote may have swallowed lines. Then the file is also read line by line, and the
    reading with more good rows is used.
    """
    quoted = _read_delimited(part, True)
    if not quoted.rejects:
        return quoted
    plain = _read_delimited(part, False)
    return plain if plain.table.num_rows > quoted.table.num_rows else quoted


def _read_delimited(part: Part, quoted_newlines: bool) -> RawRows:
    assert part.dialect is not None
    dialect = replace(part.dialect, quoted_newlines=quoted_newlines)
    ((start, _, _), *_) = part.ranges or [(part.length, 0, 0)]
    with explained(part.file.uri):
        try:
            blocks = list(record_blocks(part.file.uri, start, UNKNOWN_END, dialect.breaking))
        except UsageError:
            # A quote that is never closed makes one endless record; without quotes, records still end with their line.
            blocks = list(record_blocks(part.file.uri, start, UNKNOWN_END))
    wanted = list(dict.fromkeys(part.columns))
    return _joined([parse_delimited(block, at, dialect, wanted) for at, block in blocks], wanted)


def _columnar_rows(file: ColumnarFile) -> RawRows:
    names = file.columns
    groups = range(len(file.group_rows))
    return _joined(list(read_row_groups(file.file.uri, names, file.constants, groups, 0, BATCH_ROWS)), names)


def _joined(pieces: list[RawRows], names: list[str]) -> RawRows:
    tables = [piece.table for piece in pieces] or [pa.table({name: pa.array([], pa.string()) for name in names})]
    return RawRows(
        pa.concat_tables(tables),
        np.concatenate([np.array([], np.int64), *(piece.positions for piece in pieces)]),
        [reject for piece in pieces for reject in piece.rejects],
    )


def _movie_rows(movies: Iterable[Movie | Reject]) -> RawRows:
    found = list(movies)
    good = [movie for movie in found if isinstance(movie, Movie)]
    table = pa.table(
        {
            "item_id": pa.array([movie.item_id for movie in good], pa.string()),
            "title": pa.array([movie.title for movie in good], pa.string()),
            "genre": pa.array([movie.genres for movie in good], pa.list_(pa.string())),
            "year": pa.array([movie.year for movie in good], pa.int32()),
        }
    )
    positions = np.array([movie.position for movie in good], np.int64)
    return RawRows(table, positions, [row for row in found if isinstance(row, Reject)])


def _json_rows(file: FoundFile) -> RawRows:
    rows, positions, rejects = [], [], []
    with explained(file.uri):
        for at, block in record_blocks(file.uri, 0, UNKNOWN_END):
            for start, end in zip(*record_starts(block), strict=True):
                row = parse_object(block[start:end])
                if isinstance(row, Reject):
                    rejects.append(replace(row, position=int(at + start), row=line_json(block[start:end])))
                else:
                    rows.append(row)
                    positions.append(at + start)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})
    return RawRows(table, np.array(positions, np.int64), rejects)


def _json_column(values: list[Any]) -> pa.Array:
    """Text as bytes, or lists of text if any value is a list. Nested objects are null."""
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
        return pa.array([[_text(part) for part in parts] for parts in lists], pa.list_(pa.binary()))
    return pa.array([_text(value) for value in values], pa.binary())


def _text(value: Any) -> bytes | None:
    if isinstance(value, list | dict):
        return None
    text = scalar_text(value)
    # A lone surrogate becomes bytes that are not UTF-8, so its row becomes a reject.
    return None if text is None else text.encode(errors="surrogatepass")
