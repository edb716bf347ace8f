"""Recommenders under Ray Train and DeepSpeed: the same losses whatever the workers and the ZeRO stage, exact resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from raypipe.recommenders.attribute_scores import AttributeScores
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.guided import fuse
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories
from raypipe.runtime.trainer import TrainerConfig, TrainingResult, fit

pytestmark = pytest.mark.usefixtures("ray_cluster")
ITEMS = 30
TRAINER = TrainerConfig(
    steps=12, batch_size=8, lr=3e-3, warmup_steps=2, schedule="constant", validate_every=1, device="cpu", max_failures=0
)


def task(folder: Path, lengths: NDArray[np.int64], **options: object) -> RecommenderTask:
    rng = np.random.default_rng(0)
    count = len(lengths)
    users = np.arange(count) * 7
    histories = Histories(rng.integers(1, ITEMS + 1, int(lengths.sum())).astype(np.int32), lengths.cumsum(), users)
    values = {"width": 8, "hidden": 16, "max_length": 10, "dropout": 0.0, **options}
    config = RecommenderConfig.model_validate(values)
    held = rng.integers(1, ITEMS + 1, count).astype(np.int32)
    start = None
    if config.guided.used:
        items, mine = (rng.normal(5, 2, (rows, 2)).astype(np.float32) for rows in (ITEMS + 1, count))
        scores = AttributeScores(("dark", "funny"), items, mine, users, {})
        start = fuse(scores, config.guided, config.width, None, histories.counts(ITEMS) > 0, 0)
    prepare_training(folder, histories, held, {"items": ITEMS, "hash": "x"}, config, 0, start)
    return RecommenderTask(folder)


def train(folder: Path, workers: int, stage: int, **options: object) -> TrainingResult:
    config = TRAINER.model_copy(update={"workers": workers, "zero_stage": stage})
    lengths = np.random.default_rng(1).integers(2, 20, 50)
    return fit(task(folder / "data", lengths, **options), config, "run", folder / "out")


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"loss": {"kind": "sampled_softmax", "negatives": 12}}, marks=pytest.mark.slow),
        pytest.param({"loss": {"kind": "gbce", "negatives": 12}}, marks=pytest.mark.slow),
        *(pytest.param({"model": name}, marks=pytest.mark.slow) for name in ("gru4rec", "caser")),
        pytest.param({"guided": {"scores": "guided/1"}}, marks=pytest.mark.slow),
    ],
    ids=["softmax", "sampled softmax", "gbce", "gru4rec", "caser", "guided"],
)
def test_two_workers_with_sharded_weights_learn_what_one_learns(options: dict[str, object], tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", 1, 0, **options)
    shared = train(tmp_path / "shared", 2, 3, **options)
    assert shared.losses == pytest.approx(alone.losses, rel=1e-3)
    assert alone.losses[-1] < alone.losses[0]
    assert [value for _, value in shared.validations] == pytest.approx(
        [value for _, value in alone.validations], abs=0.02
    )
    weights = [load_recommender(result.folder)[0].state_dict() for result in (alone, shared)]
    for name, weight in weights[0].items():
        # Adam turns the sign of a gradient that is nearly zero into a step of the learning rate.
        np.testing.assert_allclose(weights[1][name].numpy(), weight.numpy(), atol=3 * TRAINER.lr)


def test_ranks_of_sharded_weights_validate_unequal_numbers_of_batches(tmp_path: Path) -> None:
    """The even ones of these users, 4,800 events, take two batches, and the odd ones, 400, take one."""
    prepared = task(tmp_path / "data", np.tile([60, 5], 80), max_length=60)
    found = []
    for workers, stage in ((1, 0), (2, 3)):
        config = TRAINER.model_copy(update={"workers": workers, "zero_stage": stage, "steps": 2, "average": 0.5})
        found.append(fit(prepared, config, f"run{workers}", tmp_path / f"out{workers}").validations)
    ((_, alone),), ((_, shared),) = found
    assert shared == pytest.approx(alone, abs=0.02)
