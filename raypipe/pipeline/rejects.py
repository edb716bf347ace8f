"""Rows for the `rejects` table, and the users it blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data.rejects import row_json
from raypipe.storage.workspace import Workspace


def reject_rows(run_key: str, rejects: pa.Table, variant: str | None = None) -> pa.Table:
    """Rejects (key, reason, message, row and, where it has them, change_key and attempts) as rows of the table."""
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


def rejected_users(
    run_key: str,
    variant: str,
    users: Sequence[str],
    reasons: Sequence[str],
    messages: Sequence[str],
    attempts: Sequence[int],
    change_keys: Sequence[str],
) -> pa.Table:
    """Users whose row could not be computed, as rows of the table."""
    columns = {
        "key": pa.array(users, pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "message": pa.array(messages, pa.string()),
        "row": pa.array([row_json({"user_id": user}) for user in users], pa.string()),
        "attempts": pa.array(attempts, pa.int32()),
        "change_key": pa.array(change_keys, pa.string()),
    }
    return reject_rows(run_key, pa.table(columns), variant)


def blocked_users(workspace: Workspace, version: int, table: str, variant: str) -> set[tuple[str, str]]:
    """(user, change key) of every user that was rejected for `table` and is not tried again with that change key."""
    rows = workspace.tables["rejects"].read(version, ["key", "variant", "change_key"], table=table)
    chosen = rows.filter(pc.equal(rows["variant"], variant))
    return set(zip(chosen["key"].to_pylist(), chosen["change_key"].to_pylist(), strict=True))
