"""Engines that judge: the workspace's own language model resolved for those that read it, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.loaded import find_builtin_lm, is_builtin
from raypipe.runtime.job import ModelCache
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.ledger import Usage
from raypipe.storage.workspace import Workspace
from raypipe.systems.judges import Rubric
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.system import System

Identities = Mapping[str, Mapping[str, Any]]
"""By a judge's name what its engine is, with the content of its model."""


def resolved_judges(
    config: ModelCache, workspace: Workspace, judges: Mapping[str, EngineConfig], option: str
) -> dict[str, EngineConfig]:
    """`judges` with the folder of the model in the place of `builtin` and `builtin/HASH`.

    Raises UsageError, naming the `option` that names the judges, if the model is not there.
    """
    return {name: _resolved(config, workspace, engine, option) for name, engine in judges.items()}


def with_judges(
    config: ModelCache, workspace: Workspace, options: InterpreterConfig | ExplainerConfig
) -> InterpreterConfig | ExplainerConfig:
    """A system's options with its judges resolved, as the system is built from them.

    An adapter is stored with the names of its judges, and not with their folders.
    """
    if isinstance(options, ExplainerConfig):
        return options
    judges = resolved_judges(config, workspace, options.judges, "--recinterpreter.judges")
    return options.model_copy(update={"judges": judges})


def identities_of(system: System) -> Identities:
    """The identities of a system's judges; none if nobody is asked. Raises UsageError if a checkpoint does not exist."""
    return {} if system.judges is None else system.judges.identities


def spent_on_judges(system: System) -> Usage:
    """What asking a system's judges has taken so far."""
    return Usage() if system.judges is None else system.judges.spent


def judge_params(rubric: Rubric, judges: Mapping[str, EngineConfig], identities: Identities) -> dict[str, Any]:
    """What MLflow is told of `judges`, as they were given: the rubric, the seed, and by name the model and its identity."""
    told: dict[str, Any] = {"rubric": rubric.prompt, "seed": rubric.decoding.seed}
    for name, engine in judges.items():
        told[f"judge.{name}"] = engine.model_name or engine.engine
        told[f"judge.{name}.identity"] = canonical_json(identities[name])
    return told


def judge_params_of(options: InterpreterConfig | ExplainerConfig, system: System) -> dict[str, Any]:
    """The same of a system's judges as its options name them; nothing if no engine is asked."""
    if isinstance(options, ExplainerConfig) or not options.judges:
        return {}
    return judge_params(options.rubric, options.judges, identities_of(system))


def _resolved(config: ModelCache, workspace: Workspace, engine: EngineConfig, option: str) -> EngineConfig:
    if not engine.reads_checkpoint or not is_builtin(engine.lm):
        return engine
    model = find_builtin_lm(workspace, f"{option}, as lm", engine.lm)
    return engine.model_copy(update={"lm": str(config.fetch(workspace, model))})
