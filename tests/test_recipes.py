"""The training recipes under `jobs/train`: each is a valid configuration of the model it is named after."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from raypipe.cli.options import parse_config
from raypipe.pipeline.train import TrainConfig

FOLDER = Path(__file__).parents[1] / "jobs/train"
MODELS = ("sasrec", "gru4rec", "caser", "bert4rec", "dreamrec")
SETS = ("ml-100k", "ml-1m", "amazon-industrial")


def test_every_model_has_a_recipe_for_every_data_set() -> None:
    assert {f"{model}-{data}.yaml" for model, data in product(MODELS, SETS)} <= {p.name for p in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_it_is_run(path: Path) -> None:
    config = parse_config("train", TrainConfig, ["--config", str(path)])
    assert path.stem.startswith(config.recommender.model)
    assert f"--config jobs/train/{path.name}" in path.read_text().splitlines()[0]
    assert config.trainer.validate_every is not None
    assert config.trainer.weight_decay == 0
    assert config.hold_out == 2
