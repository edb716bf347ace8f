"""Stored summaries by the events that they are of, for prompts that may only tell what came before an event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.storage.makers import makers
from raypipe.storage.models import Model
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.trsr_past import PastSummaries

_COLUMNS = ["user_id", "summary", "covered", "calls", "tokens_in", "tokens_out"]


def summaries_before(
    workspace: Workspace, paradigm: Literal["hierarchical", "recurrent"], hold_out: int, users: pa.Array
) -> dict[int, str]:
    """The summaries of what stands before the last `hold_out` events, by row of the histories of `users`.

    Raises UsageError if none were written, or if the language model that wrote them may have read held-out events.
    """
    table, variant = workspace.tables["summaries"], variant_of(paradigm, hold_out)
    check_written(workspace, variant, hold_out)
    rows = table.read(table.version(), ["user_id", "summary"], variant=variant)
    if not rows.num_rows:
        raise _unwritten(paradigm, hold_out)
    places = pc.index_in(rows["user_id"], value_set=users).to_pylist()
    return {row: text for row, text in zip(places, rows["summary"].to_pylist(), strict=True) if row is not None}


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
    Summaries of this kind that are not needed are left out then.
    """
    table = workspace.tables["summaries"]
    version = table.version()
    there = {str(values["variant"]) for values, _ in table.partitions(version)}
    needed = needed if paradigm == "hierarchical" else needed[:1]
    for cut in needed:
        if variant_of(paradigm, cut) not in there:
            raise _unwritten(paradigm, cut)
    texts: dict[int, dict[int, str]] = {}
    cost: dict[str, int] = {}
    for cut in range(needed[0], int(lengths.max(initial=0))):
        if variant_of(paradigm, cut) not in there:
            continue
        try:
            check_written(workspace, variant_of(paradigm, cut), needed[0], block_items)
        except UsageError:
            if cut in needed:
                raise
            continue
        rows = table.read(version, _COLUMNS, variant=variant_of(paradigm, cut))
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
                _add_blocks(workspace, variant_of(paradigm, cut), block_items, users, fresh, texts)
    return PastSummaries({row: sorted(mine.items()) for row, mine in texts.items()}, cost)


def check_written(workspace: Workspace, variant: str, hold_out: int, block_items: int | None = None) -> None:
    """Raise UsageError if, by the runs that wrote the summaries of this variant, they cannot be used here.

    That is so if a language model of theirs may have read some of everybody's last `hold_out` events, or if their
    blocks were not of `block_items`.
    """
    for facts in _written(workspace, variant):
        left_out = facts["model_hold_out"]
        if left_out is not None and left_out < hold_out:
            raise UsageError(
                f"The summaries {variant} were written by lm/{facts['model']}, which may have read all but the last {left_out} "
                f"events of every user, and {hold_out} are held out here.",
                f"Make a language model with `raypipe lm --hold_out {hold_out}`, and write them anew with `raypipe summarize`.",
            )
        of = facts["block_items"]
        if block_items is not None and of != block_items:
            raise UsageError(
                f"The summaries {variant} are of blocks of {of} items and not of {block_items}.",
                f"Say --trsr.block_items {of}, or write them anew with `raypipe summarize`.",
            )


def unread_by_writers(workspace: Workspace, variant: str | None, adapter: Model | None = None) -> float | None:
    """The share of the users whom no language model has read that wrote summaries, of `variant` or for an adapter.

    It is None if there are no summaries, or if all were written by engines that are not the workspace's own: nobody
    knows it of them.
    """
    facts = [] if variant is None else _written(workspace, variant)
    # Who does not tell it may have read everybody.
    shares = [one.get("model_held_out_share", 0.0) for one in facts if one["model_hold_out"] is not None]
    if adapter is not None and adapter.lineage.get("summaries") is not None:
        shares.append(adapter.lineage.get("summaries_held_out_share", 0.0))
    return min((float(share) for share in shares if share is not None), default=None)


def _written(workspace: Workspace, variant: str) -> list[dict[str, Any]]:
    """The facts of the runs that wrote the summaries of this variant, newest first."""
    return [run.manifest["facts"] for run in makers(workspace.ledger("summarize"), variant)]


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


def _unwritten(paradigm: str, cut: int) -> UsageError:
    return UsageError(
        f"There are no {paradigm} summaries without the last {cut} events of their users.",
        f"Run `raypipe summarize --summaries.paradigm {paradigm} --summaries.hold_out {cut}` first.",
    )


def variant_of(paradigm: Literal["hierarchical", "recurrent"], cut: int) -> str:
    """The variant of the summaries that leave out the last `cut` events of every user."""
    return SummariesConfig(paradigm=paradigm, hold_out=cut).variant
