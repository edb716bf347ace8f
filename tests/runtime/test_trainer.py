"""Training under a real Ray and a real DeepSpeed: sharding changes no result, nor does a killed worker."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from raypipe.config import is_shaping
from raypipe.errors import RaypipeError, UsageError
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig
from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import InstructionConfig
from raypipe.language.pretraining import LmDataConfig, LmTask, prepare_lm
from raypipe.runtime.averaging import WeightAverage
from raypipe.runtime.trainer import TrainerConfig, TrainingResult, check_room, fit
from tests.runtime.dying import die_once, wait_for_checkpoint

CONFIG = TrainerConfig(
    workers=2, steps=12, batch_size=8, lr=1e-2, warmup_steps=3, checkpoint_every=5, device="cpu", max_failures=1
)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return functional.mse_loss(self.outer(torch.tanh(self.inner(batch["x"]))), batch["y"])


class RegressionTask:
    """Learns a sum. With `dies_at`, one worker is killed at that step, the first time it gets there."""

    def __init__(self, deaths: Path, dies_at: int | None = None) -> None:
        self.deaths, self.dies_at = deaths, dies_at

    def build(self) -> nn.Module:
        return Regression()

    def steps_per_epoch(self, batch_size: int) -> int:
        return 12

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        if step == self.dies_at and rank == 1:
            die_once(self.deaths, checkpointed=step > CONFIG.checkpoint_every)
        with (self.deaths / f"steps-{rank}").open("a") as log:
            log.write(f"{step}\n")
        x = torch.randn(batch_size, 6, generator=torch.Generator().manual_seed(seed * 1000 + step))
        return {"x": x[rank::world], "y": x.sum(1, keepdim=True)[rank::world]}

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")


# Workers cannot import a test module, so its classes travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("ray_cluster")


def train(folder: Path, config: TrainerConfig = CONFIG, dies_at: int | None = None, run: str = "run") -> TrainingResult:
    folder.mkdir(exist_ok=True)
    return fit(RegressionTask(folder, dies_at), config, run, folder / "out")


def weights(result: TrainingResult) -> dict[str, Tensor]:
    return load_file(result.folder / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory) -> TrainingResult:
    return train(tmp_path_factory.mktemp("undisturbed"), CONFIG.model_copy(update={"zero_stage": 3}))


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_every_zero_stage_trains_the_same_weights(stage: int, undisturbed: TrainingResult, tmp_path: Path):
    result = train(tmp_path, CONFIG.model_copy(update={"zero_stage": stage}))
    assert result.losses == pytest.approx(undisturbed.losses, rel=1e-4)
    assert {name: tuple(w.shape) for name, w in weights(result).items()} == {
        "inner.weight": (16, 6),
        "inner.bias": (16,),
        "outer.weight": (1, 16),
        "outer.bias": (1,),
    }
    for name, weight in weights(result).items():
        torch.testing.assert_close(weight, weights(undisturbed)[name], rtol=1e-4, atol=1e-5)


def test_two_workers_train_as_one_because_batches_are_global(undisturbed: TrainingResult, tmp_path: Path):
    alone = train(tmp_path, CONFIG.model_copy(update={"workers": 1}))
    assert alone.losses == pytest.approx(undisturbed.losses, rel=1e-4)


def test_a_killed_worker_changes_no_weight(undisturbed: TrainingResult, tmp_path: Path):
    killed = train(tmp_path, CONFIG.model_copy(update={"zero_stage": 3}), dies_at=8)
    assert (tmp_path / "died").exists()
    # Steps up to the checkpoint at 5 are taken once, those between it and the death twice.
    assert (tmp_path / "steps-0").read_text().split().count("4") == 1
    assert (tmp_path / "steps-0").read_text().split().count("6") == 2
    assert killed.losses == undisturbed.losses
    for name, weight in weights(killed).items():
        assert torch.equal(weight, weights(undisturbed)[name])


def test_an_average_is_stored_that_neither_shards_nor_deaths_change(undisturbed: TrainingResult, tmp_path: Path):
    config = CONFIG.model_copy(update={"average": 0.7})
    alone = train(tmp_path / "alone", config.model_copy(update={"workers": 1}))
    killed = train(tmp_path / "killed", config.model_copy(update={"zero_stage": 3}), dies_at=8)
    assert (tmp_path / "killed/died").exists()
    assert killed.losses == undisturbed.losses, "what is trained is not averaged"
    for name, weight in weights(killed).items():
        torch.testing.assert_close(weight, weights(alone)[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(weight, weights(undisturbed)[name], rtol=1e-3)


def test_an_average_is_what_its_formula_says(tmp_path: Path):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 0.0)
    average, expected = WeightAverage(module, 0.5), 0.0
    for step in range(1, 6):
        nn.init.constant_(module.weight, float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    average.save(tmp_path / "average.safetensors")
    again = WeightAverage(module, 0.5)
    again.load(tmp_path / "average.safetensors")
    with again.in_place():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 5


@pytest.mark.slow
def test_a_worker_killed_before_any_checkpoint_changes_no_weight(undisturbed: TrainingResult, tmp_path: Path):
    killed = train(tmp_path, CONFIG.model_copy(update={"zero_stage": 3}), dies_at=3)
    assert (tmp_path / "steps-0").read_text().split().count("1") == 2
    assert killed.losses == undisturbed.losses
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(killed).items())


def test_a_finished_run_submitted_again_trains_nothing(tmp_path: Path):
    first = train(tmp_path)
    steps = (tmp_path / "steps-0").read_text()
    again = train(tmp_path)
    assert (tmp_path / "steps-0").read_text() == steps
    assert again.losses == first.losses
    assert all(torch.equal(weight, weights(first)[name]) for name, weight in weights(again).items())


def test_a_time_budget_ends_the_run_and_its_schedule(tmp_path: Path):
    result = train(tmp_path, CONFIG.model_copy(update={"steps": 10**6, "max_seconds": 1.0}))
    assert 1 <= result.steps < 10**6
    assert result.seconds < 5


def test_the_language_model_learns_and_loads_like_any_other(tmp_path: Path):
    catalogue = Catalogue([f"Film {n}" for n in range(40)], [{"genre": [f"G{n % 4}"]} for n in range(40)])
    data = LmDataConfig(
        model=BuiltinLmConfig(size="tiny", vocabulary=400, context=256),
        instructions=InstructionConfig(block_examples=200, merge_examples=40, update_examples=0),
    )
    prepare_lm(tmp_path / "prepared", [[1, 2, 3, 4, 5, 6]], catalogue, data)
    config = TrainerConfig(steps=30, batch_size=16, warmup_steps=5, device="cpu", max_failures=0)
    result = fit(LmTask(tmp_path / "prepared"), config, "lm", tmp_path / "lm")
    assert result.losses[-1] < result.losses[0] / 2
    backbone = load_backbone(str(result.folder), device="cpu")
    assert backbone.model.lm_head.weight is backbone.model.model.embed_tokens.weight


class ValidatedTask(RegressionTask):
    """Validates as the test says; notes how often. The shares of two ranks differ, so that a mean needs both."""

    def __init__(self, deaths: Path, values: list[float], dies_at: int | None = None) -> None:
        super().__init__(deaths, dies_at)
        self.values = values

    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        assert not module.training
        assert next(module.parameters()).numel() == 96, "the weights are whole"
        with (self.deaths / f"validations-{rank}").open("a") as log:
            log.write("x")
        asked = len((self.deaths / f"validations-{rank}").read_text()) - 1
        return self.values[asked] * (rank + 1), 0.75 * world

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        return f"rows of step {step}"


@pytest.mark.parametrize(("stage", "first"), [(0, 0.1), (3, 0.1), (0, math.nan)])
def test_the_best_validation_gives_the_weights_and_patience_ends_the_run(
    stage: int, first: float, tmp_path: Path
) -> None:
    options = {"zero_stage": stage, "schedule": "constant", "validate_every": 1 / 6, "patience": 2, "steps": 20}
    config = CONFIG.model_copy(update=options)
    task = ValidatedTask(tmp_path, [first, 0.5, 0.3, 0.4, 0.9])
    result = fit(task, config, "run", tmp_path / "out")
    # Validated after every second step; two in a row were no better than the one after step 4.
    assert result.validations == [
        (2, pytest.approx(first, nan_ok=True)),
        (4, pytest.approx(0.5)),
        (6, pytest.approx(0.3)),
        (8, pytest.approx(0.4)),
    ]
    assert result.steps == 8
    (tmp_path / "short").mkdir()
    short = fit(
        RegressionTask(tmp_path / "short"),
        config.model_copy(update={"steps": 4, "validate_every": None}),
        "short",
        tmp_path / "short/out",
    )
    for name, weight in weights(result).items():
        torch.testing.assert_close(weight, weights(short)[name], rtol=1e-5, atol=1e-6)


class Breaking(nn.Module):
    """Its loss is a number, and its gradient none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (0 * self.weight).square().sum().sqrt()


