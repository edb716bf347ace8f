"""The unit work of `extract` and `recommend`: compute the rows of one bucket's changed users."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.pipeline.rejects import blocked_users, stage_rejected
from raypipe.pipeline.user_rows import UserRows
from raypipe.runtime.budget import Budget
from raypipe.runtime.publishing import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.fingerprint import schema_hash
from raypipe.storage.ledger import Counts, Receipt, Unit, Usage
from raypipe.storage.workspace import Workspace


@dataclass(frozen=True)
class Made:
    """What was made for the users of a bucket.

    `tables` hold the rows, which have the user's `place` instead of the id. `failed` has, by place, the reason and
    message of users whose rows could not be made. `skipped` counts users by reason, and `usage` is what all of it took.
    """

    tables: Sequence[pa.Table] = ()
    failed: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


class Makes(Protocol):
    """Makes rows of users on a worker; picklable."""

    def make(
        self, state: UserRows, work: NDArray[np.int64], names: Sequence[str], context: UnitContext, budget: Budget
    ) -> Made:
        """Make the rows of the users at the places `work`, which are not empty.

        `names` are the ids of all users of the bucket. Users are skipped as `cold` if nothing is known of them and they
        get no row, and as `capped` if the budget left them out.
        """
        ...


@dataclass(frozen=True)
class EncodeTask:
    """What every unit of a run shares; small and picklable. `users` restricts the run to those of a canary."""

    workspace: Workspace
    scope: str
    output: str
    variant: str
    recipe: str
    versions: dict[str, int]
    makes: Makes
    users: pa.Array | None


class EncodeBucket:
    """Computes the rows of one bucket's changed users and carries over those of the others."""

    def __init__(self, task: EncodeTask, budget: Budget) -> None:
        self.task, self.budget = task, budget
        self.blocked = blocked_users(task.workspace, task.versions["rejects"], task.output, task.variant)

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        task = self.task
        state = UserRows(
            task.workspace,
            unit.index,
            task.output,
            task.variant,
            task.recipe,
            task.versions["histories"],
            task.versions[task.output],
            task.users,
        )
        keys = state.change_keys.to_pylist() if self.blocked else []
        names = state.users.to_pylist() if len(state.changed) else []
        work = np.array(
            [place for place in state.changed.tolist() if not keys or (names[place], keys[place]) not in self.blocked],
            np.int64,
        )
        made = task.makes.make(state, work, names, context, self.budget) if len(work) else Made()
        left = {"cold": 0, "capped": 0, **made.skipped}
        skipped = {
            "unchanged": len(state.users) - len(state.changed),
            "blocked": len(state.changed) - len(work),
            **left,
        }
        computed = len(work) - len(made.failed) - sum(left.values())
        counts = Counts(len(state.users), computed, len(made.failed), skipped)
        staged: dict[str, Sequence] = {}
        places = [rows["place"].to_numpy() for rows in made.tables]
        carried = state.carried_over(np.unique(np.concatenate([np.zeros(0, np.int64), *places])))
        # Users who get no row stay changed for ever. They alone are no reason to write the others anew.
        if made.tables or made.failed or carried.rows.num_rows < state.before.num_rows:
            context.journal([])
            staged = self._stage(state, made, carried.rows, context)
        schemas = {task.output: schema_hash(task.workspace.tables[task.output].spec.schema)}
        usage = made.usage + Usage(seconds=time.monotonic() - started)
        facts = {"stale": carried.stale, "reasons": dict(made.failed.values())}
        return Receipt(unit, counts, usage, staged, schemas, facts, context.attempt)

    def _stage(self, state: UserRows, made: Made, carried: pa.Table, context: UnitContext) -> dict[str, Sequence]:
        task = self.task
        spec = task.workspace.tables[task.output].spec
        fresh = [
            rows.set_column(0, "user_id", state.users.take(rows["place"]))
            .append_column("change_key", state.change_keys.take(rows["place"]))
            .select(spec.columns.names)
            .cast(spec.columns)
            for rows in made.tables
        ]
        order = [(name, "ascending") for name in spec.key if name != "variant"]
        rows = pa.concat_tables([carried, *fresh]).sort_by(order)
        table = output_table(task.workspace, task.output, task.scope, context.run.run_key)
        partition: dict[str, str | int] = {"variant": task.variant, "bucket": state.bucket}
        staged: dict[str, Sequence] = {task.output: [table.stage(rows, context.file_name(), partition)]}
        if made.failed:
            places = pa.array(list(made.failed))
            staged["rejects"] = stage_rejected(
                task.workspace,
                task.scope,
                context,
                task.output,
                task.variant,
                state.users.take(places).to_pylist(),
                list(made.failed.values()),
                state.change_keys.take(places).to_pylist(),
            )
        return staged


def list_column(values: NDArray) -> pa.ListArray:
    """`values` [rows, width] as a list column, without copying row by row."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))
