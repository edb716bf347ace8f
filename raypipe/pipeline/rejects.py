"""Rows for the `rejects` table, and the users it blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.rejects import row_json
from raypipe.runtime.publishing import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import MAX_DEATHS
from raypipe.storage.tables import StagedFile
from raypipe.storage.workspace import Workspace

WORKER_DIED = ("worker_died", f"Its worker died or hung {MAX_DEATHS} times with it alone, on a healthy node.")
"""Reason and message for a row that kills its process."""


def reject_rows(run_key: str, rejects: pa.Table, variant: str | None = None) -> pa.Table:
    """Rejects as rows of the table `rejects`.

    They have key, reason, message and row, and may have change_key and attempts.
    """
    count = rejects.num_rows
    columns = set(rejects.column_names)
    return pa.table(
        {
            "run_key": pa.repeat(run_key, count),
            **{name: rejects[name] for name in ("key", "reason", "message", "row")},
            "attempts": rejects["attempts"] if "attempts" in columns else pa.repeat(pa.scalar(1, pa.int32()), count),
            "variant": pa.repeat(pa.scalar(variant, pa.string()), count),
            "change_key": rejects["change_key"] if "change_key" in columns else pa.nulls(count, pa.string()),
        }
    )


def stage_rejected(
    workspace: Workspace,
    scope: str,
    context: UnitContext,
    table: str,
    variant: str,
    users: Sequence[str],
    outcomes: Sequence[tuple[str, str]],
    change_keys: Sequence[str],
    names: Sequence[str] | None = None,
    items: Sequence[int] | None = None,
) -> list[StagedFile]:
    """Stage rejects of users whose row of `table` could not be computed. `outcomes` are their reasons and messages.

    `names` are the names of their rows in the unit's journal, if these are not their ids. `items` are the indices of
    the items, if the rows are of a user and an item.
    """
    rejected: list[dict[str, str | int]] = [{"user_id": user} for user in users]
    if items is not None:
        rejected = [{**row, "item_index": item} for row, item in zip(rejected, items, strict=True)]
    deaths = [context.deaths.get(name, 0) for name in (users if names is None else names)]
    columns = {
        "key": pa.array(users, pa.string()),
        "reason": pa.array([reason for reason, _ in outcomes], pa.string()),
        "message": pa.array([message for _, message in outcomes], pa.string()),
        "row": pa.array([row_json(row) for row in rejected], pa.string()),
        "attempts": pa.array([1 + count for count in deaths], pa.int32()),
        "change_key": pa.array(change_keys, pa.string()),
    }
    run_key = context.run.run_key
    rows = reject_rows(run_key, pa.table(columns), variant)
    return [output_table(workspace, "rejects", scope, run_key).stage(rows, context.file_name(), {"table": table})]


def blocked_users(workspace: Workspace, version: int, table: str, variant: str) -> set[tuple[str, str]]:
    """(user, change key) of all users that were rejected for `table` and are not tried again with that change key."""
    rows = workspace.tables["rejects"].read(version, ["key", "variant", "change_key"], table=table)
    chosen = rows.filter(pc.equal(rows["variant"], variant))
    return set(zip(chosen["key"].to_pylist(), chosen["change_key"].to_pylist(), strict=True))
