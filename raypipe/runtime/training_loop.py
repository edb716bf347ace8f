"""The code of each training worker: the step loop over a DeepSpeed engine, checkpoints, and progress."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raypipe.runtime.averaging import WeightAverage, held_of
from raypipe.runtime.memory import WorkingMemory
from raypipe.runtime.trainer import MODEL, PartialTask, TrainerConfig, TrainingTask, ValidatedTask

if TYPE_CHECKING:
    from ray.train import Checkpoint

_STATE = "state"
_BEST = "best.safetensors"
_FINAL_LR = 0.02
_PROGRESS_EVERY_S = 5.0
_RECORDED_AT_ONCE = 50


def train_on_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Train `arguments["task"]`. Returns the losses, seconds and validations of the run, or what diverged."""
    config: TrainerConfig = arguments["config"]
    worker = _Worker(arguments["task"], config, arguments["board"], gpu=arguments["gpu"])
    return worker.run()


class _Worker:
    """One rank of a training run."""

    def __init__(self, task: TrainingTask, config: TrainerConfig, board: Any, *, gpu: bool) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.task, self.config, self.board = task, config, board
        self.partial = isinstance(task, PartialTask)
        self.losses: list[float] = []  # the mean over ranks of every step
        self.validations: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}  # whole weights of the best validation; on rank 0 only
        self.seconds = 0.0  # spent by earlier attempts, up to the checkpoint that this one started from
        self.memory = WorkingMemory()
        if not gpu:
            torch.set_num_threads(config.cpus_per_worker)
        torch.manual_seed(config.seed)
        self.engine = _deepspeed_engine(task.build(), config, self.world, gpu=gpu)
        self.average = WeightAverage(self.engine.module, config.average) if config.average else None
        epoch = task.steps_per_epoch(config.batch_size)
        self.steps = config.steps or max(1, round(config.epochs * epoch))
        self.validate_every = 0 if config.validate_every is None else max(1, round(config.validate_every * epoch))

    def run(self) -> dict[str, Any]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        pending: list[Tensor] = []  # this rank's losses that are not averaged over ranks yet
        started = reported = time.monotonic()
        first = step = len(self.losses)
        while (progress := self._progress(step, started)) < 1 and not self._out_of_patience():
            self._set_lr(step, progress)
            # A step's dropout depends on the step, not on how often the run was resumed.
            torch.manual_seed(hash((self.config.seed, step, self.rank)))
            batch = self.task.batch(step, self.config.seed, self.rank, self.world, self.config.batch_size)
            loss = self.engine({name: tensor.to(self.engine.device) for name, tensor in batch.items()})
            self.engine.backward(loss)
            self.engine.step()
            pending.append(loss.detach().float())
            step += 1
            if self.average is not None:
                self.average.update(step)
            if self.rank == 0 and time.monotonic() - reported > _PROGRESS_EVERY_S:
                reported = time.monotonic()
                self._post(step, pending[-1].item(), (step - first) / (reported - started), progress, started)
            if len(pending) == _RECORDED_AT_ONCE or step % self.config.checkpoint_every == 0:
                self._record(pending)
                self.memory.settle()
                if problem := self._diverged():
                    return {"diverged": problem}
            if self.validate_every and (step % self.validate_every == 0 or step == self.steps):
                self._validate(step)
            if step % self.config.checkpoint_every == 0 and step < self.steps:
                if problem := self._broken():
                    return {"diverged": problem}
                self._checkpoint(time.monotonic() - started, final=False)
        self._record(pending)
        if problem := self._diverged() or self._broken():
            return {"diverged": problem}
        seconds = self.seconds + time.monotonic() - started
        self._checkpoint(time.monotonic() - started, final=True)
        return {"losses": self.losses, "seconds": seconds, "validations": self.validations}

    def _validate(self, step: int) -> None:
        """Measure the whole weights. Every rank validates its share of the examples."""
        assert isinstance(self.task, ValidatedTask), "validate_every is set for a task that has no validation"
        with self._averaged():
            module = self._whole_module().eval()
            total = torch.tensor(self.task.validate(module, self.rank, self.world), device=self.engine.device)
            dist.all_reduce(total)
            metric = (total[0] / total[1]).item()
            # A metric that is not finite never becomes the best, and never has to be beaten.
            if math.isfinite(metric) and metric > max(self._validated(), default=-math.inf):
                self.best = dict(self._weights(here=self.rank == 0))
        self.engine.module.train()
        self.validations.append((step, metric))
        if self.rank == 0:
            self.board.post.remote(f"step {step}/{self.steps}  validation {metric:.4f}")

    def _whole_module(self) -> nn.Module:
        """The module with whole parameters. Every rank must call it.

        Under ZeRO-3 it is a copy. In the module itself each layer is gathered for its forward pass and released after
        it by all ranks together, but the ranks' shares of the validation may have different numbers of batches.
        """
        if self.config.zero_stage < 3:
            return self.engine.module
        module = self.task.build()
        dtypes = {name: weight.dtype for name, weight in self.engine.module.named_parameters()}
        module.load_state_dict(self._weights(here=True), strict=False)
        for name, weight in module.named_parameters():
            weight.data = weight.data.to(dtypes[name])
        return module.to(self.engine.device)

    def _weights(self, *, here: bool) -> Mapping[str, Tensor]:
        """The weights that are stored, or nothing unless `here` is set. Every rank must call it."""
        keeps = self.task.keeps if isinstance(self.task, PartialTask) else lambda name: True
        return _whole_weights(self.engine.module, self.config.zero_stage, keeps, here=here)

    def _averaged(self) -> AbstractContextManager[None]:
        """A context in which the module holds the weights that are validated and stored."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _out_of_patience(self) -> bool:
        values = self._validated()
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.config.patience

    def _validated(self) -> list[float]:
        """The metric of every validation, −∞ if it is not finite."""
        return [value if math.isfinite(value) else -math.inf for _, value in self.validations]

    def _diverged(self) -> str:
        """A message on the first newly recorded step whose loss is not finite, or "" if there is none."""
        first = max(0, len(self.losses) - _RECORDED_AT_ONCE)
        step = next((at for at in range(first, len(self.losses)) if not math.isfinite(self.losses[at])), None)
        return "" if step is None else f"The loss of step {step} is {self.losses[step]}.{self._circumstances(step)}"

    def _broken(self) -> str:
        """A message if weights are not finite, or "". Every rank must call it.

        A loss shows broken weights only one step later.
        """
        finite = all(bool(torch.isfinite(held).all()) for held in held_of(self.engine.module))
        broken = torch.tensor(float(not finite), device=self.engine.device)
        dist.all_reduce(broken)
        step = len(self.losses) - 1
        return f"Weights after step {step} are no numbers.{self._circumstances(step)}" if broken.item() else ""

    def _circumstances(self, step: int) -> str:
        held = ""
        if isinstance(self.task, ValidatedTask):
            held = f" Its batch held {self.task.describe(step, self.config.seed, self.config.batch_size)}."
        kept = step - step % self.config.checkpoint_every
        good = f"The last good checkpoint is that of step {kept}." if kept else "There was no checkpoint before it."
        return f"{held} {good}"

    def _progress(self, step: int, started: float) -> float:
        """The share of the run that is over, by steps or by time, whichever is more. It is the same on every rank."""
        share = step / self.steps
        if self.config.max_seconds is None:
            return share
        elapsed = torch.tensor(self.seconds + time.monotonic() - started, device=self.engine.device)
        dist.broadcast(elapsed, src=0)
        return max(share, elapsed.item() / self.config.max_seconds)

    def _set_lr(self, step: int, progress: float) -> None:
        warmup = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        decay = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.config.lr * warmup * max(_FINAL_LR, decay[self.config.schedule])

    def _record(self, pending: list[Tensor]) -> None:
        if pending:
            means = torch.stack(pending)
            dist.all_reduce(means)
            self.losses += (means / self.world).tolist()
            pending.clear()

    @property
    def _average_file(self) -> str:
        return f"average-{self.rank}.safetensors"

    def _checkpoint(self, elapsed: float, *, final: bool) -> None:
        """Save a checkpoint.

        Every rank writes its shard into a directory of its own; Ray merges them and waits for all ranks.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = {
                "world": self.world,
                "seconds": self.seconds + elapsed,
                "losses": self.losses,
                "validations": self.validations,
            }
            (folder / f"rank-{self.rank}.json").write_text(json.dumps(run))
            self.engine.save_checkpoint(str(folder), tag=_STATE, exclude_frozen_parameters=self.partial)
            if self.best:
                save_file(self.best, folder / _BEST)
            if self.average is not None:
                self.average.save(folder / self._average_file)
            if final:
                with self._averaged():
                    last = self._weights(here=self.rank == 0)
                if self.rank == 0:
                    self.task.save(self.best or last, folder / MODEL)
            metrics = {"step": len(self.losses), "loss": self.losses[-1]}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _restore(self, checkpoint: Checkpoint) -> None:
        with checkpoint.as_directory() as folder:
            run = json.loads((Path(folder) / "rank-0.json").read_text())
            assert run["world"] == self.world, "a run's name holds its configuration, the number of workers included"
            self.engine.load_checkpoint(folder, tag=_STATE, load_module_strict=not self.partial)
            if self.rank == 0 and (Path(folder) / _BEST).exists():
                self.best = load_file(Path(folder) / _BEST)
            if self.average is not None:
                self.average.load(Path(folder) / self._average_file)
        self.losses, self.seconds = run["losses"], run["seconds"]
        self.validations = [(at, value) for at, value in run["validations"]]
        if self.rank == 0:
            self.board.post.remote(f"goes on after step {len(self.losses)}")

    def _post(self, step: int, loss: float, rate: float, progress: float, started: float) -> None:
        elapsed = time.monotonic() - started
        left_s = min(
            (self.steps - step) / rate,
            math.inf if self.config.max_seconds is None else self.config.max_seconds - self.seconds - elapsed,
        )
        line = f"step {step}/{self.steps}  loss {loss:.4f}  {rate:.1f} steps/s  {max(0, left_s):.0f} s left"
        self.board.post.remote(line)


