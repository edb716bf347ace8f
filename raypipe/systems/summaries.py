"""Hierarchical summaries of long histories: blocks alone, then merges (LLM-TRSR, arXiv 2403.13325, section 3.2).

A history of n > 5 items in one level costs ceil(n/5) + 1 calls; of up to five items, one. Where the block summaries do
not fit one merge prompt they are merged in groups, level by level, until one remains; no prompt is ever cut short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.engines.engine import Decoding, Engine, Outcome
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.storage.fingerprint import fingerprint

# Guarded by a golden test on the echo engine: raised whenever the same input would give another text.
STEP_VERSION = 1
# Room left for what count_tokens does not see: a chat template's wrapping, and "12. " before each numbered summary.
_CHAT_TOKENS = 64
_NUMBERING_TOKENS = 6


class SummariesConfig(Config):
    """What summarises a history, and how."""

    block_items: int = shaping(5, "items of a block", ge=1)
    window_events: int = shaping(50, "last events that are summarised, whole blocks only", ge=1)
    prompts: SummaryPrompts = shaping(SummaryPrompts, "prompt templates")
    block_decoding: Decoding = shaping(Decoding, "decoding of block summaries")
    merge_decoding: Decoding = shaping(Decoding, "decoding of merges")

    @model_validator(mode="after")
    def _window_holds_a_block(self) -> SummariesConfig:
        # Only whole blocks are in the window: a smaller one would leave some users without any.
        if self.window_events < self.block_items:
            raise ValueError(f"window_events is {self.window_events}, less than one block of {self.block_items} items")
        return self

    def window_start(self, events: int) -> int:
        """The first event of a history of so many that its summary is about: whole blocks only."""
        return -(-max(events - self.window_events, 0) // self.block_items) * self.block_items

    def block_recipe(self, engine: Mapping[str, Any]) -> str:
        """Fingerprint of a block's summary; `engine` is the engine's identity."""
        return fingerprint(
            {
                "step": STEP_VERSION,
                "engine": dict(engine),
                "decoding": self.block_decoding.shaping_values(),
                "block_items": self.block_items,
                "prompt": self.prompts.block,
                "attributes": list(self.prompts.attributes),
                "text_characters": self.prompts.text_characters,
            }
        )

    def merge_recipe(self, engine: Mapping[str, Any]) -> str:
        """Fingerprint of a whole summary: that of its blocks, the merge prompt and the window."""
        return fingerprint(
            {
                "blocks": self.block_recipe(engine),
                "decoding": self.merge_decoding.shaping_values(),
                "prompt": self.prompts.merge,
                "window_events": self.window_events,
            }
        )


@dataclass(frozen=True)
class Block:
    """One piece of a history: its number from the first event ever, what its text depends on, its items' lines."""

    number: int
    key: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Written:
    """A text of one level: block summaries are level 0, merges of groups 1, 2, ..."""

    level: int
    number: int
    key: str
    text: str


@dataclass
class UserSummary:
    """What came out for one user: a summary, or a reason and a message; either way what it cost."""

    user_id: str
    summary: str = ""
    reason: str = ""
    message: str = ""
    written: list[Written] = field(default_factory=list)
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def fail(self, reason: str, message: str) -> None:
        if not self.reason:
            self.reason, self.message = reason, message


@dataclass(frozen=True)
class _Merge:
    user: str
    level: int
    texts: Sequence[Written]
    final: bool

    @property
    def number(self) -> int:
        return self.texts[0].number


Known = Mapping[tuple[int, int], Written]
"""A user's texts from earlier runs, by (level, number)."""


