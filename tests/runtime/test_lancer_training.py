"""LANCER trained under Ray Train and DeepSpeed: a killed worker changes no weight, and two workers train as one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from raypipe.language.adapters import AdapterCard
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prefixes import PREFIX
from raypipe.recommenders.windows import Histories
from raypipe.runtime.trainer import TrainerConfig, TrainingResult, fit
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.lancer_examples import LancerTrainingData, prepare_lancer
from raypipe.systems.lancer_training import LancerTask
from tests.runtime.dying import die_once

LINES = [f"Film {n}" for n in range(1, 9)]
CONFIG = TrainerConfig(
    steps=16,
    batch_size=8,
    lr=3e-3,
    warmup_steps=2,
    weight_decay=0,
    device="cpu",
    checkpoint_every=5,
    validate_every=0.25,
)


class Mortal(LancerTask):
    """A task whose worker is killed at step 8, the first time it gets there."""

    def __init__(self, folder: Path, deaths: Path) -> None:
        super().__init__(folder, "second", 100, 100)
        self.deaths = deaths

    def __reduce__(self):
        return type(self), (self.folder, self.deaths)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        if step == 8:
            die_once(self.deaths)
        return super().batch(step, seed, rank, world, batch_size)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lancer")
    lm = folder / "lm"
    save_untrained(lm, BuiltinLmConfig(size="tiny", context=96), train_tokenizer(LINES * 5, [], [], 300))
    backbone = load_backbone(str(lm), device="cpu")
    config = LancerConfig(reads=3, shown=2, learnt=2, virtual_tokens=3)
    card = AdapterCard(config.adapter, {PREFIX: 64}, "lm-hash", "")
    rng = np.random.default_rng(0)
    histories = Histories(rng.integers(1, 9, 12 * 9).astype(np.int32), np.arange(9, 12 * 9 + 1, 9))
    prepare_lancer(
        folder / "data", LancerTrainingData(LINES, LINES, histories, 1), backbone, str(lm), card, config, seed=0
    )
    return folder / "data"


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return fit(LancerTask(prepared, "second", 100, 100), CONFIG, "run", tmp_path_factory.mktemp("whole") / "out")


def weights(result: TrainingResult) -> dict[str, Tensor]:
    return load_file(result.folder / "adapter.safetensors")


def test_a_killed_worker_changes_no_weight(prepared: Path, undisturbed: TrainingResult, tmp_path: Path) -> None:
    killed = fit(Mortal(prepared, tmp_path), CONFIG, "run", tmp_path / "out")
    assert (tmp_path / "died").exists()
    assert killed.losses == undisturbed.losses
    assert killed.validations == undisturbed.validations
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(killed).items())
    assert any(name.startswith("prefix.knowledge") for name in weights(killed))


def test_two_workers_with_shards_train_the_same_weights_whole(
    prepared: Path, undisturbed: TrainingResult, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"workers": 2, "zero_stage": 3})
    sharded = fit(LancerTask(prepared, "second", 100, 100), config, "run", tmp_path / "out")
    np.testing.assert_allclose(sharded.losses, undisturbed.losses, rtol=0.02, atol=2e-3)
    for name, weight in weights(sharded).items():
        torch.testing.assert_close(weight, weights(undisturbed)[name], rtol=0.1, atol=0.02)
