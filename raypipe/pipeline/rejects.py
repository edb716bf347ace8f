"""Rows for the `rejects` table."""

from __future__ import annotations

import pyarrow as pa


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
