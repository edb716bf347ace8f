"""Stored models of a system, asked anew: which of its options say how it is measured, and may be others than it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raypipe.config import Config
from raypipe.errors import UsageError
from raypipe.pipeline.held_out import Cut
from raypipe.runtime.progress import say
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace

if TYPE_CHECKING:
    from raypipe.pipeline.align import AlignConfig

_READS_STATES = {"constrained", "judges", "rubric"}
_OPTIONS = {
    "recinterpreter": _READS_STATES,
    "recexplainer": _READS_STATES,
    "trsr": {"recent", "history", "missing", "noise", "controls", "candidates", "block_items", "against"},
    # Of the prompts only what they are perturbed by.
    "lancer": {"constrained", "beams", "filter_seen", "cold_events", "shown", "prompts"},
}
_CUT = ("hold_out", "held_out_share")


def as_trained(config: AlignConfig) -> AlignConfig:
    """With the cut, and unless told the summaries, of a stored adapter that asks everybody: floors, facts and trees beside it are
    of what it learnt from. Where it comes from another workspace, the cut is that of the data here.

    Raises UsageError where another cut is given, and for an adapter that has read every event.
    """
    if config.adapter is None or config.system not in ("trsr", "lancer"):
        return config
    workspace = config.open_workspace()
    if config.adapter_workspace is not None and Workspace(config.adapter_workspace).uri != workspace.uri:
        return config
    adapter = find_model(Models(workspace.store), config.adapter)
    if adapter.lineage.get("system") != config.system:
        return config  # told where it is asked
    trained = {name: adapter.lineage[name] for name in _CUT}
    Cut(max(1, trained["hold_out"]), 0.0).check_events(adapter)
    for name, value in trained.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise UsageError(
                f"{adapter.name}/{adapter.hash} was trained with --{name} {value}, and what stands beside it has to know as much: "
                f"--{name} {getattr(config, name)} is another cut.",
                f"Leave out --{name}, or train one of that cut.",
            )
    if config.system == "trsr" and "summaries" not in config.model_fields_set:
        trained["summaries"] = adapter.lineage["summaries"]
    return config.model_copy(update=trained)


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
