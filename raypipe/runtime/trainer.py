"""Training on a Ray cluster: Ray Train starts and restarts the workers, and DeepSpeed shards their state.

A task is plain torch and says what is trained on which batches. The trainer says how: workers, ZeRO stage, steps,
schedule, checkpoints. A run that lost a worker continues from its last checkpoint and ends with the same weights as a
run that lost none. So does a run that is submitted again under the same name after its driver died. With another number
of workers or another ZeRO stage training starts anew, because optimiser state depends on both. With a time budget
(`max_seconds`) results are no longer equal, because a slower machine takes fewer steps.

A checkpoint counts once Ray's controller has polled it, which it does every 2 s. If a worker dies sooner, training
continues from the checkpoint before. The controller falls behind if there is more than one checkpoint in 2 s, so
`checkpoint_every` steps should take longer.

Not covered: gradient accumulation, tensor or pipeline parallelism.
"""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import model_validator

from raypipe.config import WRITTEN, Config, free, shaping
from raypipe.errors import RaypipeError, UsageError

if TYPE_CHECKING:
    from ray.train.v2.api.exceptions import TrainingFailedError
    from torch import Tensor, nn

MODEL = "model"
"""The folder of a checkpoint that holds what the task saved."""
# Nodes that KubeRay or an autoscaler starts have this label; machines of a manually started cluster do not.
_NODE_GROUP = "ray.io/node-group"
_NODE_ID = "ray.io/node-id"
_CURVE_POINTS = 100
_END_STEPS = 10


class TrainingTask(Protocol):
    """What is trained. It is pickled to every worker and opened there."""

    def build(self) -> nn.Module:
        """The module to train, on CPU. Its forward(batch) returns the mean loss of the batch as a scalar.

        Under ZeRO-3 each validation builds another module, to hold the whole weights.
        """
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """The number of batches of this size that all examples fill, at least one."""
        ...

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> Any:
        """This rank's share of the global batch of `step`, name → tensor. It must depend on the arguments only."""
        ...

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the trained weights as a checkpoint. `weights` are whole tensors by their names in `build()`."""
        ...


@runtime_checkable
class ValidatedTask(TrainingTask, Protocol):
    """A task that can measure how good a model is. The trained weights are those of the best validation."""

    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        """The sum of a metric over this rank's share of examples, and their number. A higher mean is better."""
        ...

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        """A text for a person that says what the batch of `step` holds.

        It is shown if the loss of that step is not finite.
        """
        ...


@runtime_checkable
class PartialTask(TrainingTask, Protocol):
    """A task that trains a part of an existing model. The rest of that model is neither checkpointed nor stored."""

    def keeps(self, name: str) -> bool:
        """Whether the weight of this name is trained and stored."""
        ...