class BreakingTask(RegressionTask):
    def build(self) -> nn.Module:
        return Breaking()


def test_weights_that_are_no_numbers_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(RaypipeError, match="Weights after step 0 are no numbers"):
        fit(BreakingTask(tmp_path), CONFIG.model_copy(update={"steps": 1}), "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Refusing(RegressionTask):
    """Cannot read what it needs at step 8, until the test has mended it."""

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        if step == 8 and not (self.deaths / "mended").exists():
            wait_for_checkpoint(self.deaths)
            raise ValueError("row 8 is torn\nand so are its columns")
        return super().batch(step, seed, rank, world, batch_size)


def test_a_training_that_is_given_up_tells_why_and_goes_on_when_submitted_again(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"workers": 1, "max_failures": 0})
    with pytest.raises(RaypipeError, match=r"given up: ValueError: row 8 is torn\. Once") as told:
        fit(Refusing(tmp_path), config, "run", tmp_path / "out")
    assert str(tmp_path / "training") in told.value.remedy
    assert told.value.exit_code == 1
    (tmp_path / "mended").touch()
    assert fit(Refusing(tmp_path), config, "run", tmp_path / "out").steps == 12
    assert (tmp_path / "steps-0").read_text().split().count("4") == 1, "it goes on from the checkpoint at 5"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"workers": 4}, "4 training workers with 1 CPU each do not fit on the cluster, which has 2 CPUs"),
        ({"workers": 1, "cpus_per_worker": 3}, "1 training workers with 3 CPUs each do not fit"),
        ({"workers": 1, "device": "cuda"}, r"with 1 CPU and 1 GPU each do not fit.*--trainer\.device cpu"),
    ],
)
def test_workers_without_room_are_refused_before_ray_waits_for_ever(
    options: dict[str, object], problem: str, tmp_path: Path
) -> None:
    if "device" in options and ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match=problem):
        fit(RegressionTask(tmp_path), CONFIG.model_copy(update=options), "run", tmp_path / "out")
    assert not (tmp_path / "training").exists()


def test_room_is_counted_by_node_and_an_autoscaler_may_add_some() -> None:
    node = {"Alive": True, "Labels": {}, "Resources": {"CPU": 3.0, "GPU": 1.0}}
    check_room(2, {"CPU": 2}, [node, node])
    check_room(2, {"CPU": 1, "GPU": 1}, [node, node])
    for workers, needed, nodes in (
        (3, {"CPU": 2}, [node, node]),
        (3, {"CPU": 1, "GPU": 1}, [node, node]),
        (2, {"CPU": 2}, [node, node | {"Alive": False}]),
    ):
        with pytest.raises(UsageError, match=f"room for {workers - 1}"):
            check_room(workers, needed, nodes)
    check_room(9, {"CPU": 8, "GPU": 2}, [node | {"Labels": {"ray.io/node-group": "workers"}}])


def test_a_batch_must_reach_every_worker():
    with pytest.raises(ValidationError, match="without an example"):
        TrainerConfig(workers=4, batch_size=2)


def test_every_field_is_marked_as_shaping_or_free():
    for field in TrainerConfig.model_fields.values():
        assert is_shaping(field) in (True, False)