def _deepspeed_engine(module: nn.Module, config: TrainerConfig, world: int, *, gpu: bool) -> Any:
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = _imported_deepspeed()
    from deepspeed.utils import logger

    # This operator is for inference only. It is compiled on first use behind a lock file, which a killed worker would
    # leave for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed logs to stdout, which belongs to the job's result.
    logger.setLevel("ERROR")
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    share = max(1, config.batch_size // world)
    # DeepSpeed keeps small parameters whole on every rank, and they then have two values to average and to put in
    # place.
    whole = {"param_persistence_threshold": 0} if config.average else {}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": share,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.clip,
            "bf16": {"enabled": config.dtype == "bfloat16"},
            "zero_optimization": {"stage": config.zero_stage, **whole},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine


def _whole_weights(
    module: nn.Module, zero_stage: int, keeps: Callable[[str], bool], *, here: bool
) -> Mapping[str, Tensor]:
    """The parameters and persistent buffers that are kept, on CPU; nothing unless `here` is set.

    Every rank must call it, because ZeRO-3 gathers from all ranks.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if keeps(name):
            with _gathered([parameter], zero_stage):
                if here:
                    weights[name] = parameter.detach().to("cpu", copy=True)
    if here:
        persistent = {name for name in module.state_dict() if keeps(name)}
        weights |= {n: b.detach().to("cpu", copy=True) for n, b in module.named_buffers() if n in persistent}
    return weights


def _imported_deepspeed() -> Any:
    """Import DeepSpeed without MLflow, which only its autotuner needs.

    MLflow takes 2 of the 5 s of a worker's imports (measured).
    """
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # what Python documents for "cannot be imported"
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    return deepspeed


@contextmanager
def _gathered(parameters: list[nn.Parameter], zero_stage: int) -> Iterator[None]:
    """A context in which the parameters are whole on every rank."""
    if zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
