"""Spills: one log split, regrouped so that every user bucket finds its rows in one place.

A spill is one Arrow IPC file. Row = one user's events of one chunk, in log order, as lists. Record batch = one *group* of
users, `stable_hash(user_id) % groups`; batches are stored in bit-reversed group order, so that the groups of any smaller
power-of-two bucket count lie side by side. The number of buckets may thus be decided after the first log was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.storage.hashing import U64, stable_hash

MAX_GROUPS = 1024
_ROWS_PER_GROUP = 1024
_SKETCH = 1024

ROW_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("times", pa.list_(pa.int64())),
        ("weights", pa.list_(pa.float32())),
    ]
)


class Spill:
    """Collects the chunks of one split; events must come in log order."""

    def __init__(self) -> None:
        self._chunks: list[tuple[pa.Table, U64]] = []
        self.events = 0

    def add(
        self,
        users: pa.DictionaryArray,
        items: NDArray[np.int32],
        times: NDArray[np.int64],
        weights: NDArray[np.float32],
    ) -> None:
        """Add events: `users` dictionary-encoded, the rest [events] each."""
        if len(users) == 0:
            return
        codes = users.indices.to_numpy(zero_copy_only=False)
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes, minlength=len(users.dictionary))
        present = np.flatnonzero(counts)
        offsets = np.concatenate([[0], np.cumsum(counts[present])]).astype(np.int32)
        names = users.dictionary.take(pa.array(present))
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values[order])) for values in (items, times, weights)]
        self._chunks.append((pa.table([names, *columns], schema=ROW_SCHEMA), stable_hash(names)))
        self.events += len(codes)

    def write(self, groups: int | None = None) -> bytes:
        """The spill file. `groups` is the workspace's bucket count; unset, enough for any later decision."""
        groups = groups or _choose_groups(self.events)
        rows = pa.concat_tables([chunk for chunk, _ in self._chunks]) if self._chunks else ROW_SCHEMA.empty_table()
        hashes = np.concatenate([hashes for _, hashes in self._chunks]) if self._chunks else np.empty(0, np.uint64)
        group = (hashes % np.uint64(groups)).astype(np.int64)
        place = bit_reversed(groups)[group]
        # Stable, so that one user's chunks stay in log order.
        order = np.argsort(place, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=groups))])
        rows = rows.take(pa.array(order)).combine_chunks()
        sink = pa.BufferOutputStream()
        schema = ROW_SCHEMA.with_metadata({"groups": str(groups)})
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, schema, options=options) as writer:
            for start, stop in pairwise(bounds.tolist()):
                for batch in rows.slice(start, stop - start).to_batches() or [
                    pa.RecordBatch.from_pylist([], ROW_SCHEMA)
                ]:
                    writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def sketch(self) -> list[int]:
        """The smallest hashes of the split's users (k minimum values, Bar-Yossef et al. 2002), for `estimate_users`."""
        hashes = [hashes for _, hashes in self._chunks]
        return np.unique(np.concatenate(hashes))[:_SKETCH].tolist() if hashes else []


def estimate_users(sketches: Sequence[Sequence[int]]) -> int:
    """Distinct users over all splits: exact below 1,024, within about 3 % above."""
    smallest = np.unique(np.array([value for sketch in sketches for value in sketch], np.uint64))[:_SKETCH]
    if len(smallest) < _SKETCH:
        return len(smallest)
    return round((_SKETCH - 1) / (float(smallest[-1]) / 2.0**64))


def read_spill(source: pa.NativeFile, bucket: int, buckets: int) -> Iterator[pa.Table]:
    """The rows of one user bucket, in log order within each user."""
    with pa.ipc.open_file(source) as reader:
        groups = int(reader.schema.metadata[b"groups"])
        for place in bucket_places(groups, bucket, buckets):
            batch = reader.get_batch(place)
            if batch.num_rows == 0:
                continue
            rows = pa.Table.from_batches([batch])
            if buckets > groups:
                mine = stable_hash(rows["user_id"].combine_chunks()) % np.uint64(buckets) == bucket
                rows = rows.filter(pa.array(mine))
            yield rows


def bucket_places(groups: int, bucket: int, buckets: int) -> range:
    """The record batches of a bucket: a run of them, or the one that holds it where buckets are finer than groups."""
    if buckets >= groups:
        place = int(bit_reversed(groups)[bucket % groups])
        return range(place, place + 1)
    share = groups // buckets
    start = int(bit_reversed(buckets)[bucket]) * share
    return range(start, start + share)


def bit_reversed(count: int) -> NDArray[np.int64]:
    """`place[g]` is g with its log2(count) bits reversed."""
    bits = count.bit_length() - 1
    assert 1 << bits == count, f"{count} is not a power of two"
    values = np.arange(count)
    reverse = np.zeros(count, np.int64)
    for bit in range(bits):
        reverse |= ((values >> bit) & 1) << (bits - 1 - bit)
    return reverse


def item_table_bytes(item_ids: pa.Array, lanes: NDArray[np.uint64]) -> bytes:
    """The part of the catalogue that ingest's workers need: ids in index order and content hashes ([items, 2])."""
    sink = pa.BufferOutputStream()
    table = pa.table({"item_id": item_ids, "lane0": lanes[:, 0], "lane1": lanes[:, 1]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_item_table(data: bytes) -> tuple[pa.Array, NDArray[np.uint64]]:
    """Back from `item_table_bytes`; lanes get row 0 for the padding index: [items + 1, 2]."""
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    lanes = np.stack([table["lane0"].to_numpy(), table["lane1"].to_numpy()], axis=1)
    return table["item_id"].combine_chunks(), np.concatenate([np.zeros((1, 2), np.uint64), lanes])


def _choose_groups(events: int) -> int:
    groups = 4
    while groups < MAX_GROUPS and groups * _ROWS_PER_GROUP < events:
        groups *= 2
    return groups
