"""Parquet files and Delta tables, streamed: a huge row group needs no more memory than a small one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from raypipe.data.files import FoundFile, explained, find_files, is_s3, open_file
from raypipe.data.lines import RawRows
from raypipe.errors import UsageError
from raypipe.storage.store import check_endpoint

BATCH_ROWS = 1 << 18

# Column chunks are read through a buffer of this size instead of whole: a row group of gigabytes stays affordable.
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class ColumnarFile:
    """A Parquet file. `constants` are columns that its folder or table defines and the file itself does not hold."""

    file: FoundFile
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    constants: dict[str, str | None]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def columns(self) -> list[str]:
        return [*self.schema.names, *(name for name in self.constants if name not in self.schema.names)]


def parquet_files(path: str) -> list[ColumnarFile]:
    """The Parquet files at `path`. Folders named `name=value` become constant columns.

    Raises UsageError if they cannot be read.
    """
    return [_columnar(file, _folder_values(file.name)) for file in find_files(path)]


def is_delta(path: str) -> bool:
    """Whether `path` is a folder with a Delta log."""
    if is_s3(path):
        check_endpoint()
        with explained(path):
            return DeltaTable.is_deltatable(path, storage_options={})
    return os.path.isdir(os.path.join(path, "_delta_log"))  # noqa: PTH112, PTH118 - an s3:// prefix is no Path


def delta_files(path: str) -> list[ColumnarFile]:
    """The files of the newest version of the Delta table at `path`, sorted by name.

    Raises UsageError if there is no table, or if it uses deletion vectors or column mapping, because its files alone
    are then not enough to read it.
    """
    if is_s3(path):
        check_endpoint()
    try:
        table = DeltaTable(path)
    except TableNotFoundError as error:
        raise UsageError(f"There is no Delta table at {path}.", "Check the path, or set another format.") from error
    except (DeltaError, OSError) as error:
        raise UsageError(f"The Delta table at {path} cannot be opened: {error}.", "Check path and access.") from error
    hard = {"deletionVectors", "columnMapping"} & set(table.protocol().reader_features or [])
    if hard:
        raise UsageError(
            f"The Delta table at {path} uses {' and '.join(sorted(hard))}, which raypipe does not read.",
            "Rewrite the table without (REORG TABLE … APPLY (PURGE)), or export it as Parquet.",
        )
    table_columns = [field.name for field in table.schema().fields]
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    constants = {
        action["path"]: {
            name.removeprefix("partition."): None if value is None else str(value)
            for name, value in action.items()
            if name.startswith("partition.")
        }
        for action in actions
    }
    sizes = {action["path"]: action["size_bytes"] for action in actions}
    files = []
    for name in sorted(sizes):
        uri = name if "://" in name else f"{path}/{unquote(name)}"
        file = _columnar(FoundFile(uri, name, sizes[name]), constants[name])
        # A column that was added to the table later is null in older files.
        absent: dict[str, str | None] = {column: None for column in table_columns if column not in file.columns}
        files.append(ColumnarFile(file.file, file.schema, file.group_rows, file.group_bytes, file.constants | absent))
    return files


def read_row_groups(
    uri: str, columns: list[str], constants: dict[str, str | None], groups: range, row: int, batch_rows: int
) -> Iterator[RawRows]:
    """Yield `columns` of the row groups `groups` in batches. The first row is number `row` of the file.

    If several columns have the same name, the first one is read, as in CSV.
    """
    with explained(uri), open_file(uri) as source:
        file = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        present = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_rows, row_groups=list(groups), columns=present, use_threads=False):
            table = pa.table(
                {
                    name: batch.column(batch.schema.names.index(name))
                    if name in present
                    else _constant(constants[name], batch.num_rows)
                    for name in columns
                }
            )
            yield RawRows(table, np.arange(row, row + batch.num_rows, dtype=np.int64), [])
            row += batch.num_rows


def _columnar(file: FoundFile, constants: dict[str, str | None]) -> ColumnarFile:
    with explained(file.uri), open_file(file.uri) as source:
        metadata = pq.read_metadata(source)
        schema = metadata.schema.to_arrow_schema()
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return ColumnarFile(
        file, schema, tuple(g.num_rows for g in groups), tuple(g.total_byte_size for g in groups), constants
    )


def _folder_values(name: str) -> dict[str, str | None]:
    pairs = (folder.partition("=") for folder in name.split("/")[:-1] if "=" in folder)
    return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for key, _, value in pairs}


def _constant(value: str | None, rows: int) -> pa.Array:
    return pa.nulls(rows, pa.string()) if value is None else pa.repeat(pa.scalar(value, pa.string()), rows)
