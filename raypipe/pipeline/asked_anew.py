"""Stored models of a system, asked anew: which of its options say how it is measured, and may be others than it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypipe.config import Config
from raypipe.runtime.progress import say
from raypipe.storage.models import Model

_READS_STATES = {"constrained", "judges", "rubric"}
_OPTIONS = {
    "recinterpreter": _READS_STATES,
    "recexplainer": _READS_STATES,
    "trsr": {"recent", "history", "missing", "noise", "controls", "candidates", "block_items"},
    # Of the prompts only what they are perturbed by.
    "lancer": {"constrained", "beams", "filter_seen", "cold_events", "shown", "prompts"},
}


def asked_anew(system: str, given: Config, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a model was `stored` with, as JSON has them, and over them those `given` that say how it is asked."""
    anew = given.model_dump(mode="json", include=_OPTIONS[system] & given.model_fields_set)
    if "prompts" in anew:
        anew["prompts"] = {**stored["prompts"], "perturbed": anew["prompts"]["perturbed"]}
    return {**stored, **anew}


def tell_stored(model: Model) -> None:
    """For who asks for a training that was done: options of how it is measured are not read for it."""
    named = f"{model.name}/{model.hash}"
    say(f"align: {named} is stored, with the figures of its training; --adapter {named} measures it anew")