class TrainerConfig(Config):
    """How a task is trained. Batch sizes are global: more workers mean smaller shares, not larger batches."""

    workers: int = shaping(1, "processes; part of the output, as the order of summation follows it", ge=1)
    zero_stage: Annotated[Literal[0, 1, 2, 3], WRITTEN] = free(
        0, "what DeepSpeed shards: nothing, optimiser, + gradients, + weights"
    )
    dtype: Literal["float32", "bfloat16"] = shaping("float32", "precision of training")
    epochs: float = shaping(1.0, "passes over the examples; unused when `steps` is set", gt=0)
    steps: int | None = shaping(None, "optimiser steps", ge=1)
    max_seconds: float | None = shaping(None, "time budget; the schedule ends by then, whatever steps are left", gt=0)
    batch_size: int = shaping(16, "examples of one step over all workers", ge=1)
    lr: float = shaping(1.5e-3, "peak learning rate of AdamW", gt=0)
    betas: tuple[float, float] = shaping((0.9, 0.98), "AdamW's decay rates")
    weight_decay: float = shaping(0.05, "on matrices; never on norms and biases", ge=0)
    clip: float = shaping(1.0, "largest gradient norm", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = shaping("linear", "after the warm-up")
    warmup_steps: int = shaping(50, "steps until the learning rate is at its peak", ge=0)
    average: float = shaping(
        0.0, "decay, a step, of the moving average of weights that is validated and stored; 0 for none", ge=0, lt=1
    )
    seed: int = shaping(0, "of weights, batches and dropout")
    validate_every: float | None = shaping(
        None, "epochs between validations; unset: the last weights are the result", gt=0
    )
    patience: int = shaping(10, "validations without a better one after which training ends", ge=1)
    storage: str = free("", "folder or URI all nodes share, for checkpoints of running training")
    checkpoint_every: int = free(500, "steps between checkpoints", ge=1)
    max_failures: int = free(3, "worker failures after which the run gives up; -1 for never", ge=-1)
    device: Literal["auto", "cpu", "cuda"] = free("auto", "auto trains on GPUs where the cluster has enough")
    cpus_per_worker: int = free(1, "CPU cores, and torch threads, of each worker", ge=1)

    @model_validator(mode="after")
    def _each_worker_has_an_example(self) -> TrainerConfig:
        if self.batch_size < self.workers:
            raise ValueError(f"a batch of {self.batch_size} leaves some of {self.workers} workers without an example")
        return self


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished training.

    It holds the checkpoint folder, the mean loss of every step, the seconds spent in steps, and every validation as
    (step, metric).
    """

    folder: Path
    losses: list[float]
    seconds: float
    validations: list[tuple[int, float]]

    @property
    def steps(self) -> int:
        return len(self.losses)

    def figures(self) -> dict[str, float]:
        """The figures that a job reports: mean loss of the first and of the last steps, number of steps, seconds."""
        ends = {"loss_first": self.losses[:_END_STEPS], "loss_last": self.losses[-_END_STEPS:]}
        means = {name: float(np.mean(losses)) for name, losses in ends.items()}
        return {**means, "steps": self.steps, "train_seconds": round(self.seconds, 1)}

    def curve(self) -> dict[str, Any]:
        """The data of a plot of the training, small enough to be stored with the model.

        `seconds`; `steps`; `losses`, at most 100 pairs of (step, mean loss since the pair before); `validations` as
        (step, metric).
        """
        length = max(1, -(-self.steps // _CURVE_POINTS))
        ends = range(length, self.steps + length, length)
        losses = [[min(end, self.steps), float(np.mean(self.losses[end - length : end]))] for end in ends]
        return {
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "losses": [[step, round(loss, 6)] for step, loss in losses],
            "validations": [[step, round(value, 6)] for step, value in self.validations],
        }


def fit(task: TrainingTask, config: TrainerConfig, run: str, out: Path, node: str | None = None) -> TrainingResult:
    """Train `task` and write its checkpoint to `out`, which appears whole or not at all.

    Ray must be initialised. `run` names the training in `config.storage` (default: beside `out`). A training of the
    same name continues where that run stopped, so the name must contain a hash of everything that shapes the result. If
    `node` is given, all workers run on the node of that id, because no other node has the task's files (`only_node`).

    Raises UsageError if there are fewer examples than workers, if the cluster has no room for the workers, or if
    validation is asked for and the task has none. Raises RaypipeError if the loss or the weights are no longer finite,
    or if more than `max_failures` workers failed.
    """
    if config.validate_every is not None and not isinstance(task, ValidatedTask):
        raise UsageError("This training has nothing to be validated on.", "Leave out --trainer.validate_every.")
    # Ask a copy: what a task has opened here must not be pickled to every worker.
    if (examples := copy(task).steps_per_epoch(1)) < config.workers:
        raise UsageError(
            f"{config.workers} workers are too many for {examples} examples: each learns from a share of every batch.",
            f"Set --trainer.workers to {examples} or less.",
        )
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from raypipe.runtime.training_loop import train_on_worker
    from raypipe.runtime.training_progress import shown_on_stderr

    needed = _needed(config)
    gpu = "GPU" in needed
    if node is None:
        check_room(config.workers, needed, ray.nodes())
    out.parent.mkdir(parents=True, exist_ok=True)
    storage = config.storage or str(out.parent.resolve() / "training")
    try:
        with shown_on_stderr() as board:
            result = TorchTrainer(
                train_on_worker,
                train_loop_config={"task": task, "config": config, "board": board, "gpu": gpu},
                torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=config.workers,
                    use_gpu=gpu,
                    resources_per_worker=needed,
                    label_selector=None if node is None else {_NODE_ID: node},
                ),
                run_config=RunConfig(
                    # A checkpoint can be read only with the ZeRO stage and the number of workers that wrote it.
                    name=f"{run}-workers{config.workers}-zero{config.zero_stage}",
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=config.max_failures),
                    checkpoint_config=CheckpointConfig(num_to_keep=2),
                ),
            ).fit()
    except TrainingFailedError as error:
        raise RaypipeError(
            f"The training failed and was given up: {_told(error)}.",
            f"Once the reason is gone, the same command goes on from the last checkpoint under {storage}, where there is one; "
            "--trainer.max_failures says how many failures of workers a training survives.",
        ) from error
    if problem := result.return_value.get("diverged"):
        raise RaypipeError(
            problem,
            "Lower the learning rate or `clip`, or train in float32; the weights before that step are in the last "
            f"checkpoint under {storage}.",
        )
    assert result.checkpoint is not None, "a finished run has reported its last checkpoint"
    with result.checkpoint.as_directory() as checkpoint:
        _place(Path(checkpoint) / MODEL, out)
    told = result.return_value
    return TrainingResult(out, told["losses"], told["seconds"], [(at, value) for at, value in told["validations"]])


def check_room(workers: int, needed: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError if the workers can never fit on these nodes.

    Each worker needs the resources `needed` on one node. `nodes` are as from `ray.nodes()`. If an autoscaler starts the
    nodes, nothing is raised, because Ray waits for more of them.
    """
    alive = [node for node in nodes if node["Alive"]]
    if any(_NODE_GROUP in node["Labels"] for node in alive):
        return
    room = sum(min(int(node["Resources"].get(name, 0) // count) for name, count in needed.items()) for node in alive)
    if room < workers:
        has = (f"{sum(node['Resources'].get(name, 0) for node in alive):.0f} {name}s" for name in ("CPU", "GPU"))
        raise UsageError(
            f"{workers} training workers with {_each(needed)} each do not fit on the cluster, which has {' and '.join(has)} on "
            f"{len(alive)} nodes: room for {room}.",
            "Lower --trainer.workers or --trainer.cpus_per_worker, "
            + ("train with --trainer.device cpu, " if "GPU" in needed else "")
            + "or add nodes.",
        )


def only_node(config: TrainerConfig, driver_cpus: float) -> str:
    """The id of the driver's node, for workers that read files that no other node has.

    The driver itself takes `driver_cpus` of the node's CPUs. Ray must be initialised. Raises UsageError if the workers
    do not fit on the node.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    needed = _needed(config)
    free = {**node["Resources"], "CPU": node["Resources"].get("CPU", 0) - driver_cpus}
    room = max(0, min(int(free.get(name, 0) // count) for name, count in needed.items()))
    if room < config.workers:
        raise UsageError(
            f"The workspace is on an object store and no folder is named that all nodes share, so that training workers have to be on "
            f"the driver's node: of {config.workers} with {_each(needed)} each it has room for {room}.",
            "Name a folder on a volume that every node mounts with --work_folder (--lm.work_folder and --train.work_folder in a night) "
            "and one for models with --model_cache, or "
            + ("train with --trainer.device cpu, or " if "GPU" in needed else "")
            + "lower --trainer.workers or --trainer.cpus_per_worker.",
        )
    return str(here)


def _needed(config: TrainerConfig) -> dict[str, int]:
    """The resources of one worker, name → count."""
    import ray

    gpu = config.device == "cuda" or (
        config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= config.workers
    )
    return {"CPU": config.cpus_per_worker, **({"GPU": 1} if gpu else {})}


def _each(needed: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in needed.items())


def _told(error: TrainingFailedError) -> str:
    """The first line of the error of the workers or of Ray's controller.

    If several workers differ, the first two lines.
    """
    causes = getattr(error, "worker_failures", {}).values() or [getattr(error, "controller_failure", error)]
    lines = ("".join(traceback.format_exception_only(cause)).splitlines()[0] for cause in causes)
    return "; ".join([*dict.fromkeys(lines)][:2]).removesuffix(".")


def remove_checkpoints(config: TrainerConfig, run: str) -> None:
    """Delete what `fit` stored in `config.storage` of `run`, and of runs named after it.

    Their number of workers and ZeRO stage do not matter. Raises OSError or pyarrow.ArrowInvalid if that fails.
    """
    from pyarrow.fs import FileSelector, FileSystem, FileType

    files, folder = FileSystem.from_uri(config.storage)
    for found in files.get_file_info(FileSelector(folder, allow_not_found=True)):
        if found.type == FileType.Directory and found.base_name.startswith(f"{run}-"):
            files.delete_dir(found.path)


def _place(model: Path, out: Path) -> None:
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    shutil.copytree(model, staging, dirs_exist_ok=True)
    staging.chmod(0o755)
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)
