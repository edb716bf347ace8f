"""Prompts that summarise histories, and their reference answers (LLM-TRSR, arXiv 2403.13325, section 3.2).

An item is one line "column: value; column: value". Each block of items is summarised alone. A second prompt merges the
block summaries, numbered in time order. The reference answers count attribute values: they train the built-in LM and
are the deterministic floor that a larger model should beat.

The grammar of a reference answer, which `raypipe.metrics.text` reads:

    block   "Comedy twice, Drama three times and War once."
    merged  "Mostly chooses Drama and Comedy; also Thriller. Lately more Comedy."

A block states counts, because a merge of bare names could not tell two mentions from ten. "Lately" repeats the one of
the named values whose frequency rose most; it is left out if none rose.

An update knows the order of a summary's values but not their counts. So the reference gives each place a worth: the
first value named counts as six items, the second as four, the third as three, and each item of the new block as one.
"Lately" is then, of the named values that the block lifted to a better place, the one that occurs in the most
items of the block. If a block summary is updated, the counts that it states are used as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import field_validator

from raypipe.config import Config, shaping
from raypipe.language.prompt import Prompt

Attributes = Mapping[str, Sequence[str]]
"""One item's attributes: name → values, e.g. {"genre": ["Drama", "War"], "brand": ["3M"]}."""

NOTHING = "No clear preference."
"""The reference answer where no item has an attribute."""

LATELY = "Lately"
ELLIPSIS = "…"

_TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times", 7: "seven times"}
_LEADING = 2  # values after "Mostly chooses"; the rest follow "also"
_WORTH = 12  # divided by 2 + place to give the worth of the values that a summary names: 6, 4, 3, 2, …

_BLOCK = """Below are items one person chose, oldest first.
{items}
In one sentence, say how often each kind occurs, in alphabetical order.
Answer:"""
_MERGE = """Below are summaries of what one person chose over time, oldest first.
{summaries}
In two sentences, say what this person mostly chooses, and what more lately.
Answer:"""
_UPDATE = """Below are a summary of what one person chose so far and the items chosen since, oldest first.
Summary: {summary}
{items}
In two sentences, say what this person now mostly chooses, and what more lately.
Answer:"""


