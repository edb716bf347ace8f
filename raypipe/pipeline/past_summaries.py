"""Stored summaries by the events that they are of, for prompts that may only tell what came before an event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.trsr_past import PastSummaries

_COLUMNS = ["user_id", "summary", "covered", "calls", "tokens_in", "tokens_out"]


def past_summaries(
    workspace: Workspace,
    paradigm: Literal["hierarchical", "recurrent"],
    needed: Sequence[int],
    block_items: int,
    users: pa.Array,
    lengths: NDArray[np.int64],
) -> PastSummaries:
    """All summaries that leave out at least the last `needed[0]` events of histories of `lengths` [users] events.

    Recurrent summaries are also there after each of their blocks of `block_items` items, so that only `needed[0]` is
    needed of them. Raises UsageError if no summaries that leave out as many events as each of `needed` were written, or
    if they were written of other blocks, or by a language model that may have read what `needed[0]` leaves out.
    Summaries of this kind that are not needed are left out.
    """
    table = workspace.tables["summaries"]
    version = table.version()
    there = {str(values["variant"]) for values, _ in table.partitions(version)}
    needed = needed if paradigm == "hierarchical" else needed[:1]
    for cut in needed:
        if _variant(paradigm, cut) not in there:
            raise UsageError(
                f"There are no {paradigm} summaries without the last {cut} events of their users.",
                f"Run `raypipe summarize --summaries.paradigm {paradigm} --summaries.hold_out {cut}` first.",
            )
    texts: dict[int, dict[int, str]] = {}
    cost: dict[str, int] = {}
    for cut in range(needed[0], int(lengths.max(initial=0))):
        if _variant(paradigm, cut) not in there:
            continue
        problem = _problem(workspace, _variant(paradigm, cut), needed[0], block_items)
        if problem is not None and cut in needed:
            raise problem
        if problem is not None:
            continue
        rows = table.read(version, _COLUMNS, variant=_variant(paradigm, cut))
        places = pc.index_in(rows["user_id"], value_set=users).to_pylist()
        told = zip(places, rows["summary"].to_pylist(), rows["covered"].to_pylist(), strict=True)
        fresh, whole, known = set(), 0, 0
        for row, text, covered in told:
            if row is None:
                continue
            blocks = (int(lengths[row]) - cut) // block_items
            whole, known = whole + bool(covered or blocks), known + bool(covered and covered == blocks)
            # A summary of an older, shorter history is left out: it would pass for one of more events than it covers.
            if covered == blocks:
                texts.setdefault(row, {})[int(lengths[row]) - cut] = text
                fresh.add(row)
        # Histories of less than a block do not tell how long a block is.
        if whole and not known and cut in needed:
            raise UsageError(
                f"The {paradigm} summaries without the last {cut} events are not of blocks of {block_items}.",
                "Say how many items a block has with --trsr.block_items, or write them anew with `raypipe summarize`.",
            )
        if cut == needed[0]:
            cost = {f"summary_{name}": int(pc.sum(rows[name]).as_py() or 0) for name in _COLUMNS[3:]}
            cost["summary_users"] = rows.num_rows
            if paradigm == "recurrent":
                _add_blocks(workspace, _variant(paradigm, cut), block_items, users, fresh, texts)
    return PastSummaries({row: sorted(mine.items()) for row, mine in texts.items()}, cost)


def check_written(workspace: Workspace, variant: str, hold_out: int) -> None:
    """Raise UsageError if summaries of this variant cannot be used here, by the newest run that wrote them.

    That is so if its language model may have read some of everybody's last `hold_out` events.
    """
    if (problem := _problem(workspace, variant, hold_out, None)) is not None:
        raise problem


def _problem(workspace: Workspace, variant: str, hold_out: int, block_items: int | None) -> UsageError | None:
    """Why summaries cannot be used here, as `check_written` tells, or for not being of blocks of `block_items`."""
    runs = (run.manifest["facts"] for run in workspace.ledger("summarize").finished())
    facts: dict[str, Any] | None = next((facts for facts in runs if facts["variant"] == variant), None)
    if facts is None:
        return None
    left_out = facts["model_hold_out"]
    if left_out is not None and left_out < hold_out:
        return UsageError(
            f"The summaries {variant} were written by lm/{facts['model']}, which may have read all but the last {left_out} events "
            f"of every user, and {hold_out} are held out here.",
            f"Make a language model with `raypipe lm --hold_out {hold_out}`, and write them anew with `raypipe summarize`.",
        )
    of = facts["block_items"]
    if block_items is not None and of != block_items:
        return UsageError(
            f"The summaries {variant} are of blocks of {of} items and not of {block_items}.",
            f"Say --trsr.block_items {of}, or write them anew with `raypipe summarize`.",
        )
    return None


def _add_blocks(
    workspace: Workspace,
    variant: str,
    block_items: int,
    users: pa.Array,
    fresh: set[int],
    texts: dict[int, dict[int, str]],
) -> None:
    """Add to `texts` what the recurrent summaries of the `fresh` users were after each full block."""
    table = workspace.tables["block_summaries"]
    rows = table.read(table.version(), ["user_id", "level", "block", "text"], variant=variant)
    places = pc.index_in(rows["user_id"], value_set=users).to_pylist()
    for row, block, text in zip(places, rows["block"].to_pylist(), rows["text"].to_pylist(), strict=True):
        if row in fresh:
            texts[row].setdefault((block + 1) * block_items, text)


def _variant(paradigm: Literal["hierarchical", "recurrent"], cut: int) -> str:
    return SummariesConfig(paradigm=paradigm, hold_out=cut).variant
