"""The unit work of `ingest`: a log split becomes a spill, a user bucket merges its share of all spills."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.events import LogChunk
from raypipe.data.histories import merge_histories
from raypipe.data.rejects import REJECTS, row_json
from raypipe.data.spills import Spill, read_item_table, read_spill
from raypipe.data.splits import LogSplit, read_split
from raypipe.pipeline.rejects import reject_rows
from raypipe.runtime.units import UnitContext
from raypipe.storage.fingerprint import schema_hash
from raypipe.storage.ledger import Counts, Receipt, Run, Unit, Usage
from raypipe.storage.schemas import HISTORIES
from raypipe.storage.tombstones import is_forgotten
from raypipe.storage.workspace import Workspace, WorkspaceInfo


class SpillSplit:
    """Phase 1: read a split, reject what cannot be used, and regroup the rest by user."""

    def __init__(
        self, workspace: Workspace, run: Run, splits: Sequence[LogSplit], tombstones: int, groups: int | None
    ) -> None:
        self.workspace = workspace
        self.splits = splits
        self.groups = groups
        self.tombstones = workspace.tables["tombstones"].read(tombstones)
        self.item_ids, _ = read_item_table(workspace.store.read(f"{run.staging}/items.arrow"))

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        spill = Spill()
        rejects: list[pa.Table] = []
        rows_in = filtered = forgotten = 0
        split = self.splits[unit.index]
        for chunk in read_split(split):
            rows_in += chunk.rows_in
            filtered += chunk.filtered
            # First of all, so that a forgotten user's rows do not come back as rejects.
            known, bad = self._without_forgotten(chunk)
            forgotten += chunk.events.num_rows - known.num_rows + chunk.rejects.num_rows - bad.num_rows
            events, unknown = self._index_items(known, split)
            rejects += [bad, unknown]
            columns = (events[name].to_numpy() for name in ("index", "time", "weight"))
            spill.add(events["user_id"].combine_chunks(), *columns)
        data = spill.write(self.groups)
        path = f"{context.run.staging}/spill/{context.file_name()}.arrow"
        self.workspace.store.put(path, data)
        bad = pa.concat_tables(rejects) if rejects else REJECTS.empty_table()
        staged = {}
        if bad.num_rows:
            rows = reject_rows(context.run.run_key, bad)
            staged["rejects"] = [
                self.workspace.tables["rejects"].stage(rows, context.file_name(), {"table": "histories"})
            ]
        return Receipt(
            unit,
            Counts(rows_in, spill.events, bad.num_rows, {"filtered": filtered, "forgotten": forgotten}),
            Usage(seconds=time.monotonic() - started),
            staged,
            facts={
                "spill": path,
                "sketch": spill.sketch(),
                "reasons": dict(collections.Counter(bad["reason"].to_pylist())),
                "example": _example(bad),
            },
            attempt=context.attempt,
        )

    def _without_forgotten(self, chunk: LogChunk) -> tuple[pa.Table, pa.Table]:
        """Events and rejects without those of users who have a tombstone.

        Tombstones are hashes of whole ids, so nobody can tell whether a line that never became columns holds such an
        id. Of such a line only its place and the reason are kept.
        """
        if self.tombstones.num_rows == 0:
            return chunk.events, chunk.rejects
        events = chunk.events.filter(self._are_known(chunk.events["user_id"].combine_chunks()))
        stay = self._are_known(chunk.reject_users.fill_null(""))
        rejects = chunk.rejects.set_column(
            chunk.rejects.column_names.index("row"),
            REJECTS.field("row"),
            pc.if_else(pc.is_null(chunk.reject_users), row_json({}), chunk.rejects["row"]),
        )
        return events, rejects.filter(stay)

    def _are_known(self, users: pa.Array) -> pa.Array:
        """Which users have no tombstone: bool [users]."""
        encoded = users.dictionary_encode()
        return pa.array(~is_forgotten(encoded.dictionary, self.tombstones)[encoded.indices.to_numpy()])

    def _index_items(self, events: pa.Table, split: LogSplit) -> tuple[pa.Table, pa.Table]:
        """Events with their item's index (int32, from 1), and rejects for items the catalogue does not have."""
        items = events["item_id"].combine_chunks().dictionary_encode()
        place = pc.add(pc.index_in(items.dictionary, value_set=self.item_ids), 1).cast(pa.int32())
        index = place.take(items.indices)
        events = events.append_column("index", index)
        if index.null_count == 0:
            return events, REJECTS.empty_table()
        unknown = events.filter(pc.is_null(index))
        rows = [
            {
                "key": f"{split.name}:{row['seq'] - split.seq}",
                "reason": "unknown_item",
                "message": "The catalogue has no such item.",
                "row": row_json({name: row[name] for name in ("user_id", "item_id", "time", "weight")}),
            }
            for row in unknown.to_pylist()
        ]
        return events.filter(pc.is_valid(index)), pa.Table.from_pylist(rows, REJECTS)


class MergeBucket:
    """Phase 2: merge one bucket's rows of every spill with its old histories."""

    def __init__(
        self,
        workspace: Workspace,
        run: Run,
        base: int,
        spills: Sequence[str],
        info: WorkspaceInfo,
        rekey: bool,
    ) -> None:
        self.workspace = workspace
        self.base = base
        self.spills = spills
        self.info = info
        self.rekey = rekey
        _, self.item_lanes = read_item_table(workspace.store.read(f"{run.staging}/items.arrow"))

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        table = self.workspace.tables["histories"]
        new: list[pa.Table] = []
        for path in self.spills:
            with self.workspace.store.open_input(path) as source:
                new.extend(rows for rows in read_spill(source, unit.index, self.info.buckets))
        old_files = table.files(self.base, bucket=unit.index)
        counts = Counts()
        facts = {"users": sum(file.rows for file in old_files), "changed": 0}
        staged = {}
        if self.rekey or any(rows.num_rows for rows in new):
            old = table.read_files(old_files, HISTORIES.columns.names)
            merged = merge_histories(old, new, self.item_lanes, order_kind=self.info.kind == "order")
            counts = Counts(merged.events_in, merged.kept, 0, {"duplicate": merged.duplicates})
            facts = {"users": merged.rows.num_rows, "changed": merged.changed}
            if merged.changed:
                staged["histories"] = [table.stage(merged.rows, context.file_name(), {"bucket": unit.index})]
        return Receipt(
            unit,
            counts,
            Usage(seconds=time.monotonic() - started),
            staged,
            {"histories": schema_hash(HISTORIES.schema)},
            facts,
            context.attempt,
        )


def _example(rejects: pa.Table) -> str:
    return f"{rejects['message'][0].as_py()} {rejects['row'][0].as_py()}"[:300] if rejects.num_rows else ""
