"""One bucket as summarising sees it: histories, blocks, what was written before, who has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.metrics.text import item_values
from raypipe.storage.hashing import digest_lanes
from raypipe.storage.schemas import BLOCK_SUMMARIES, SUMMARIES
from raypipe.storage.workspace import Workspace
from raypipe.systems.blocks import RECIPE_DIGITS, BucketBlocks, cut_blocks
from raypipe.systems.summaries import Block, Known, SummariesConfig, Written


class Catalogue:
    """The items as a prompt shows them: one line each, made when first asked for. Index 0 is padding."""

    def __init__(self, items: pa.Table, config: SummariesConfig) -> None:
        items = items.sort_by("index")
        self.titles = items["title"].to_pylist()
        self.texts = items["text"].to_pylist()
        self.attributes = [dict(pairs) for pairs in items["attributes"].to_pylist()]
        self.values = [(), *map(item_values, self.attributes)]
        self.lanes = np.concatenate([np.zeros((1, 2), np.uint64), digest_lanes(items["content_hash"])])
        self._prompts = config.prompts
        self._lines: dict[int, str] = {}

    def line(self, index: int) -> str:
        found = self._lines.get(index)
        if found is None:
            place = index - 1
            found = self._prompts.item_line(self.titles[place], self.attributes[place], self.texts[place])
            self._lines[index] = found
        return found


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
    """Loads one bucket at the pinned versions; `users` restricts it to a canary's."""

    def __init__(
        self,
        workspace: Workspace,
        bucket: int,
        pins: Pins,
        recipes: Recipes,
        config: SummariesConfig,
        catalogue: Catalogue,
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
        self.users: pa.Array = histories["user_id"].combine_chunks()
        lists = histories["items"].combine_chunks()
        self.items: NDArray[np.int32] = lists.flatten().to_numpy()
        self.lengths: NDArray[np.int64] = pc.list_value_length(lists).to_numpy().astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.blocks: BucketBlocks = cut_blocks(
            self.items,
            self.lengths,
            catalogue.lanes,
            block_items=config.block_items,
            window_events=config.window_events if config.paradigm == "hierarchical" else None,
            cumulative=config.paradigm == "recurrent",
            block_recipe=recipes.block,
            merge_recipe=recipes.merge,
        )

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

    @cached_property
    def changed(self) -> NDArray[np.bool_]:
        """Whose change key is not the published one: [users]."""
        there = self.place_before >= 0
        keys = self.before["change_key"].combine_chunks().take(pa.array(self.place_before[there]))
        changed = ~there
        same = pc.equal(keys, self.blocks.change_key.filter(pa.array(there)))
        changed[np.flatnonzero(there)] = ~same.to_numpy(zero_copy_only=False)
        return changed

    @property
    def changed_by_activity(self) -> NDArray[np.int64]:
        """The changed users by number, those with most events since their published summary first."""
        covered = np.zeros(len(self.lengths), np.int64)
        there = self.place_before >= 0
        covered[there] = self.before["covered"].to_numpy()[self.place_before[there]]
        changed = np.flatnonzero(self.changed)
        new = self.lengths[changed] - covered[changed] * self._block_items
        return changed[np.argsort(-new, kind="stable")]

    @cached_property
    def has_strangers(self) -> bool:
        """Whether summaries were published of users who have no history any more."""
        return int((self.place_before >= 0).sum()) < self.before.num_rows

    @cached_property
    def written_before(self) -> pa.Table:
        return self.workspace.tables["block_summaries"].read(
            self.pins.block_summaries, BLOCK_SUMMARIES.columns.names, variant=self.recipes.variant, bucket=self.bucket
        )

    def known(self, users: Sequence[str]) -> dict[str, Known]:
        """What was written before of these users, by (level, number)."""
        rows = self.written_before.filter(
            pc.is_in(self.written_before["user_id"], value_set=pa.array(users, pa.string()))
        )
        found: dict[str, dict[tuple[int, int], Written]] = {}
        for user, level, number, key, text in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            found.setdefault(user, {})[level, number] = Written(level, number, key, text)
        return dict(found)

    def user_blocks(self, user: int) -> list[Block]:
        """The blocks of user number `user`, in time order."""
        blocks, line = self.blocks, self.catalogue.line
        mine = slice(int(blocks.bounds[user]), int(blocks.bounds[user + 1]))
        # A window is one stretch of the history.
        items = iter(self.window_items(user))
        return [
            Block(number, key, [line(item) for item in islice(items, length)], full)
            for number, key, length, full in zip(
                blocks.number[mine].tolist(),
                blocks.key[mine].to_pylist(),
                blocks.length[mine].tolist(),
                blocks.full[mine].tolist(),
                strict=True,
            )
        ]

    def window_items(self, user: int) -> list[int]:
        """The item indices that user number `user`'s summary is about."""
        first = self.blocks.start[self.blocks.bounds[user]]
        return self.items[first : self.starts[user] + self.lengths[user]].tolist()

    def is_of_recipe(self, change_key: str) -> bool:
        """Whether a published row was made by the present recipe, if maybe of an older history."""
        return change_key[:RECIPE_DIGITS] == self.recipes.merge[:RECIPE_DIGITS]
