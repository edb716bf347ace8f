"""Engines that judge, with the workspace's own language model resolved for those that read it."""

from __future__ import annotations

from collections.abc import Mapping

from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.loaded import find_builtin_lm, is_builtin
from raypipe.runtime.job import ModelCache
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig


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


def _resolved(config: ModelCache, workspace: Workspace, engine: EngineConfig, option: str) -> EngineConfig:
    if not engine.reads_checkpoint or not is_builtin(engine.lm):
        return engine
    model = find_builtin_lm(workspace, f"{option}, as lm", engine.lm)
    return engine.model_copy(update={"lm": str(config.fetch(workspace, model))})
