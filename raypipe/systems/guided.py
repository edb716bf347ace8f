"""Guided embedding refinement (arXiv 2504.11658): a language model scores items and users on named attributes.

An item is scored from its text, a user from the texts of the last items before the cut. The answer is a JSON object
with one number per attribute. It is read in one of two ways. `expected` is the expectation over the numbers in each
slot of the object (`raypipe.language.number_slots`); the gradient of the recommendation loss can flow through it.
`parsed` reads the JSON that the model writes; a value that cannot be parsed is missing and counted. How recommenders
use the scores is in `raypipe.recommenders.guided`.

The paper publishes neither the prompts, nor the attributes, nor how the losses are combined: all of these are ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterConfig, LoraOptions
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.prompt import Prompt
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.language.templates import fill, require_marks
from raypipe.systems.guided_attributes import Attribute

NAME = "guided"
"""Under which scores are stored."""

_ATTRIBUTES = "{attributes}"
Loss = Literal["sampled_softmax", "bpr"]

_ITEM = """Below is an item.
{item}
Rate it from 1 to {top} as a JSON object:
{attributes}
Answer:"""
_USER = """Below are items one person chose, oldest first.
{items}
Rate from 1 to {top} what this person is after, as a JSON object:
{attributes}
Answer:"""


class GuidedPrompts(Config):
    """The questions about an item and about a user.

    An answer names the attributes itself, so that a question may leave them out if its answer is read as `expected`.
    """

    item: str = shaping(_ITEM, "marks {item}, {top} and, unless answers alone name them, {attributes}")
    user: str = shaping(_USER, "marks {items}, {top} and, unless answers alone name them, {attributes}")

    @model_validator(mode="after")
    def _marks(self) -> GuidedPrompts:
        for template, mark in ((self.item, "item"), (self.user, "items")):
            require_marks([template], [mark, "top", *(["attributes"] if _ATTRIBUTES in template else [])])
        return self

    @property
    def show_attributes(self) -> bool:
        return _ATTRIBUTES in self.item and _ATTRIBUTES in self.user


class GuidedConfig(Config):
    """Options: what is scored, how scores are read, and how the language model is tuned."""

    domain: str = shaping(
        "catalogue", "movies, clothing, games, a YAML file, or catalogue: derived from its own fields"
    )
    attributes: int = shaping(10, "most attributes that are derived from a catalogue", ge=2)
    described: bool = shaping(True, "prompts say of every attribute what it is and what the ends of its scale mean")
    top: int = shaping(10, "scores are whole numbers from 1 to this", ge=2, le=10)
    reading: Literal["expected", "parsed"] = shaping(
        "expected", "the expectation over the numbers in each slot, or the numbers the model writes"
    )
    history: int = shaping(10, "last items before the cut that tell of a user", ge=1)
    text_characters: int = shaping(200, "characters of an item's text that are shown with the item", ge=0)
    tuned: bool = shaping(True, "the language model is trained on the two losses; else it is asked as it is")
    lora: LoraOptions | None = shaping(
        LoraOptions, "updates of the language model; null leaves its matrices as they are"
    )
    embeddings: bool = shaping(False, "the language model's embedding table and head are trained too")
    loss: Loss = shaping(
        "sampled_softmax",
        "of the dot products of normalised scores: which item was next, or that it comes before others",
    )
    negatives: int = shaping(16, "items drawn beside the next ones, for all users of a step", ge=1)
    format_weight: float = shaping(
        1.0, "λ, of the cross-entropy of the object's words beside the recommendation loss", ge=0
    )
    prompts: GuidedPrompts = shaping(GuidedPrompts)

    @model_validator(mode="after")
    def _something_is_tuned(self) -> GuidedConfig:
        if self.tuned and self.lora is None and not self.embeddings:
            raise ValueError(
                "tuned without lora or embeddings trains nothing: leave one of them, or set tuned to false"
            )
        return self

    @model_validator(mode="after")
    def _attributes_are_shown_where_they_are_needed(self) -> GuidedConfig:
        if not self.prompts.show_attributes and (self.described or self.reading == "parsed"):
            raise ValueError(
                f"a template without {_ATTRIBUTES} neither describes them nor tells who writes the answer which there are: "
                "put the mark in, or set described to false and reading to expected"
            )
        return self

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(lora=self.lora, embeddings=self.embeddings)


@dataclass(frozen=True)
class Rating:
    """The questions about one catalogue's items and its users."""

    config: GuidedConfig
    attributes: tuple[Attribute, ...]
    catalogue: Catalogue

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    @property
    def words(self) -> list[str]:
        """The text around the numbers of an answer, [attributes + 1] pieces."""
        marks = [f"{json.dumps(name, ensure_ascii=False)}: " for name in self.names]
        return ["{" + marks[0], *(f", {mark}" for mark in marks[1:]), "}"]

    def item_lines(self) -> list[str]:
        """A line for each item as it stands in questions about items, with the beginning of its text."""
        return self.catalogue.lines(SummaryPrompts(text_characters=self.config.text_characters))

    def short_lines(self) -> list[str]:
        """A line for each item as it stands in histories, without its text."""
        return self.catalogue.lines(SummaryPrompts())

    def item_prompt(self, line: str) -> Prompt:
        return self._prompt(self.config.prompts.item, {"item": line})

    def user_prompt(self, lines: Sequence[str]) -> Prompt:
        """The question about a user, given the lines of their items, oldest first."""
        return self._prompt(self.config.prompts.user, {"items": "\n".join(lines)})

    def user_prompts(
        self, tokenizer: PromptTokenizer, histories: Sequence[Sequence[int]], lines: Sequence[str], room: int
    ) -> list[Prompt]:
        """The question about each history's user, with as many of the last items as fit into `room` tokens.

        `histories` hold item indices in time order; at most the last `history` items are shown. Raises UsageError if no
        item fits.
        """
        costs = tokenizer.count_tokens([f"{line}\n" for line in lines])
        (frame,) = tokenizer.encode([self.user_prompt([]).text])
        left, prompts = room - len(frame), []
        for history in histories:
            recent = list(history[-self.config.history :])
            # Lines are counted one by one: joined they may take fewer tokens, and at most one newline's cost more.
            while recent and sum(costs[item - 1] for item in recent) > left:
                recent.pop(0)
            if not recent:
                raise too_long(room)
            prompts.append(self.user_prompt([lines[item - 1] for item in recent]))
        return prompts

    def parsed(self, text: str) -> NDArray[np.float32]:
        """Scores float32 [attributes] from an answer; NaN where one is missing, not a number, or outside the scale."""
        found = _first_object(text)
        numbers = [found.get(name) for name in self.names]
        good = [
            isinstance(number, int | float) and not isinstance(number, bool) and 1 <= number <= self.config.top
            for number in numbers
        ]
        return np.array([number if fits else np.nan for number, fits in zip(numbers, good, strict=True)], np.float32)

    def _prompt(self, template: str, pieces: dict[str, str]) -> Prompt:
        listed = [
            f"- {one.name}: {one.description} (1 {one.low}, {self.config.top} {one.high})"
            if self.config.described
            else f"- {one.name}"
            for one in self.attributes
        ]
        return fill(template, {**pieces, "attributes": "\n".join(listed), "top": str(self.config.top)})


def too_long(room: int) -> UsageError:
    """The error for a question that does not fit a language model's context, which leaves it `room` tokens."""
    return UsageError(
        f"A question about an item takes more than the {room} tokens that the language model leaves it.",
        "Show less: --guided.text_characters, --no-guided.described, fewer --guided.attributes; or name a language model of a "
        "longer context.",
    )


def _first_object(text: str) -> dict[str, Any]:
    """The JSON object at the first brace of a text; empty if there is none or it cannot be parsed."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:])
    except (json.JSONDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
