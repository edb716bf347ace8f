"""The tables of a workspace, with one Arrow schema each. No schema is ever inferred.

Partition columns come last. They are stored in Delta's log, not in the Parquet files. `bucket` is `stable_hash(user_id)
% N`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class TableSpec:
    """A table's name, the columns of its files, its partition columns and its key."""

    name: str
    columns: pa.Schema
    partition_by: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        """The schema that a reader sees: the columns of the files, then the partition columns."""
        return pa.schema([*self.columns, *(pa.field(name, _PARTITION_TYPES[name]) for name in self.partition_by)])


_PARTITION_TYPES = {"variant": pa.string(), "bucket": pa.int32(), "table": pa.string()}


def _spec(
    name: str, columns: list[tuple[str, pa.DataType]], partition_by: tuple[str, ...], key: tuple[str, ...]
) -> TableSpec:
    return TableSpec(name, pa.schema(columns), partition_by, key)


_STATE = pa.list_(pa.float32())

LOGS = _spec(
    "logs",
    [
        ("uri", pa.string()),
        ("checksum", pa.string()),
        ("ingest", pa.int32()),
        ("rows_in", pa.int64()),
        ("rows_ok", pa.int64()),
        ("rows_rejected", pa.int64()),
        ("rows_duplicate", pa.int64()),
        ("rows_filtered", pa.int64()),
        ("rows_forgotten", pa.int64()),
    ],
    (),
    ("uri", "checksum"),
)
ITEMS = _spec(
    "items",
    [
        ("item_id", pa.string()),
        ("index", pa.int32()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("attributes", pa.map_(pa.string(), pa.list_(pa.string()))),
        ("content_hash", pa.string()),
        ("available", pa.bool_()),
    ],
    (),
    ("item_id",),
)
HISTORIES = _spec(
    "histories",
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("times", pa.list_(pa.int64())),
        ("seqs", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("history_key", pa.string()),
    ],
    ("bucket",),
    ("user_id",),
)
# `position` is the place, from 0 and in the whole history, of the last event that the state has read.
HIDDEN_STATES = _spec(
    "hidden_states",
    [("user_id", pa.string()), ("position", pa.int32()), ("state", _STATE), ("change_key", pa.string())],
    ("variant", "bucket"),
    ("variant", "user_id", "position"),
)
ITEM_STATES = _spec(
    "item_states", [("item_index", pa.int32()), ("state", _STATE)], ("variant",), ("variant", "item_index")
)
BLOCK_SUMMARIES = _spec(
    "block_summaries",
    [
        ("user_id", pa.string()),
        ("level", pa.int32()),
        ("block", pa.int32()),
        ("block_key", pa.string()),
        ("text", pa.string()),
    ],
    ("variant", "bucket"),
    ("variant", "user_id", "level", "block"),
)
SUMMARIES = _spec(
    "summaries",
    [
        ("user_id", pa.string()),
        ("summary", pa.string()),
        ("carry", pa.string()),
        ("covered", pa.int32()),
        ("covered_key", pa.string()),
        ("calls", pa.int32()),
        ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()),
        ("change_key", pa.string()),
    ],
    ("variant", "bucket"),
    ("variant", "user_id"),
)
RECOMMENDATIONS = _spec(
    "recommendations",
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("change_key", pa.string()),
    ],
    ("variant", "bucket"),
    ("variant", "user_id"),
)
EXPLANATIONS = _spec(
    "explanations",
    [
        ("user_id", pa.string()),
        ("item_index", pa.int32()),
        ("decision", pa.string()),
        ("text", pa.string()),
        ("change_key", pa.string()),
    ],
    ("variant", "bucket"),
    ("variant", "user_id", "item_index"),
)
REJECTS = _spec(
    "rejects",
    [
        ("run_key", pa.string()),
        ("key", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("row", pa.string()),
        ("attempts", pa.int32()),
        ("variant", pa.string()),
        ("change_key", pa.string()),
    ],
    ("table",),
    ("run_key", "table", "key"),
)
TOMBSTONES = _spec("tombstones", [("hash", pa.int64()), ("digest", pa.string())], (), ("digest",))

TABLES = {
    spec.name: spec
    for spec in (
        LOGS,
        ITEMS,
        HISTORIES,
        HIDDEN_STATES,
        ITEM_STATES,
        BLOCK_SUMMARIES,
        SUMMARIES,
        RECOMMENDATIONS,
        EXPLANATIONS,
        REJECTS,
        TOMBSTONES,
    )
}