class HierarchicalSummarizer:
    """Writes summaries of many users at a time, so that the engine always has a full batch."""

    def __init__(self, engine: Engine, config: SummariesConfig, merge_recipe: str) -> None:
        self.engine = engine
        self.config = config
        self.merge_recipe = merge_recipe
        frame = engine.count_tokens([config.prompts.merge])[0]
        # Tokens of summaries that one merge prompt holds.
        self._room = engine.context - config.merge_decoding.max_new_tokens - frame - _CHAT_TOKENS

    def most_calls(self, blocks: Sequence[Block], known: Known) -> int:
        """A bound on the engine calls of one user, deeper merge levels included: what a hard cap has to grant."""
        longest = self.config.block_decoding.max_new_tokens + _NUMBERING_TOKENS
        fit = len(blocks) * longest <= self._room
        # Every merge leaves at least one text less than it found.
        merges = min(len(blocks) - 1, 1) if fit else len(blocks) - 1
        return len(missing_blocks(blocks, known)) + merges

    def most_tokens(self, calls: int) -> tuple[int, int]:
        """Bounds on prompt tokens and on generated tokens of so many calls; a prompt and its answer share the context."""
        answers = (self.config.block_decoding.max_new_tokens, self.config.merge_decoding.max_new_tokens)
        return calls * (self.engine.context - min(answers)), calls * max(answers)

    def summarize(
        self,
        users: Mapping[str, Sequence[Block]],
        known: Mapping[str, Known],
    ) -> list[UserSummary]:
        """Summaries of users, given their blocks in time order and the texts already written, by (level, number).

        A known text is used where its key still holds; nothing else is. Every user gets a result, in order.
        """
        results = {user: UserSummary(user) for user in users}
        self._write_blocks(users, known, results)
        self._merge(known, results)
        return list(results.values())

    def _write_blocks(
        self,
        users: Mapping[str, Sequence[Block]],
        known: Mapping[str, Known],
        results: Mapping[str, UserSummary],
    ) -> None:
        wanted: list[tuple[str, Block]] = []
        for user, blocks in users.items():
            missing = {block.number for block in missing_blocks(blocks, known.get(user, {}))}
            for block in blocks:
                if block.number in missing:
                    wanted.append((user, block))
                else:
                    results[user].written.append(known[user][(0, block.number)])
        prompts = [self.config.prompts.block_prompt(block.lines) for _, block in wanted]
        for outcome in self.engine.generate(prompts, self.config.block_decoding):
            user, block = wanted[outcome.index]
            if text := _take(results[user], outcome):
                results[user].written.append(Written(0, block.number, block.key, text))
        for result in results.values():
            result.written.sort(key=lambda written: written.number)

    def _merge(self, known: Mapping[str, Known], results: Mapping[str, UserSummary]) -> None:
        texts = {user: list(result.written) for user, result in results.items() if not result.reason}
        level = 0
        while texts:
            level += 1
            merges: list[_Merge] = []
            for user, written in texts.items():
                if len(written) == 1:
                    results[user].summary = written[0].text
                    continue
                groups = self._groups(written)
                if len(groups) == len(written):
                    results[user].fail("prompt_too_long", "No two of its summaries fit one merge prompt.")
                    continue
                merges.extend(_Merge(user, level, group, final=len(groups) == 1) for group in groups)
            texts = self._run_merges(merges, known, results)

    def _run_merges(
        self, merges: Sequence[_Merge], known: Mapping[str, Known], results: Mapping[str, UserSummary]
    ) -> dict[str, list[Written]]:
        """Run one level; returns the texts that the next level has to merge, by user."""
        texts: dict[str, list[Written]] = {}
        wanted: list[tuple[_Merge, str]] = []
        for merge in merges:
            key = fingerprint({"recipe": self.merge_recipe, "texts": [text.key for text in merge.texts]})
            old = known.get(merge.user, {}).get((merge.level, merge.number))
            if len(merge.texts) == 1:  # the odd one out of an uneven grouping goes up as it is
                texts.setdefault(merge.user, []).append(merge.texts[0])
            elif not merge.final and old is not None and old.key == key:
                texts.setdefault(merge.user, []).append(old)
                results[merge.user].written.append(old)
            else:
                wanted.append((merge, key))
        prompts = [self.config.prompts.merge_prompt([text.text for text in merge.texts]) for merge, _ in wanted]
        for outcome in self.engine.generate(prompts, self.config.merge_decoding):
            merge, key = wanted[outcome.index]
            result = results[merge.user]
            text = _take(result, outcome)
            if merge.final:
                # The last merge is the summary itself; only the steps on the way to it are kept as block summaries.
                result.summary = text
            else:
                written = Written(merge.level, merge.number, key, text)
                result.written.append(written)
                texts.setdefault(merge.user, []).append(written)
        return {
            user: sorted(found, key=lambda text: text.number)
            for user, found in texts.items()
            if not results[user].reason
        }

    def _groups(self, texts: Sequence[Written]) -> list[list[Written]]:
        """Consecutive texts in groups that each fit one merge prompt."""
        sizes = self.engine.count_tokens([text.text for text in texts])
        groups: list[list[Written]] = [[]]
        used = 0
        for text, size in zip(texts, sizes, strict=True):
            if groups[-1] and used + size + _NUMBERING_TOKENS > self._room:
                groups.append([])
                used = 0
            groups[-1].append(text)
            used += size + _NUMBERING_TOKENS
        return groups


def missing_blocks(blocks: Sequence[Block], known: Known) -> list[Block]:
    """The blocks whose summary has to be written: those never written, or written from other items or by other means."""
    return [block for block in blocks if (old := known.get((0, block.number))) is None or old.key != block.key]


def calls_needed(blocks: Sequence[Block], known: Known) -> int:
    """Engine calls of one user, deeper merge levels not counted."""
    return len(missing_blocks(blocks, known)) + int(len(blocks) > 1)


def _take(result: UserSummary, outcome: Outcome) -> str:
    """Account for one outcome; its text, or nothing where the user failed."""
    result.calls += 1
    result.tokens_in += outcome.tokens_in
    result.tokens_out += outcome.tokens_out
    text = outcome.text.strip()
    if outcome.error is not None:
        result.fail(outcome.error.kind, outcome.error.message)
    elif not text:
        result.fail("empty_output", "The model wrote nothing.")
    return text
