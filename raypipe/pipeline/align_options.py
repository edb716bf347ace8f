"""The options of `raypipe align`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from raypipe.config import free, merge, shaping
from raypipe.pipeline.loaded import BUILTIN
from raypipe.pipeline.training_folders import TrainingOptions
from raypipe.runtime.job import JobConfig, ModelCache
from raypipe.runtime.trainer import TrainerConfig
from raypipe.systems import lancer, recexplainer, recinterpreter, trsr
from raypipe.systems.explainer_examples import Task
from raypipe.systems.guided import GuidedConfig
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.trsr import TrsrConfig

_TRAINING: dict[str, Mapping[str, object]] = {
    "recinterpreter": recinterpreter.TRAINING,
    "recexplainer": recexplainer.TRAINING,
    "trsr": trsr.TRAINING,
    "lancer": lancer.TRAINING,
}
_ONLY_FOR = {
    "adapter_workspace": ("lancer",),
    "replay": ("recexplainer",),
    "summaries": ("recexplainer", "trsr"),
    "beside": ("recinterpreter", "recexplainer", "trsr"),
}
"""The systems that read an option. For other systems it has no effect."""
_TASKS: dict[str, Task] = {"replay": "T5", "summaries": "T6b"}
"""The tasks by which RecExplainer learns what an option names."""


class AlignOptions(TrainingOptions, ModelCache):
    """Which recommender, language model and system are joined, and how the result is trained and measured."""

    model: str = free("sasrec", "a recommender's name, for its newest, or NAME/HASH")
    lm: str = free(
        BUILTIN, "checkpoint folder or hub name; builtin is the workspace's own, builtin/HASH one of several"
    )
    system: Literal["recinterpreter", "recexplainer", "guided", "trsr", "lancer"] = free(
        "recinterpreter", "which of the systems below joins them"
    )
    adapter: str | None = free(
        None,
        "NAME or NAME/HASH of a stored adapter that is measured on the states of `model`, constrained or not and by the judges "
        "given here, and nothing trained",
    )
    adapter_workspace: str | None = free(
        None, "workspace that holds `adapter`, for lancer: what it learnt there is asked on the data of this one"
    )
    recinterpreter: InterpreterConfig = free(InterpreterConfig, "a recommender's states in words")
    recexplainer: ExplainerConfig = free(ExplainerConfig, "a language model that predicts what the recommender does")
    guided: GuidedConfig = free(
        GuidedConfig, "scores of items and users on attributes, for `train` to put into a recommender"
    )
    trsr: TrsrConfig = free(TrsrConfig, "candidates ranked by a language model that knows a summary and the last items")
    lancer: LancerConfig = free(LancerConfig, "a language model that writes the next item")
    trainer: TrainerConfig = shaping(
        lambda: TrainerConfig(epochs=10, batch_size=16, lr=1e-3, weight_decay=1e-6),
        "training under Ray Train and DeepSpeed; what is not given is as published for the system, where it is",
    )
    replay: str | None = free(
        None,
        "JSON lines with prompt and answer, or with the messages of a conversation, that are learnt too, so that a model keeps "
        "its language; for recexplainer",
    )
    summaries: Literal["hierarchical", "recurrent"] | None = free(
        None,
        "whose summaries recexplainer learns to write, and trsr shows, a stored one those it was made with unless told: of "
        "`summarize --summaries.hold_out`, the same as here",
    )
    hold_out: int = shaping(1, "last events of every user that training never sees", ge=0)
    held_out_share: float = shaping(
        0.1,
        "share of the users, by hash, never trained on: those who are asked about; of trsr and lancer everybody is",
        ge=0,
        lt=1,
    )
    users: int = shaping(20_000, "most users that are trained on", ge=1)
    positions: int = shaping(10, "most places in a history that training reads", ge=1)
    asked: int = shaping(1_000, "most held-out users that are asked about", ge=1)
    beside: bool = free(False, "when it is measured, what probes of vectors and baselines tell is measured too")
    answer_tokens: int = shaping(256, "most tokens of an answer when it is measured", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _trained_as_published(cls, values: Any) -> Any:
        """Fill in trainer options that are not given: first from the system's paper, then from the defaults."""
        if not isinstance(values, Mapping) or not isinstance(values.get("trainer", {}), Mapping):
            return values
        system = str(values.get("system", cls.model_fields["system"].default))
        return {**values, "trainer": merge(_TRAINING.get(system, {}), values.get("trainer", {}))}

    @model_validator(mode="after")
    def _options_are_read(self) -> Self:
        for option, systems in _ONLY_FOR.items():
            if self.system not in systems and getattr(self, option) not in (None, False):
                raise ValueError(f"{option} says nothing to {self.system}: it is for {' and '.join(systems)}")
        for option, task in _TASKS.items():
            if self.system == "recexplainer" and getattr(self, option) and task not in self.recexplainer.tasks:
                raise ValueError(
                    f"{option} says nothing without {task}: add it to recexplainer.tasks, or leave {option} out"
                )
        if self.system in ("recinterpreter", "recexplainer", "guided") and self.trainer.validate_every is not None:
            raise ValueError(f"{self.system} has nothing to be validated on: leave out trainer.validate_every")
        if self.adapter_workspace is not None and self.adapter is None:
            raise ValueError("adapter_workspace is where a stored adapter is: name it with adapter")
        return self

    def chosen(self) -> InterpreterConfig | ExplainerConfig:
        """The configuration of the chosen one of the two systems that read states.

        The other's has no effect on the output.
        """
        assert self.system in ("recinterpreter", "recexplainer"), f"{self.system} has a job of its own"
        return self.recinterpreter if self.system == "recinterpreter" else self.recexplainer


class AlignConfig(AlignOptions, JobConfig):
    """Configuration of `align`."""
