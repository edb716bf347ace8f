"""One bucket as summarising sees it: histories, blocks, what was written before, and which users have changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.metrics.text import item_values
from raypipe.pipeline.user_rows import CarriedOver, carry_over
from raypipe.recommenders.windows import Histories, stretches
from raypipe.storage.hashing import digest_lanes
from raypipe.storage.schemas import BLOCK_SUMMARIES, SUMMARIES
from raypipe.storage.workspace import Workspace
from raypipe.systems.blocks import BucketBlocks, cut_blocks
from raypipe.systems.summaries import Block, Known, SummariesConfig, Written

T = TypeVar("T")


class PromptCatalogue:
    """The items as a prompt shows them: one line each, made when first asked for. Index 0 is padding."""

    def __init__(self, items: pa.Table, config: SummariesConfig) -> None:
        items = items.sort_by("index")
        self.titles = items["title"].to_pylist()
        self.texts = items["text"].to_pylist()
        self.attributes = [dict(pairs) for pairs in items["attributes"].to_pylist()]
        # Equal values are one object: those of a user are then counted in a fifth of the time (measured).
        self.values = [(), *(tuple(map(sys.intern, item_values(attributes))) for attributes in self.attributes)]
        self.lanes = np.concatenate([np.zeros((1, 2), np.uint64), digest_lanes(items["content_hash"])])
        self.line = cache(self._line)
        self._prompts = config.prompts

    def _line(self, index: int) -> str:
        place = index - 1
        return self._prompts.item_line(self.titles[place], self.attributes[place], self.texts[place])


@dataclass(frozen=True)
class Recipes:
    """Fingerprints of the two stages, and the variant their rows carry."""

    variant: str
    block: str
    merge: str


@dataclass(frozen=True)
class Pins:
    """The versions a run reads: inputs, its own output's base, and the rejects that block users."""

    histories: int
    items: int
    summaries: int
    block_summaries: int
    rejects: int

    def inputs(self) -> dict[str, int]:
        return {"histories": self.histories, "items": self.items, "rejects": self.rejects}

    def outputs(self) -> dict[str, int]:
        return {"summaries": self.summaries, "block_summaries": self.block_summaries}


