"""The prompts that `summarize` would make of users' blocks, for tests and benchmarks that meet the engine by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from raypipe.language.prompt import Prompt
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.pipeline.summary_state import BucketState, Pins, PromptCatalogue


def block_prompts(config: SummarizeConfig, users: Sequence[str]) -> dict[str, list[Prompt]]:
    """Of each user, in the order of the buckets, the prompts of all blocks of the window."""
    workspace = config.open_workspace()
    names = ("histories", "items", "summaries", "block_summaries", "rejects")
    pins = Pins(**{name: workspace.tables[name].version() for name in names})
    recipes = config.recipes(workspace, config.resolve_model(workspace))
    catalogue = PromptCatalogue(workspace.tables["items"].read(pins.items), config.summaries)
    found = {}
    for bucket in range(workspace.require_info().buckets):
        state = BucketState(workspace, bucket, pins, recipes, config.summaries, catalogue, pa.array(users))
        names = state.users.to_pylist()
        for user, blocks in zip(names, state.user_blocks(range(len(names))), strict=True):
            found[user] = [config.summaries.prompts.block_prompt(block.lines) for block in blocks]
    return found
