"""Instruction examples made from histories and a catalogue: the prompts of summarising with their reference answers.

Nothing here knows users: callers pass item lists that end before the cut (`histories_before_cut`), so that held-out
events never reach training text. Made-up histories over the same catalogue widen the data. They can, because the
answers are a function of the prompt; a few hundred users alone would repeat themselves.

Not covered: tasks other than summarising (each system writes its own examples), and tokenising (`pretraining`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.config import Config, shaping
from raypipe.language.catalogue import Catalogue
from raypipe.language.summary_prompts import SummaryPrompts


@dataclass(frozen=True, slots=True)
class Example:
    """One example. Loss is taken on the answer only; if the prompt is empty, that is the whole text."""

    prompt: str
    answer: str


class InstructionConfig(Config):
    """Options: how many examples of each kind are made, and from what."""

    block_examples: int = shaping(14_000, "examples of summarising one block of items", ge=0)
    merge_examples: int = shaping(26_000, "examples of merging block summaries", ge=0)
    update_examples: int = shaping(10_000, "examples of adding a block to a summary", ge=0)
    synthetic_share: float = shaping(0.5, "share of examples made from made-up histories", ge=0, le=1)
    catalogue_repeats: int = shaping(0, "how often every item's line stands in training as plain text", ge=0)
    block_size: int = shaping(5, "items of one block", ge=1)
    blocks: int = shaping(10, "most blocks that are merged at once", ge=1)
    noise: float = shaping(0.1, "share of merge examples whose block summaries are disturbed", ge=0, le=1)
    seed: int = shaping(0, "of what is drawn: histories, blocks and what disturbs them")


def histories_before_cut(histories: Iterable[Sequence[int]], hold_out: int) -> list[list[int]]:
    """Each history without its last `hold_out` events (1: the last is held out; 2: the last two; 0: production).

    Histories that become empty are dropped. Raises ValueError if `hold_out` is negative.
    """
    if hold_out < 0:
        raise ValueError(f"hold_out is a number of events, so {hold_out} makes no sense.")
    kept = (list(items[: len(items) - hold_out]) for items in histories if len(items) > hold_out)
    return list(kept)


def summary_examples(
    histories: Sequence[Sequence[int]], catalogue: Catalogue, prompts: SummaryPrompts, config: InstructionConfig
) -> Iterator[Example]:
    """Yield block, merge, update and catalogue examples.

    The same arguments always give the same examples in the same order. `histories` hold item indices (1…n) in time
    order and end before the cut.
    """
    rng = np.random.default_rng(config.seed)
    source = _Histories(histories, catalogue, prompts, config, rng)
    lines = catalogue.lines(prompts)
    for _ in range(config.block_examples):
        block = source.draw(1)[0]
        counts = source.counts(block)
        yield Example(prompts.block_prompt([lines[row] for row in block]).text, prompts.block_summary_of_counts(counts))
    for _ in range(config.merge_examples):
        blocks = [source.counts(block) for block in source.draw(_number_of_blocks(config.blocks, rng))]
        if rng.random() < config.noise:
            blocks = [_disturbed(counts, rng) for counts in blocks]
        texts = [prompts.block_summary_of_counts(counts) for counts in blocks]
        # The answer is computed from the disturbed blocks that are shown, so that it follows from the prompt.
        yield Example(prompts.merge_prompt(texts).text, prompts.merge_of_counts(blocks))
    for _ in range(config.update_examples if config.blocks > 1 else 0):
        run = source.draw(int(rng.integers(2, config.blocks + 1)))
        if len(run) > 1:  # a run has one block only if its history has no more
            yield _update_example(run, [source.counts(rows) for rows in run], lines, prompts)
    for _ in range(config.catalogue_repeats):
        yield from (Example("", line) for line in lines)


def _update_example(
    run: Sequence[Sequence[int]], counts: Sequence[Counter[str]], lines: Sequence[str], prompts: SummaryPrompts
) -> Example:
    """The example of adding the last block of a run to the summary of the blocks before; blocks are catalogue rows."""
    summary, worth = prompts.block_summary_of_counts(counts[0]), dict(counts[0])
    for block in counts[1:-1]:
        summary, worth = prompts.reference_update(worth, block)
    shown = prompts.update_prompt(summary, [lines[row] for row in run[-1]]).text
    return Example(shown, prompts.reference_update(worth, counts[-1])[0])


def _number_of_blocks(most: int, rng: np.random.Generator) -> int:
    # Short runs teach the same counting with fewer tokens, and are what new users have; long runs are the usual case.
    return int(rng.integers(1, most + 1 if rng.random() < 0.4 else max(2, most // 2)))


def _disturbed(counts: Counter[str], rng: np.random.Generator) -> Counter[str]:
    """The counts of a block as a model may miscount them: one value is forgotten or counted once more."""
    if not counts:
        return counts
    disturbed = counts.copy()
    value = list(counts)[rng.integers(len(counts))]
    if rng.random() < 0.5:
        del disturbed[value]
    else:
        disturbed[value] += 1
    return disturbed


class _Histories:
    """Draws runs of blocks from the given or made-up histories, as catalogue rows (item index − 1)."""

    def __init__(
        self,
        histories: Sequence[Sequence[int]],
        catalogue: Catalogue,
        prompts: SummaryPrompts,
        config: InstructionConfig,
        rng: np.random.Generator,
    ) -> None:
        self._rng = rng
        self._size = config.block_size
        self._real = [np.asarray(items, dtype=np.int64) - 1 for items in histories if len(items)]
        self._synthetic_share = config.synthetic_share if self._real else 1.0
        self._values = [tuple(prompts.counts([attributes])) for attributes in catalogue.attributes]
        by_value: dict[str, list[int]] = {}
        for row, values in enumerate(self._values):
            for value in values:
                by_value.setdefault(value, []).append(row)
        self._rows_of = [np.asarray(rows) for rows in by_value.values()]
        # A history's chance to be drawn grows with the square root of its length, so that long ones are read enough.
        self._chances = np.cumsum([len(items) ** 0.5 for items in self._real])

    def counts(self, rows: Sequence[int]) -> Counter[str]:
        return Counter(value for row in rows for value in self._values[row])

    def draw(self, blocks: int) -> list[list[int]]:
        """Draw consecutive blocks of rows; the last one may be partial, as the newest block of a user may be."""
        wanted = (blocks - 1) * self._size + self._last_block()
        rows = self._made_up(wanted) if self._rng.random() < self._synthetic_share else self._window(wanted)
        return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]

    def _last_block(self) -> int:
        return self._size if self._rng.random() < 0.7 else int(self._rng.integers(1, self._size + 1))

    def _window(self, wanted: int) -> list[int]:
        items = self._real[np.searchsorted(self._chances[:-1], self._rng.random() * self._chances[-1])]
        start = int(self._rng.integers(0, max(1, len(items) - wanted + 1)))
        return items[start : start + wanted].tolist()

    def _made_up(self, wanted: int) -> list[int]:
        """Make up a history: a few weighted favourite values, other favourites later on, and pure chance in between."""
        rng = self._rng
        turn = int(rng.integers(0, wanted + 1))
        return self._taste(turn) + self._taste(wanted - turn)

    def _taste(self, events: int) -> list[int]:
        rng = self._rng
        rows = rng.integers(0, len(self._values), size=events)
        if self._rows_of:
            favourites = rng.integers(0, len(self._rows_of), size=int(rng.integers(1, 5)))
            share = np.cumsum(rng.dirichlet(np.ones(len(favourites))))
            follows = rng.random(events) < rng.random()
            picked = favourites[np.searchsorted(share[:-1], rng.random(events))]
            places = rng.random(events)
            for event in np.flatnonzero(follows):
                pool = self._rows_of[picked[event]]
                rows[event] = pool[int(places[event] * len(pool))]
        return rows.tolist()
