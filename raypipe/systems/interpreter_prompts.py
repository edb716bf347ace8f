"""The prompts of RecInterpreter's tasks (arXiv 2310.20487, section 3.3), each in paraphrases.

{state} stands for the soft token of a history, {before} and {after} for those on both sides of one event, {item} for an item's.
"""

from __future__ import annotations

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.templates import Templates, require_marks

_RECOVERY = Templates(
    training=(
        "The history of this person is {state}. The items chosen, oldest first:",
        "{state} stands for what somebody chose. In order, that was:",
        "List the titles behind {state}, oldest first:",
        "Somebody's choices were {state}. Their titles, oldest first:",
        "Read {state} and name what was chosen, in order:",
        "What did the person behind {state} choose, oldest first?",
    ),
    test=("Somebody's past is {state}. Name what was chosen, oldest first:",),
)
_RESIDUAL = Templates(
    training=(
        "Before: {before}. After: {after}. What was chosen in between is:",
        "A choice turned {before} into {after}. Its title:",
        "From {before} to {after} by choosing:",
        "First there was {before}, and then {after}. The title chosen meanwhile:",
        "The step from {before} to {after} is one title:",
        "What was chosen between {before} and {after}?",
    ),
    test=("First {before}, then {after}. The one title chosen meanwhile:",),
)
_ITEM = (
    "The title of {item} is:",
    "{item} stands for one title:",
    "Name the one title {item}:",
)


class InterpreterPrompts(Config):
    """The templates of the tasks."""

    recovery: Templates = shaping(lambda: _RECOVERY, "mark {state}")
    residual: Templates = shaping(lambda: _RESIDUAL, "marks {before} and {after}")
    item: tuple[str, ...] = shaping(lambda: _ITEM, "mark {item}; learnt, and never asked", min_length=1)

    @model_validator(mode="after")
    def _marks(self) -> InterpreterPrompts:
        self.recovery.require(["state"])
        self.residual.require(["before", "after"])
        require_marks(self.item, ["item"])
        return self