class SummaryPrompts(Config):
    """Options: the templates of summarising, and what the reference answers name."""

    block: str = shaping(_BLOCK, "prompt for one block of items; {items} stands for their lines")
    merge: str = shaping(_MERGE, "prompt that merges block summaries; {summaries} stands for the numbered summaries")
    update: str = shaping(_UPDATE, "prompt that adds a block to a summary; {summary} and {items} stand for the two")
    attributes: tuple[str, ...] = shaping((), "attributes shown and counted; all of them when empty")
    text_characters: int = shaping(0, "characters of an item's text that are shown; 0 leaves the text out", ge=0)
    block_values: int = shaping(12, "most values a reference block summary names", ge=1)
    summary_values: int = shaping(3, "values a reference merged summary names", ge=1)
    recent_blocks: int = shaping(3, "blocks at the end of a history that count as lately", ge=1)

    @field_validator("block")
    @classmethod
    def _block_takes_items(cls, template: str) -> str:
        return _with_placeholder(template, "{items}")

    @field_validator("merge")
    @classmethod
    def _merge_takes_summaries(cls, template: str) -> str:
        return _with_placeholder(template, "{summaries}")

    @field_validator("update")
    @classmethod
    def _update_takes_both(cls, template: str) -> str:
        return _with_placeholder(_with_placeholder(template, "{items}"), "{summary}")

    def item_line(self, title: str, attributes: Attributes, text: str = "") -> str:
        """One item as one line, empty columns left out: "title: Alien; genre: Horror, Sci-Fi; text: In space…"."""
        columns = [("title", title)]
        columns += [(name, ", ".join(values)) for name, values in self._shown(attributes)]
        columns.append(("text", beginning(text, self.text_characters)))
        return "; ".join(f"{name}: {_one_line(value)}" for name, value in columns if value.strip())

    def block_prompt(self, item_lines: Sequence[str]) -> Prompt:
        """The prompt that summarises one block of item lines, oldest first."""
        return Prompt.of(self.block.replace("{items}", "\n".join(item_lines)))

    def merge_prompt(self, block_texts: Sequence[str]) -> Prompt:
        """The prompt that merges block summaries given in time order."""
        lines = (f"{number}. {_one_line(text)}" for number, text in enumerate(block_texts, 1))
        return Prompt.of(self.merge.replace("{summaries}", "\n".join(lines)))

    def update_prompt(self, summary: str, item_lines: Sequence[str]) -> Prompt:
        """The prompt that adds a block of item lines, oldest first, to the summary of everything before."""
        values = {"{summary}": _one_line(summary), "{items}": "\n".join(item_lines)}
        # Replaced in one pass, so that a title that looks like a placeholder stays a title.
        return Prompt.of(re.sub(r"\{summary\}|\{items\}", lambda found: values[found[0]], self.update))

    def counts(self, items: Sequence[Attributes]) -> Counter[str]:
        """Count in how many of the items each attribute value occurs, all attributes pooled."""
        return Counter(
            value for item in items for value in dict.fromkeys(v for _, values in self._shown(item) for v in values)
        )

    def reference_block_summary(self, items: Sequence[Attributes]) -> str:
        """The exact summary of one block: how often each value occurs, in order of name."""
        return self.block_summary_of_counts(self.counts(items))

    def block_summary_of_counts(self, counts: Mapping[str, int]) -> str:
        """As `reference_block_summary`, for values already counted."""
        if not counts:
            return NOTHING
        named = sorted(_ranked(counts)[: self.block_values])
        return f"{_listed([f'{value} {times(counts[value])}' for value in named])}."

    def reference_merge(self, blocks: Sequence[Sequence[Attributes]]) -> str:
        """The exact merged summary of blocks of items in time order."""
        return self.merge_of_counts([self.counts(block) for block in blocks])

    def merge_of_counts(self, blocks: Sequence[Mapping[str, int]]) -> str:
        """As `reference_merge`, for blocks whose values are already counted."""
        total: Counter[str] = Counter()
        for counts in blocks:
            total.update(counts)
        named = _ranked(total)[: self.summary_values]
        if not named:
            return NOTHING
        return self._told(named, self._risen(blocks, named))

    def _told(self, named: Sequence[str], risen: str | None) -> str:
        summary = f"Mostly chooses {_listed(named[:_LEADING])}"
        if named[_LEADING:]:
            summary += f"; also {_listed(named[_LEADING:])}"
        return f"{summary}. {LATELY} more {risen}." if risen else f"{summary}."

    def reference_update(self, before: Mapping[str, int], block: Mapping[str, int]) -> tuple[str, dict[str, int]]:
        """The updated summary, and the worth of the values it names for the next update.

        `before` is the worth of each value that the summary so far names; `block` is in how many new items each value
        occurs.
        """
        total = Counter(before)
        total.update(block)
        named = _ranked(total)[: self.summary_values]
        if not named:
            return NOTHING, {}
        places = {value: place for place, value in enumerate(_ranked(before))}
        lifted = [
            value for place, value in enumerate(named) if block.get(value) and places.get(value, len(named)) > place
        ]
        risen = max(lifted, key=lambda value: block[value], default=None)
        return self._told(named, risen), {value: max(1, _WORTH // (2 + place)) for place, value in enumerate(named)}

    def _risen(self, blocks: Sequence[Mapping[str, int]], named: Sequence[str]) -> str | None:
        """The named value whose mean count per block rose most from the earlier blocks to the recent ones."""
        earlier, recent = blocks[: -self.recent_blocks], blocks[-self.recent_blocks :]
        if not earlier:
            return None

        def rise(value: str) -> float:
            return _mean_count(recent, value) - _mean_count(earlier, value)

        best = max(named, key=rise)
        return best if rise(best) > 0 else None

    def _shown(self, attributes: Attributes) -> list[tuple[str, Sequence[str]]]:
        names = self.attributes or tuple(sorted(attributes))
        return [(name, attributes[name]) for name in names if attributes.get(name)]


def _ranked(counts: Mapping[str, int]) -> list[str]:
    # Ties are ordered by name: that order is the same in every history, so a model can learn it.
    return sorted(counts, key=lambda value: (-counts[value], value))


def _mean_count(blocks: Sequence[Mapping[str, int]], value: str) -> float:
    return sum(counts.get(value, 0) for counts in blocks) / len(blocks)


def times(count: int) -> str:
    """The count in words: once, twice, three times."""
    return _TIMES.get(count, f"{count} times")


def _listed(values: Sequence[str]) -> str:
    return " and ".join(([", ".join(values[:-1])] if len(values) > 1 else []) + [values[-1]])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def beginning(text: str, characters: int) -> str:
    """At most `characters` characters of a text, on one line, with an ellipsis if there were more; empty for 0."""
    text = _one_line(text)
    if len(text) <= characters or not characters:
        return text[:characters]
    return text[:characters].rstrip() + ELLIPSIS


def _with_placeholder(template: str, placeholder: str) -> str:
    if template.count(placeholder) != 1:
        raise ValueError(f"the template must hold {placeholder} exactly once")
    return template
