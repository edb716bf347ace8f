"""Measuring stored models anew: a system's options of how it is measured may differ from those of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raypipe.config import Config
from raypipe.errors import UsageError
from raypipe.pipeline.held_out import Cut
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.tracking import Tracking
from raypipe.storage.workspace import Workspace

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

_READS_STATES = {"constrained", "judges", "rubric"}
_OPTIONS = {
    "recinterpreter": _READS_STATES,
    "recexplainer": _READS_STATES,
    "trsr": {
        *("recent", "history", "missing", "noise", "history_missing", "history_noise"),
        *("controls", "candidates", "block_items", "against"),
    },
    # Of the prompts only the perturbation may differ.
    "lancer": {"constrained", "beams", "filter_seen", "cold_events", "shown", "prompts"},
}
_CUT = ("hold_out", "held_out_share")


def as_trained(config: AlignConfig) -> AlignConfig:
    """The config with the cut of the stored adapter, so that what stands beside it learns from the same events.

    That is floors, facts and trees. It is for the systems that ask everybody (trsr and lancer). For trsr the summaries
    are the adapter's too, unless they are given. If the adapter comes from another workspace, the cut stays that of the
    data here. Raises UsageError if another cut is given, and for an adapter that has read every event.
    """
    if config.adapter is None or config.system not in ("trsr", "lancer"):
        return config
    workspace = config.open_workspace()
    if config.adapter_workspace is not None and Workspace(config.adapter_workspace).uri != workspace.uri:
        return config
    adapter = find_model(Models(workspace.store), config.adapter)
    if adapter.lineage.get("system") != config.system:
        return config  # `find_adapter` refuses it later
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
    """The options that a model was `stored` with, as JSON values, and over them those `given` of how it is asked."""
    anew = given.model_dump(mode="json", include=_OPTIONS[system], exclude_unset=True)
    if "prompts" in anew:
        anew["prompts"] = {name: value for name, value in anew["prompts"].items() if name == "perturbed"}
    return {**stored, **{name: _over(stored.get(name), value) for name, value in anew.items()}}


def _over(stored: Any, given: Any) -> Any:
    """What is given, and of options that have options of their own what is stored beside it."""
    return {**stored, **given} if isinstance(stored, Mapping) and isinstance(given, Mapping) else given


def tell_unread(system: str, given: Config, stored: Mapping[str, Any]) -> None:
    """Tell the user of options `given` other than the model was `stored` with that asking it anew does not read."""
    told = given.model_dump(mode="json", exclude_unset=True, exclude=_OPTIONS[system])
    if unread := sorted(name for name, value in told.items() if _differs(value, stored.get(name))):
        names = ", ".join(f"--{system}.{name}" for name in unread)
        say(
            f"align: a stored model keeps what it was trained with: {names} is not read; leave out --adapter to train anew"
        )


def _differs(given: Any, stored: Any) -> bool:
    if isinstance(given, Mapping) and isinstance(stored, Mapping):
        return any(_differs(value, stored.get(name)) for name, value in given.items())
    return bool(given != stored)


def tell_trained(tracking: Tracking, model: Model, status: str, metrics: Mapping[str, float], **made_of: str) -> None:
    """Log a training of `align` that was done now, with the hashes of what the model is `made_of`.

    If the model was stored before, tell the user so: options of how it is measured were not read for it.
    """
    if status == "ok":
        params = {"model": model.hash, **made_of}
        tracking.log_run("align", model.recipe, params, metrics, system=model.lineage["system"])
    else:
        named = f"{model.name}/{model.hash}"
        say(f"align: {named} is stored, with the figures of its training; --adapter {named} measures it anew")


def tell_measured(
    tracking: Tracking, config: AlignConfig, result: JobResult, asked: Mapping[str, Any], **made_of: str
) -> None:
    """Log that a stored model was measured anew, as `asked` says, beside what it is `made_of` here.

    Every way of asking is a run of its own.
    """
    ((name, content),) = result.models.items()
    how = {"asked", "answer_tokens", "beside", *_CUT}
    key = fingerprint(
        {"model": f"{name}/{content}", "made_of": made_of, **config.model_dump(mode="json", include=how), **asked}
    )
    figures = {metric: value for metric, value in result.metrics.items() if value is not None}
    params = {"model": content, "measured_anew": True, **made_of}
    tracking.log_run("align", key, params, {**figures, **result.cost}, system=config.system)
