"""Choice between the two paradigms of summarising blocks; no other module knows both."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.engines.checks import CheckedEngine
from raypipe.engines.engine import Engine
from raypipe.systems.hierarchical import HierarchicalSummarizer, missing_blocks
from raypipe.systems.recurrent import RecurrentSummarizer, unread_blocks
from raypipe.systems.summaries import Block, Known, SummariesConfig, Summarizer


def build_summarizer(engine: Engine, config: SummariesConfig, merge_recipe: str) -> Summarizer:
    engine = CheckedEngine(engine, config.checks)
    if config.paradigm == "recurrent":
        return RecurrentSummarizer(engine, config)
    return HierarchicalSummarizer(engine, config, merge_recipe)


def calls_needed(config: SummariesConfig, blocks: Sequence[Block], known: Known) -> tuple[Sequence[Block], int]:
    """The blocks of one user that the next run reads, one call each, and its merges (deeper levels not counted)."""
    if config.paradigm == "recurrent":
        return unread_blocks(blocks, known)[: config.max_blocks_per_run], 0
    missing = missing_blocks(blocks, known)
    if len(missing) > config.max_blocks_per_run:
        return missing[: config.max_blocks_per_run], 0
    return missing, int(len(blocks) > 1)
