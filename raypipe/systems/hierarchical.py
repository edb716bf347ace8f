"""Hierarchical summaries: each block is summarised alone, then merged (LLM-TRSR, arXiv 2403.13325, section 3.2).

With blocks of 5 items and one level of merging, a history of n > 5 items costs ceil(n/5) + 1 calls; a history of up to
five items costs one. If the block summaries do not fit one merge prompt, they are merged in groups, level by level,
until one remains. No prompt is ever truncated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from raypipe.engines.engine import Engine
from raypipe.storage.fingerprint import fingerprint
from raypipe.systems.summaries import Block, Known, SummariesConfig, UserSummary, Written, take

# Room for what count_tokens does not count: a chat template's wrapping, and "12. " before each numbered summary.
_CHAT_TOKENS = 64
_NUMBERING_TOKENS = 6


@dataclass(frozen=True)
class _Merge:
    user: str
    level: int
    texts: Sequence[Written]
    final: bool

    @property
    def number(self) -> int:
        return self.texts[0].number


class HierarchicalSummarizer:
    """Implements `Summarizer`."""

    def __init__(self, engine: Engine, config: SummariesConfig, merge_recipe: str) -> None:
        self.engine = engine
        self.config = config
        self.merge_recipe = merge_recipe
        frame = engine.count_tokens([config.prompts.merge])[0]
        # How many tokens of summaries fit one merge prompt.
        self._room = engine.context - config.merge_decoding.max_new_tokens - frame - _CHAT_TOKENS

    def most_calls(self, blocks: Sequence[Block], known: Known) -> int:
        """An upper bound on the engine calls of one user, all merge levels included: what a hard cap has to grant."""
        longest = self.config.block_decoding.max_new_tokens + _NUMBERING_TOKENS
        fit = len(blocks) * longest <= self._room
        # Every merge leaves at least one text fewer than it found.
        merges = min(len(blocks) - 1, 1) if fit else len(blocks) - 1
        return len(missing_blocks(blocks, known)[: self.config.max_blocks_per_run]) + merges

    def most_tokens(self, calls: int) -> tuple[int, int]:
        """Upper bounds on prompt tokens and generated tokens of `calls` calls; prompt and answer share the context."""
        decodings = (self.config.block_decoding, self.config.merge_decoding)
        shortest = min(decoding.max_new_tokens for decoding in decodings)
        return calls * (self.engine.context - shortest), calls * max(decoding.most_written for decoding in decodings)

    def summarize(self, users: Mapping[str, Sequence[Block]], known: Mapping[str, Known]) -> list[UserSummary]:
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
        wanted: list[tuple[UserSummary, Block]] = []
        for user, blocks in users.items():
            result, before = results[user], known.get(user, {})
            missing = missing_blocks(blocks, before)
            read = missing[: self.config.max_blocks_per_run]
            result.unfinished = len(read) < len(missing)
            wanted += [(result, block) for block in read]
            if len(missing) < len(blocks):
                left_out = {block.number for block in missing}
                result.written += [before[0, block.number] for block in blocks if block.number not in left_out]
        prompts = [self.config.prompts.block_prompt(block.lines) for _, block in wanted]
        for outcome in self.engine.generate(prompts, self.config.block_decoding):
            result, block = wanted[outcome.index]
            if text := take(result, outcome):
                result.written.append(Written(0, block.number, block.key, text))
        for result in results.values():
            result.written.sort(key=attrgetter("number"))

    def _merge(self, known: Mapping[str, Known], results: Mapping[str, UserSummary]) -> None:
        texts = {
            user: list(result.written) for user, result in results.items() if not (result.reason or result.unfinished)
        }
        level = 0
        while texts:
            level += 1
            merges: list[_Merge] = []
            sizes = iter(self.engine.count_tokens([text.text for written in texts.values() for text in written]))
            for user, written in texts.items():
                groups = self._groups(written, sizes)
                if len(written) == 1:
                    results[user].summary = written[0].text
                    continue
                if len(groups) == len(written):
                    results[user].fail("prompt_too_long", "No two of its summaries fit one merge prompt.")
                    continue
                merges.extend(_Merge(user, level, group, final=len(groups) == 1) for group in groups)
            texts = self._run_merges(merges, known, results)

    def _run_merges(
        self, merges: Sequence[_Merge], known: Mapping[str, Known], results: Mapping[str, UserSummary]
    ) -> dict[str, list[Written]]:
        """Run one level of merges; return the texts that the next level has to merge, by user."""
        texts: dict[str, list[Written]] = {}
        wanted: list[tuple[_Merge, str]] = []
        for merge in merges:
            if len(merge.texts) == 1:  # a group of one text goes to the next level as it is
                texts.setdefault(merge.user, []).append(merge.texts[0])
                continue
            # The last merge is the summary itself; only the merges before it are kept as texts.
            key = "" if merge.final else self._key(merge)
            old = known.get(merge.user, {}).get((merge.level, merge.number))
            if not merge.final and old is not None and old.key == key:
                texts.setdefault(merge.user, []).append(old)
                results[merge.user].written.append(old)
            else:
                wanted.append((merge, key))
        prompts = [self.config.prompts.merge_prompt([text.text for text in merge.texts]) for merge, _ in wanted]
        for outcome in self.engine.generate(prompts, self.config.merge_decoding):
            merge, key = wanted[outcome.index]
            result = results[merge.user]
            text = take(result, outcome)
            if merge.final:
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

    def _key(self, merge: _Merge) -> str:
        return fingerprint({"recipe": self.merge_recipe, "texts": [text.key for text in merge.texts]})

    def _groups(self, texts: Sequence[Written], sizes: Iterator[int]) -> list[list[Written]]:
        """Group consecutive texts so that each group fits one merge prompt; `sizes` yields the tokens of each text."""
        groups: list[list[Written]] = [[]]
        used = 0
        for text in texts:
            size = next(sizes)
            if groups[-1] and used + size + _NUMBERING_TOKENS > self._room:
                groups.append([])
                used = 0
            groups[-1].append(text)
            used += size + _NUMBERING_TOKENS
        return groups


def missing_blocks(blocks: Sequence[Block], known: Known) -> Sequence[Block]:
    """The blocks whose summary is missing, or was written from other items or by another recipe (another key)."""
    if not known:
        return blocks
    return [block for block in blocks if (old := known.get((0, block.number))) is None or old.key != block.key]
