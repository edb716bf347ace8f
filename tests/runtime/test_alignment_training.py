"""An adapter trained under Ray Train and DeepSpeed: the language model stays, and sharding changes no result."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raypipe.language.adapters import AdapterCard, AdapterConfig, LoraOptions, load_adapter
from raypipe.language.alignment import AlignmentTask, prepare_alignment
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import SoftExample, collate, encode
from raypipe.runtime.trainer import TrainerConfig, TrainingResult, fit
from tests.runtime.dying import die_once

pytestmark = pytest.mark.usefixtures("ray_cluster")
WORDS = ("Alien", "Brazil", "Casablanca", "Dune Dune Dune")
CARD = AdapterCard(
    AdapterConfig(
        projectors={"user": ProjectorConfig(pool="learned_positions", positions=3)},
        injection="add",
        lora=LoraOptions(rank=2, dropout=0.0),
    ),
    {"user": 4},
    "lm-hash",
    "sasrec/1",
)
CONFIG = TrainerConfig(
    steps=60, batch_size=8, lr=6e-3, warmup_steps=2, weight_decay=0, device="cpu", checkpoint_every=25
)


OTHERS = "others.safetensors"


class Told(AlignmentTask):
    """A task that stores beside the adapter what the trained module holds in all its other weights when the training ends."""

    def keeps(self, name: str) -> bool:
        return True

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        super().save({name: weight for name, weight in weights.items() if super(Told, self).keeps(name)}, folder)
        others = {name: weight for name, weight in weights.items() if not super(Told, self).keeps(name)}
        save_file(others, folder / OTHERS)


class Mortal(Told):
    """A task whose worker is killed at step 30, the first time it gets there."""

    def __init__(self, folder: Path, deaths: Path) -> None:
        super().__init__(folder)
        self.deaths = deaths

    def __reduce__(self):
        return type(self), (self.folder, self.deaths)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        if step == 30:
            die_once(self.deaths)
        return super().batch(step, seed, rank, world, batch_size)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def example(place: int) -> SoftExample:
    """The state says which film it is."""
    state = np.eye(4, dtype=np.float32)[place % 4][None].repeat(1 + place % 3, 0)
    return SoftExample(Prompt.of("the user ", Vectors(state, "user"), " chose"), WORDS[place % 4])


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer([f"the user chose {word}" for word in WORDS] * 9, [], [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=64), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def prepared(lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alignment")
    backbone = load_backbone(lm, device="cpu")
    examples = [example(place) for place in range(64)]
    counts = prepare_alignment(folder, examples, backbone, backbone.ends[0], 64, lm, CARD, seed=0)
    assert (counts["examples"], counts["left_out"]) == (64, 0)
    return folder


def train(prepared: Path, out: Path, **changes: object) -> TrainingResult:
    return fit(Told(prepared), CONFIG.model_copy(update=changes), "alignment", out / "adapter")


@pytest.fixture(scope="module")
def single(prepared: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(prepared, tmp_path_factory.mktemp("single"))


def test_a_whitened_projector_starts_from_the_vectors_of_training_and_is_stored(lm: str, tmp_path: Path) -> None:
    """Of a source of which training holds no vector there is nothing to start from."""
    config = AdapterConfig(projectors=dict.fromkeys(("user", "item"), ProjectorConfig(whitened=True)))
    card = AdapterCard(config, {"user": 4, "item": 3}, "lm-hash", "sasrec/1")
    backbone = load_backbone(lm, device="cpu")
    vectors = np.random.default_rng(0).normal(3, (9, 1, 1, 0.1), (50, 4)).astype(np.float32)
    examples = [SoftExample(Prompt.of("the user ", Vectors(one[None], "user")), "Alien") for one in vectors]
    prepare_alignment(tmp_path / "data", examples, backbone, backbone.ends[0], 64, lm, card, seed=0)
    task = AlignmentTask(tmp_path / "data")
    model = task.build()
    entered = model.projectors["user"].enter(torch.from_numpy(vectors)).detach().numpy()
    np.testing.assert_allclose(np.cov(entered.T, bias=True), np.eye(4), atol=0.01)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if task.keeps(name)}
    task.save(weights, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", load_backbone(lm, device="cpu"), "lm-hash", "sasrec/1")
    found = again.projectors["user"].enter(torch.from_numpy(vectors)).detach().numpy()
    np.testing.assert_array_equal(found, entered)


def check_what_moved(result: TrainingResult, prepared: Path, lm: str) -> None:
    """Of the module that DeepSpeed trained all that was declared has moved, and nothing else by a bit."""
    task = AlignmentTask(prepared)
    before = dict(task.build().named_parameters())
    moved, others = (load_file(result.folder / name) for name in ("adapter.safetensors", OTHERS))
    assert {name for name in moved if "lora_" not in name} == {name for name in before if not name.startswith("lm.")}
    assert {name for name in before if task.keeps(name)} == set(moved)
    assert not [name for name, weight in moved.items() if torch.equal(weight, before[name])]
    assert [name for name, weight in others.items() if name in before and not torch.equal(weight, before[name])] == []
    # All of the language model, as it lies on disk.
    stored = dict(load_backbone(lm, device="cpu").model.named_parameters())
    found = {name.removeprefix("lm.").replace(".base_layer", ""): weight for name, weight in others.items()}
    assert stored.keys() <= found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in stored.items())


def test_an_adapter_learns_to_name_what_a_state_holds_and_changes_no_other_weight(
    single: TrainingResult, prepared: Path, lm: str
) -> None:
    assert np.mean(single.losses[-4:]) < 0.3 * single.losses[0]
    check_what_moved(single, prepared, lm)
    backbone = load_backbone(lm, device="cpu")
    model = load_adapter(single.folder, backbone, "lm-hash", "sasrec/1")
    for place, word in enumerate(WORDS):
        prompt = encode(backbone, example(place).prompt, CARD.config.projectors, CARD.widths)
        batch = collate([prompt])
        logits = backbone.model(inputs_embeds=model.embed(batch), attention_mask=batch["mask"]).logits[0, -1]
        assert logits.argmax() == backbone.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]


def test_a_killed_worker_changes_no_loss_and_no_weight(single: TrainingResult, prepared: Path, tmp_path: Path) -> None:
    killed = fit(Mortal(prepared, tmp_path), CONFIG, "alignment", tmp_path / "adapter")
    assert (tmp_path / "died").exists()
    assert killed.losses == single.losses
    mine, theirs = (load_file(result.folder / "adapter.safetensors") for result in (killed, single))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_with_shards_train_the_same_adapter_whole(
    single: TrainingResult, prepared: Path, lm: str, tmp_path: Path, stage: int
) -> None:
    sharded = train(prepared, tmp_path, workers=2, zero_stage=stage)
    check_what_moved(sharded, prepared, lm)
    np.testing.assert_allclose(sharded.losses, single.losses, rtol=0.02, atol=2e-3)
    mine, theirs = (load_file(result.folder / "adapter.safetensors") for result in (sharded, single))
    assert {name: weight.shape for name, weight in mine.items()} == {
        name: weight.shape for name, weight in theirs.items()
    }
    for name, weight in mine.items():
        np.testing.assert_allclose(weight, theirs[name], rtol=0.1, atol=0.02)