class BucketState:
    """Loads one bucket at the pinned versions. `users` restricts it to those of a canary."""

    def __init__(
        self,
        workspace: Workspace,
        bucket: int,
        pins: Pins,
        recipes: Recipes,
        config: SummariesConfig,
        catalogue: PromptCatalogue,
        users: pa.Array | None = None,
    ) -> None:
        self.workspace = workspace
        self.bucket = bucket
        self.pins = pins
        self.recipes = recipes
        self.catalogue = catalogue
        self._block_items = config.block_items
        histories = workspace.tables["histories"].read(pins.histories, ["user_id", "items"], bucket=bucket)
        if users is not None:
            histories = histories.filter(pc.is_in(histories["user_id"], value_set=users))
        self.users, self.histories, self.blocks = summarised(histories, recipes, config, catalogue)

    @cached_property
    def before(self) -> pa.Table:
        """The bucket's published summaries."""
        return self.workspace.tables["summaries"].read(
            self.pins.summaries, SUMMARIES.columns.names, variant=self.recipes.variant, bucket=self.bucket
        )

    @cached_property
    def place_before(self) -> NDArray[np.int64]:
        """Each user's row in `before`, or -1: [users]."""
        return pc.fill_null(pc.index_in(self.users, value_set=self.before["user_id"].combine_chunks()), -1).to_numpy()

    def summaries_before(self, users: Sequence[int]) -> list[str | None]:
        """The published summary of each of these users, if there is one."""
        places = self.place_before[users]
        return self.before["summary"].take(pa.array(places, mask=places < 0)).to_pylist()

    @cached_property
    def changed(self) -> NDArray[np.bool_]:
        """Which users have another change key than the published one: bool [users]."""
        there = self.place_before >= 0
        keys = self.before["change_key"].combine_chunks().take(pa.array(self.place_before[there]))
        changed = ~there
        same = pc.equal(keys, self.blocks.change_key.filter(pa.array(there)))
        changed[np.flatnonzero(there)] = ~same.to_numpy(zero_copy_only=False)
        return changed

    @property
    def changed_by_activity(self) -> NDArray[np.int64]:
        """The changed users by number. Those with the most events since their published summary come first."""
        covered = np.zeros(len(self.users), np.int64)
        there = self.place_before >= 0
        covered[there] = self.before["covered"].to_numpy()[self.place_before[there]]
        changed = np.flatnonzero(self.changed)
        new = self.histories.lengths[changed] - covered[changed] * self._block_items
        return changed[np.argsort(-new, kind="stable")]

    def carried_over(self, made: NDArray[np.int64]) -> CarriedOver:
        """The published summaries that stay when the users `made`, by number, have new ones."""
        users = self.users
        return carry_over(self.before, self.before["user_id"], users, self.blocks.change_key, users.take(made))

    @cached_property
    def written_before(self) -> pa.Table:
        return self.workspace.tables["block_summaries"].read(
            self.pins.block_summaries, BLOCK_SUMMARIES.columns.names, variant=self.recipes.variant, bucket=self.bucket
        )

    @cached_property
    def _written_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of `written_before` in order of user number, and the bounds of each user's rows: [users + 1]."""
        owners = pc.index_in(self.written_before["user_id"].combine_chunks(), value_set=self.users)
        owners = pc.fill_null(owners, -1).to_numpy()
        order = np.argsort(owners, kind="stable")
        return order, np.searchsorted(owners[order], np.arange(len(self.users) + 1))

    def known(self, users: Sequence[int]) -> list[Known]:
        """What was written before for the blocks of each of these users."""
        if not self.written_before.num_rows:
            return [{}] * len(users)
        order, bounds = self._written_rows
        counts = np.diff(bounds)[users]
        rows = self.written_before.take(pa.array(order[stretches(bounds[users], counts)]))
        columns = (rows[name].to_pylist() for name in ("level", "block", "block_key", "text"))
        written = [((text.level, text.number), text) for text in map(Written, *columns)]
        return list(map(dict, _pieces(written, counts)))

    def user_blocks(self, users: Sequence[int]) -> list[list[Block]]:
        """The blocks of each of these users, in time order."""
        blocks = self.blocks
        counts = np.diff(blocks.bounds)[users]
        rows = stretches(blocks.bounds[users], counts)
        lines = list(map(self.catalogue.line, self.windows(users).items.tolist()))
        found = map(
            Block,
            blocks.number[rows].tolist(),
            blocks.key.take(pa.array(rows)).to_pylist(),
            _pieces(lines, blocks.length[rows]),
            blocks.full[rows].tolist(),
        )
        return _pieces(list(found), counts)

    def windows(self, users: Sequence[int]) -> Histories:
        """The part of each of these users' histories that the summary is about."""
        # A window is one stretch of the history: from its first block to the end.
        starts = self.blocks.start[self.blocks.bounds[users]]
        return self.histories.take(starts, self.histories.ends[users] - starts)


def summarised(
    histories: pa.Table, recipes: Recipes, config: SummariesConfig, catalogue: PromptCatalogue
) -> tuple[pa.Array, Histories, BucketBlocks]:
    """The users whose histories (`user_id`, `items`) get a summary, what it is of in each history, and its blocks."""
    if config.hold_out:
        histories = histories.filter(pc.greater(pc.list_value_length(histories["items"]), config.hold_out))
    lists = histories["items"].combine_chunks()
    ends = pc.list_value_length(lists).to_numpy().astype(np.int64).cumsum()
    told = Histories(lists.flatten().to_numpy(), ends).without_last(config.hold_out)
    blocks = cut_blocks(
        told.items,
        told.lengths,
        catalogue.lanes,
        block_items=config.block_items,
        window_events=config.window_events if config.paradigm == "hierarchical" else None,
        cumulative=config.paradigm == "recurrent",
        block_recipe=recipes.block,
        merge_recipe=recipes.merge,
    )
    return histories["user_id"].combine_chunks(), told, blocks


def _pieces(values: list[T], lengths: NDArray[np.int64]) -> list[list[T]]:
    """The values cut into pieces of these lengths."""
    ends = lengths.cumsum()
    return [values[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
