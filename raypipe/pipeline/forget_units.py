"""The unit work of `forget`: rewrite one bucket of every table without the forgotten users."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.pipeline.rebucket import BUCKETED
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import Counts, Receipt, Unit, Usage
from raypipe.storage.tables import StagedFile
from raypipe.storage.workspace import Workspace


class ForgetBucket:
    """Stages the rows that stay of partitions that hold one of the users.

    The fact `touched` names these partitions by table.
    """

    def __init__(self, workspace: Workspace, base: Mapping[str, int], users: Mapping[int, Sequence[str]]) -> None:
        self.workspace = workspace
        self.base = base
        self.users = users

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        users = pa.array(self.users[unit.index], pa.string())
        staged: dict[str, list[StagedFile]] = {}
        touched: dict[str, list[dict[str, Any]]] = {}
        counts = Counts()
        for name in BUCKETED:
            table = self.workspace.tables[name]
            for values, files in table.partitions(self.base[name], bucket=unit.index):
                there = pc.is_in(table.read_files(files, ["user_id"])["user_id"], value_set=users)
                gone = pc.sum(there).as_py() or 0
                if not gone:
                    continue
                rows = table.read_files(files, table.spec.columns.names)
                kept = rows.filter(pc.invert(there))
                touched.setdefault(name, []).append(values)
                counts += Counts(rows.num_rows, kept.num_rows, 0, {"forgotten": gone})
                if kept.num_rows:
                    staged.setdefault(name, []).append(table.stage(kept, context.file_name(), values))
        usage = Usage(seconds=time.monotonic() - started)
        return Receipt(unit, counts, usage, staged, facts={"touched": touched}, attempt=context.attempt)
