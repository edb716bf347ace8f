"""The prompts of RecInterpreter's tasks (arXiv 2310.20487, section 3.3), each in paraphrases.

{state} stands for the soft token of a history, {before} and {after} for those before and after one event, {item} for an
item's. They all come right before the answer. Measured: if words follow them, a small language model reads next to
nothing from them.
"""

from __future__ import annotations

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.templates import Templates, require_marks

_RECOVERY = Templates(
    training=(
        "The titles behind this history, oldest first: {state}",
        "What somebody chose, in order: {state}",
        "List the titles that were chosen, oldest first: {state}",
        "Somebody's choices in titles, oldest first: {state}",
        "Read this and name what was chosen, in order: {state}",
        "What did this person choose, oldest first? {state}",
    ),
    test=(
        "The titles of this history, in order: {state}",
        "Name the titles, oldest first: {state}",
        "What was chosen, in order? {state}",
        "Somebody's past in titles, oldest first: {state}",
    ),
)
_RECOVERY_OF_ONE = Templates(
    training=(
        "A title that was chosen before: {state}",
        "One of the titles somebody chose: {state}",
        "One title of this history: {state}",
        "Any one of a person's choices: {state}",
        "Read this and name one title that was chosen: {state}",
        "Name something this person chose. {state}",
    ),
    test=(
        "Any title of this history: {state}",
        "Name one of the titles that were chosen: {state}",
        "What was one of the choices before? {state}",
        "A title from somebody's past: {state}",
    ),
)
_RESIDUAL = Templates(
    training=(
        "The title chosen between these two: {before}{after}",
        "A choice turned the first into the second. Its title: {before}{after}",
        "From the one to the other by choosing: {before}{after}",
        "The one title between before and after: {before}{after}",
        "The step between these is one title: {before}{after}",
        "What was chosen in between? {before}{after}",
    ),
    test=(
        "The one title chosen meanwhile: {before}{after}",
        "What came between these two? {before}{after}",
        "One title stands between these: {before}{after}",
        "Which title was chosen in between? {before}{after}",
    ),
)
_ITEM = (
    "The one title that this is: {item}",
    "This stands for one title: {item}",
    "Name the one title: {item}",
)


class InterpreterPrompts(Config):
    """The templates of the tasks."""

    recovery: Templates = shaping(lambda: _RECOVERY, "mark {state}; of titles oldest first")
    recovery_of_one: Templates = shaping(lambda: _RECOVERY_OF_ONE, "mark {state}; of one of the titles")
    residual: Templates = shaping(lambda: _RESIDUAL, "marks {before} and {after}")
    item: tuple[str, ...] = shaping(lambda: _ITEM, "mark {item}; learnt, and never asked", min_length=1)

    @model_validator(mode="after")
    def _marks(self) -> InterpreterPrompts:
        self.recovery.require(["state"])
        self.recovery_of_one.require(["state"])
        self.residual.require(["before", "after"])
        require_marks(self.item, ["item"])
        return self
