"""Recurrent summaries: each block is added to the summary of those before it (LLM-TRSR, arXiv 2403.13325, section 3.2).

With blocks of 5 items, a history of n items costs ceil(n/5) calls, one after the other. The text of a full block is the
summary of everything up to and including it, and its key is a hash of all of that. A later run can therefore go on
after the last block whose past has not changed. The text of a last, partial block is a summary too, but later runs
never build on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from raypipe.engines.engine import Engine
from raypipe.language.prompt import Prompt
from raypipe.systems.summaries import Block, Known, SummariesConfig, UserSummary, Written, take


class RecurrentSummarizer:
    """Implements `Summarizer`; each step reads one block of every user of the batch."""

    def __init__(self, engine: Engine, config: SummariesConfig) -> None:
        self.engine, self.config = engine, config

    def most_calls(self, blocks: Sequence[Block], known: Known) -> int:
        return len(unread_blocks(blocks, known)[: self.config.max_blocks_per_run])

    def most_tokens(self, calls: int) -> tuple[int, int]:
        decodings = (self.config.block_decoding, self.config.merge_decoding)
        shortest = min(decoding.max_new_tokens for decoding in decodings)
        return calls * (self.engine.context - shortest), calls * max(decoding.most_written for decoding in decodings)

    def summarize(self, users: Mapping[str, Sequence[Block]], known: Mapping[str, Known]) -> list[UserSummary]:
        results = {user: UserSummary(user) for user in users}
        left: dict[str, list[Block]] = {}
        for user, blocks in users.items():
            before = known.get(user, {})
            unread = unread_blocks(blocks, before)
            left[user] = list(unread[: self.config.max_blocks_per_run])
            result = results[user]
            result.unfinished = len(left[user]) < len(unread)
            result.written = [before[0, block.number] for block in blocks[: len(blocks) - len(unread)]]
            if result.written:
                result.summary = result.written[-1].text
        while left := {user: blocks for user, blocks in left.items() if blocks and not results[user].reason}:
            begun = [user for user in left if results[user].summary]
            new = [user for user in left if not results[user].summary]
            prompts = self.config.prompts
            # A user's very first block is summarised like any block alone.
            self._step(new, left, results, [prompts.block_prompt(left[user][0].lines) for user in new], first=True)
            updates = [prompts.update_prompt(results[user].summary, left[user][0].lines) for user in begun]
            self._step(begun, left, results, updates, first=False)
        return list(results.values())

    def _step(
        self,
        users: Sequence[str],
        left: Mapping[str, list[Block]],
        results: Mapping[str, UserSummary],
        prompts: Sequence[Prompt],
        *,
        first: bool,
    ) -> None:
        """Read the next block of each user, with one call per user."""
        decoding = self.config.block_decoding if first else self.config.merge_decoding
        for outcome in self.engine.generate(prompts, decoding):
            result = results[users[outcome.index]]
            block = left[result.user_id].pop(0)
            if text := take(result, outcome):
                result.summary = text
                if block.full:
                    result.written.append(Written(0, block.number, block.key, text))


def unread_blocks(blocks: Sequence[Block], known: Known) -> Sequence[Block]:
    """The blocks after the last one whose known text still holds."""

    def stands(block: Block) -> bool:
        old = known.get((0, block.number))
        return block.full and old is not None and old.key == block.key

    # A key covers everything up to its block: if one does not hold, none after it does.
    return blocks[sum(1 for _ in takewhile(stands, blocks)) :]
