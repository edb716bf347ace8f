"""Delta tables: pinned reads by file list, staged Parquet, and one transaction per publish.

A worker only stages files: they lie in the table's folder, and readers do not see them until the driver's commit names
them. The commit replaces exactly the partitions it names. It carries an application transaction `(app, number)`, so
that a publish that is repeated after a crash is recognised and skipped (Delta itself does not refuse a repeated
number).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, create_table_with_add_actions

from raypipe.errors import RaypipeError
from raypipe.storage.schemas import TableSpec
from raypipe.storage.store import Store, check_endpoint

ABSENT = -1
_ROW_GROUP = 8192
# Delta would drop old versions after 30 days, but `vacuum` decides how long a night is kept.
_AFTER_COMMIT = PostCommitHookProperties(cleanup_expired_logs=False)
_SAFE = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class StagedFile:
    """One Parquet file of a table: path below the table's folder, bytes, rows, SHA-256, partition values as text."""

    path: str
    size: int
    rows: int
    checksum: str = ""
    partition: Mapping[str, str] = field(default_factory=dict)


class Table:
    """One Delta table of a workspace. Its folder is `tables/<name>` unless another one is given."""

    def __init__(self, store: Store, spec: TableSpec, folder: str = "") -> None:
        self.store = store
        self.spec = spec
        self.folder = folder or f"tables/{spec.name}"
        self._files: dict[int, list[StagedFile]] = {}

    @property
    def uri(self) -> str:
        return self.store.object_uri(self.folder)

    def version(self) -> int:
        """The newest version, or `ABSENT` if the table does not exist."""
        newest = self._open()
        return ABSENT if newest is None else int(newest.version())

    def files(self, version: int, **partition: str | int) -> list[StagedFile]:
        """The data files of `version`, only those with the given partition values."""
        if version == ABSENT:
            return []
        wanted = {name: str(value) for name, value in partition.items()}
        assert set(wanted) <= set(self.spec.partition_by), f"{self.spec.name} is not partitioned by {partition}"
        return [file for file in self._all_files(version) if wanted.items() <= dict(file.partition).items()]

    def paths(self, version: int, **partition: str | int) -> set[str]:
        """The paths of these data files. Equal paths hold equal rows."""
        return {file.path for file in self.files(version, **partition)}

    def partitions(self, version: int, **partition: str | int) -> list[tuple[dict[str, str | int], list[StagedFile]]]:
        """The data files of `version`, grouped by partition, only those with the given partition values."""
        found: dict[tuple[tuple[str, str], ...], list[StagedFile]] = {}
        for file in self.files(version, **partition):
            found.setdefault(tuple(file.partition.items()), []).append(file)
        return [(dict(values), files) for values, files in found.items()]

    def read(self, version: int, columns: Sequence[str] | None = None, **partition: str | int) -> pa.Table:
        """The rows of `version` in the given partitions, in the table's schema."""
        return self.read_files(self.files(version, **partition), columns)

    def read_files(self, files: Iterable[StagedFile], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of data files of this table, cast to its schema, with the partition columns."""
        schema = self.spec.schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        in_file = [name for name in schema.names if name not in self.spec.partition_by]
        parts = [self._read_file(file, schema, in_file) for file in files]
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def rows(self, version: int) -> int:
        """The number of rows of `version`."""
        return sum(file.rows for file in self.files(version))

    def commit_digest(self, version: int) -> str:
        """32 hex digits of a hash over the log's entry of this version's commit.

        The entry holds the commit's time. So versions of different tables have different digests, even if a table was
        created anew or restored from a backup and counts the same version numbers again.
        """
        commit = self.store.get(f"{self.folder}/_delta_log/{version:020d}.json")
        return hashlib.sha256(commit or b"").hexdigest()[:32]

    def stage(self, rows: pa.Table, name: str, partition: Mapping[str, str | int] | None = None) -> StagedFile:
        """Write `rows` (without partition columns) as one data file that no reader sees before `publish`.

        The file is called `name`, which must differ between attempts. Raises ArrowInvalid if the rows do not fit the
        table's schema.
        """
        values = {key: str((partition or {})[key]) for key in self.spec.partition_by}
        assert all(_SAFE.fullmatch(value) for value in values.values()), f"unsafe partition value in {values}"
        folder = "".join(f"{key}={value}/" for key, value in values.items())
        path = f"{folder}{name}.parquet"
        rows = rows.select(self.spec.columns.names).cast(self.spec.columns)
        buffer = pa.BufferOutputStream()
        leaves = _leaves(rows.schema)
        # Times are nearly all different and nearly sorted: a dictionary of them is wasted work, but their differences
        # are small.
        deltas = {name: "DELTA_BINARY_PACKED" for name, kind in leaves.items() if kind == pa.int64()}
        # A dictionary of states and scores takes five times the time and half as much space again.
        repeated = [name for name, kind in leaves.items() if name not in deltas and not pa.types.is_floating(kind)]
        pq.write_table(
            rows,
            buffer,
            compression="zstd",
            row_group_size=_ROW_GROUP,
            use_dictionary=repeated,
            column_encoding=deltas,
        )
        data = buffer.getvalue().to_pybytes()
        self.store.put(f"{self.folder}/{path}", data)
        return StagedFile(path, len(data), rows.num_rows, hashlib.sha256(data).hexdigest(), values)

    def unneeded(self, keep: Iterable[int], grace_hours: int = 0) -> list[StagedFile]:
        """The files in the table's folder that neither the newest version nor the versions in `keep` name.

        Files that were replaced or staged within the last `grace_hours` are not among them.
        """
        newest, entries = self._open(), self.store.list(self.folder)
        if newest is None:
            before = time.time() - 3600 * grace_hours
            old = (entry for entry in entries if entry.modified <= before)
            return [StagedFile(entry.path.removeprefix(f"{self.folder}/"), entry.size, 0) for entry in old]
        # Versions that are no longer in the log cannot be kept.
        kept = {version for version in set(keep) - {ABSENT} if self._open(version) is not None}
        versions = sorted({*kept, int(newest.version())})
        # A dry run commits nothing. A commit would make a new version of equal rows, which every job that compares
        # versions would take for new data.
        paths = newest.vacuum(
            grace_hours, dry_run=True, enforce_retention_duration=False, full=True, keep_versions=versions
        )
        sizes = {entry.path: entry.size for entry in entries}
        return [
            StagedFile(path, sizes[f"{self.folder}/{path}"], 0) for path in paths if f"{self.folder}/{path}" in sizes
        ]

    def remove(self, files: Iterable[StagedFile]) -> None:
        """Delete files from the table's folder. The caller must know that no version that is still read names them."""
        self.store.delete(f"{self.folder}/{file.path}" for file in files)

    def published_number(self, app: str) -> int:
        """The number of the newest application transaction of `app`, or 0 if there is none."""
        newest = self._open()
        return int((newest.transaction_version(app) if newest is not None else None) or 0)

    def check_staged(self, staged: Iterable[StagedFile]) -> None:
        """Raise RaypipeError if a staged file is missing or truncated."""
        files = list(staged)
        with ThreadPoolExecutor(16) as readers:
            sizes = list(readers.map(lambda file: self.store.size(f"{self.folder}/{file.path}"), files))
        for file, size in zip(files, sizes, strict=True):
            if size != file.size:
                raise RaypipeError(
                    f"The staged file {file.path} of table {self.spec.name} is missing or not {file.size} bytes long.",
                    "Something outside raypipe changed it. Nothing of this table was published; look up the run with "
                    "`raypipe status`, give it up with `raypipe status --discard KEY` and submit again.",
                )

    def publish(
        self,
        staged: Sequence[StagedFile],
        *,
        mode: str,
        app: str,
        number: int,
        replaces: Sequence[Mapping[str, str | int]] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Commit the staged files in one transaction and return the table's version.

        `mode` is "append", or "overwrite", which replaces exactly the partitions in `replaces` (everything if the table
        has no partitions). A transaction that was committed before is skipped. Raises RaypipeError if a staged file is
        missing or truncated, or if another writer committed first.
        """
        if self.published_number(app) >= number:
            return self.version()
        self.check_staged(staged)
        adds = [
            AddAction(
                file.path,
                file.size,
                dict(file.partition),
                int(time.time() * 1000),
                True,
                json.dumps({"numRecords": file.rows}),
            )
            for file in staged
        ]
        properties = CommitProperties(
            custom_metadata=dict(metadata or {}), max_commit_retries=0, app_transactions=[Transaction(app, number)]
        )
        newest = self._open()
        partition_by = list(self.spec.partition_by)
        try:
            if newest is None:
                create_table_with_add_actions(
                    self.uri,
                    Schema.from_arrow(self.spec.schema),
                    adds,
                    mode="error",
                    partition_by=partition_by,
                    commit_properties=properties,
                    post_commithook_properties=_AFTER_COMMIT,
                )
            else:
                self._add_columns(newest)
                newest.create_write_transaction(
                    [*adds],
                    mode,
                    self.spec.schema,
                    partition_by=partition_by,
                    partition_filters=_filters(replaces) if mode == "overwrite" else None,
                    commit_properties=properties,
                    post_commithook_properties=_AFTER_COMMIT,
                )
        except DeltaError as error:
            # The answer to a commit may be lost. The commit is then tried again, and the store says that it exists
            # already.
            if not self._has_committed(staged, app, number):
                raise RaypipeError(
                    f"Another writer changed table {self.spec.name} during this publish ({error}).",
                    "Nothing of this table was published; submit again.",
                ) from error
        return self.version()

    def _has_committed(self, staged: Sequence[StagedFile], app: str, number: int) -> bool:
        """Whether the newest version was committed by this transaction and contains all these staged files."""
        version = self.version()
        if version == ABSENT or self.published_number(app) != number:
            return False
        return {file.path for file in staged} <= {file.path for file in self._all_files(version)}

    def _add_columns(self, newest: DeltaTable) -> None:
        """Add the columns that the schema has gained to the log, in a separate commit.

        An append cannot add columns.
        """
        known = {column.name for column in newest.schema().fields}
        if gained := [column for column in Schema.from_arrow(self.spec.schema).fields if column.name not in known]:
            newest.alter.add_columns(gained, post_commithook_properties=_AFTER_COMMIT)

    def _open(self, version: int | None = None) -> DeltaTable | None:
        if self.store.is_local and not self.store.local_path(f"{self.folder}/_delta_log").exists():
            return None
        if not self.store.is_local:
            check_endpoint()
        try:
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            return None

    def _all_files(self, version: int) -> list[StagedFile]:
        if version in self._files:
            return self._files[version]
        table = self._open(version)
        assert table is not None, f"version {version} of {self.spec.name} is gone"
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        files = (
            StagedFile(
                action["path"],
                int(action["size_bytes"]),
                int(action["num_records"]),
                partition={key: str(action[f"partition.{key}"]) for key in self.spec.partition_by},
            )
            for action in actions
        )
        self._files[version] = sorted(files, key=lambda file: file.path)
        return self._files[version]

    def _read_file(self, file: StagedFile, schema: pa.Schema, in_file: list[str]) -> pa.Table:
        with self.store.open_input(f"{self.folder}/{file.path}") as source:
            parquet = pq.ParquetFile(source, pre_buffer=True)
            there = set(parquet.schema_arrow.names)
            rows = parquet.read([name for name in in_file if name in there], use_threads=False)
        for name in schema.names:
            if name in self.spec.partition_by:
                value = pa.scalar(file.partition[name]).cast(schema.field(name).type)
                rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
            elif name not in there:  # the file was written before the column was added
                rows = rows.append_column(name, pa.nulls(rows.num_rows, schema.field(name).type))
        return rows.select(schema.names).cast(schema)


def _leaves(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The names that Parquet gives the leaf columns of the schema, with their types."""
    leaves: dict[str, pa.DataType] = {}
    for column in schema:
        if pa.types.is_map(column.type):
            leaves[f"{column.name}.key_value.key"] = column.type.key_type
            leaves[f"{column.name}.key_value.value.list.element"] = column.type.item_type.value_type
        elif pa.types.is_list(column.type):
            leaves[f"{column.name}.list.element"] = column.type.value_type
        else:
            leaves[column.name] = column.type
    return leaves


def _filters(replaces: Sequence[Mapping[str, str | int]]) -> list[tuple[str, str, Any]] | None:
    """Delta's filter for a set of partitions that differ in at most one column."""
    if not replaces:
        return None
    columns = list(replaces[0])
    filters: list[tuple[str, str, Any]] = []
    for column in columns:
        values = sorted({str(partition[column]) for partition in replaces})
        filters.append((column, "=", values[0]) if len(values) == 1 else (column, "in", values))
    varying = [column for column in columns if len({str(partition[column]) for partition in replaces}) > 1]
    assert len(varying) <= 1, f"one publish replaces partitions along one column, not {varying}"
    return filters
