"""Summaries of long histories in blocks (LLM-TRSR, arXiv 2403.13325, section 3.2): what both paradigms share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.engines.checks import AnswerChecks
from raypipe.engines.engine import Decoding, Outcome
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.storage.fingerprint import fingerprint

# Raise it whenever the same input would give another text. A golden test on the echo engine guards it.
STEP_VERSION = 1
UNFINISHED = "0" * 32
"""Ends the change key of a summary that is not yet of the whole history, so that the next run goes on with it."""


class SummariesConfig(Config):
    """Options of summarising histories."""

    paradigm: Literal["hierarchical", "recurrent"] = shaping(
        "hierarchical", "blocks alone and then merged, or each block added to the summary of those before it"
    )
    block_items: int = shaping(5, "items of a block", ge=1)
    window_events: int = shaping(
        50, "last events that a hierarchical summary is of, whole blocks only; a recurrent one is of all", ge=1
    )
    hold_out: int = shaping(
        0,
        "last events of every user that no summary is of: for honest evaluations, published as a variant of its own",
        ge=0,
    )
    max_blocks_per_run: int = free(1000, "new blocks of one user that a run reads; the next one goes on", ge=1)
    prompts: SummaryPrompts = shaping(SummaryPrompts, "prompt templates")
    block_decoding: Decoding = shaping(Decoding, "decoding of block summaries")
    merge_decoding: Decoding = shaping(Decoding, "decoding of merges and of recurrent updates")
    checks: AnswerChecks = shaping(AnswerChecks, "what an answer has to be")

    @model_validator(mode="after")
    def _window_holds_a_block(self) -> SummariesConfig:
        # The window has only whole blocks: one smaller than a block would leave some users without any.
        if self.window_events < self.block_items:
            raise ValueError(f"window_events is {self.window_events}, less than one block of {self.block_items} items")
        return self

    @property
    def variant(self) -> str:
        """The variant under which the rows of this paradigm are published."""
        return f"summarize-{self.paradigm}" + (f"-cut{self.hold_out}" if self.hold_out else "")

    def window_start(self, events: int) -> int:
        """The first event that the summary of a history of `events` events covers; it is the start of a block."""
        if self.paradigm == "recurrent":
            return 0
        return -(-max(events - self.window_events, 0) // self.block_items) * self.block_items

    def block_recipe(self, engine: Mapping[str, Any]) -> str:
        """Fingerprint of everything that shapes a block's summary; `engine` is the engine's identity."""
        return fingerprint(
            {
                "step": STEP_VERSION,
                "engine": dict(engine),
                "decoding": self.block_decoding.shaping_values(),
                "checks": self.checks.shaping_values(),
                "block_items": self.block_items,
                "prompt": self.prompts.block,
                "attributes": list(self.prompts.attributes),
                "text_characters": self.prompts.text_characters,
                **self._of_recurrence(),
            }
        )

    def merge_recipe(self, engine: Mapping[str, Any]) -> str:
        """Fingerprint of all that shapes a whole summary: its blocks, the merge's prompt and decoding, the window."""
        if self.paradigm == "recurrent":
            return fingerprint({"blocks": self.block_recipe(engine), "paradigm": self.paradigm})
        return fingerprint(
            {
                "blocks": self.block_recipe(engine),
                "decoding": self.merge_decoding.shaping_values(),
                "prompt": self.prompts.merge,
                "window_events": self.window_events,
            }
        )

    def _of_recurrence(self) -> dict[str, Any]:
        """What else shapes the text of a recurrent block, since that text is the summary of everything up to it."""
        if self.paradigm == "hierarchical":
            return {}
        return {"update": self.prompts.update, "update_decoding": self.merge_decoding.shaping_values()}


class Block(NamedTuple):
    """One piece of a history: its number from the first event ever, the key of what shapes its text, its items' lines.

    The last block of a history may not be `full`; the recurrent paradigm does not keep its text, so no later run builds
    on it.
    """

    number: int
    key: str
    lines: Sequence[str]
    full: bool = True


def blocks_of(lines: Sequence[str], config: SummariesConfig) -> list[Block]:
    """Cut one history of which nothing is written yet into blocks; `lines` are its items' lines, oldest first."""
    size = config.block_items
    starts = range(config.window_start(len(lines)), len(lines), size)
    return [Block(at // size, "", lines[at : at + size], at + size <= len(lines)) for at in starts]


class Written(NamedTuple):
    """A text of one level: block summaries have level 0, merges of groups 1, 2, ...; recurrent texts have level 0."""

    level: int
    number: int
    key: str
    text: str


@dataclass
class UserSummary:
    """The result for one user: a summary, or the reason and message of a failure; and in either case the cost.

    An `unfinished` result covers only the blocks read so far, because there were more than one run may read.
    """

    user_id: str
    summary: str = ""
    reason: str = ""
    message: str = ""
    written: list[Written] = field(default_factory=list)
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unfinished: bool = False

    def fail(self, reason: str, message: str) -> None:
        if not self.reason:
            self.reason, self.message = reason, message


Known = Mapping[tuple[int, int], Written]
"""A user's texts from earlier runs, by (level, number)."""


class Summarizer(Protocol):
    """Writes the summaries of many users at a time, so that the engine always has a full batch."""

    def most_calls(self, blocks: Sequence[Block], known: Known) -> int:
        """An upper bound on the engine calls of one user: what a hard cap has to grant."""
        ...

    def most_tokens(self, calls: int) -> tuple[int, int]:
        """Upper bounds on the prompt tokens and the generated tokens of `calls` calls."""
        ...

    def summarize(self, users: Mapping[str, Sequence[Block]], known: Mapping[str, Known]) -> list[UserSummary]:
        """Summarise users, given their blocks in time order and the texts already written, by (level, number).

        A known text is used only if its key still holds. Every user gets a result, in order.
        """
        ...


def take(result: UserSummary, outcome: Outcome) -> str:
    """Add the cost of one outcome to `result`, and its failure if it has an error; return its stripped text."""
    result.calls += outcome.calls
    result.tokens_in += outcome.tokens_in
    result.tokens_out += outcome.tokens_out
    if outcome.error is not None:
        result.fail(outcome.error.kind, outcome.error.message)
    return outcome.text.strip()
