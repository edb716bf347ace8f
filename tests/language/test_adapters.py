"""Adapters: what takes gradients, what is saved, and beside whom it may be loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, AdapterConfig, LoraOptions, build_adapter, load_adapter, save_adapter
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import SoftPromptLm, collate, encode

CONFIGS = {
    "projector": AdapterConfig(projectors={"user": ProjectorConfig()}),
    "lora": AdapterConfig(projectors={"user": ProjectorConfig(kind="mlp")}, injection="add", lora=LoraOptions(rank=2)),
}


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(["the user chose Alien and Brazil"] * 9, [], [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), tokenizer)
    return str(folder)


def fresh(folder: str) -> Backbone:
    return load_backbone(folder, device="cpu")


def card(kind: str, **changes: str) -> AdapterCard:
    return AdapterCard(CONFIGS[kind], {"user": 6}, **{"lm": "lm-hash", "recommender": "sasrec/1234", **changes})


def batch_of(backbone: Backbone, model: SoftPromptLm) -> dict[str, torch.Tensor]:
    states = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
    text = Prompt.of("the user ", Vectors(states, "user"), " chose")
    prompt = encode(backbone, text, {"user": ProjectorConfig()}, {"user": 6})
    return collate([prompt], [backbone.tokenizer(" Brazil", add_special_tokens=False)["input_ids"]])


def trained(backbone: Backbone, model: SoftPromptLm) -> SoftPromptLm:
    torch.manual_seed(0)
    batch = batch_of(backbone, model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.005)
    for _ in range(6):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_moves_the_adapter_alone_and_a_checkpoint_brings_it_back(
    lm_folder: str, tmp_path: Path, kind: str
) -> None:
    before = {name: weight.clone() for name, weight in fresh(lm_folder).model.state_dict().items()}
    backbone = fresh(lm_folder)
    untrained = build_adapter(backbone, card(kind))
    start = {name: weight.detach().clone() for name, weight in untrained.named_parameters()}
    loss_before = untrained.eval()(batch_of(backbone, untrained)).item()
    model = trained(backbone, untrained.train())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, start[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {"lora_" in name for name in moved} == ({True, False} if kind == "lora" else {False})
    base = {name.replace(".base_layer", ""): weight for name, weight in backbone.model.state_dict().items()}
    assert all(torch.equal(base[name], weight) for name, weight in before.items())

    save_adapter(tmp_path / "adapter", card(kind), {n: w for n, w in model.named_parameters() if w.requires_grad})
    again = fresh(lm_folder)
    loaded = load_adapter(tmp_path / "adapter", again, "lm-hash", "sasrec/1234")
    loss = model(batch_of(backbone, model)).item()
    assert loss < loss_before
    assert loaded(batch_of(again, loaded)).item() == pytest.approx(loss, abs=1e-6)
    assert not loaded.training


def test_a_frozen_language_model_stays_in_eval_mode_while_its_adapter_trains(lm_folder: str) -> None:
    model = build_adapter(fresh(lm_folder), card("projector")).train()
    assert model.training
    assert not model.lm.training
    assert build_adapter(fresh(lm_folder), card("lora")).train().lm.training


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lm": "another"}, "beside the language model lm-hash, and this one is another"),
        ({"recommender": "sasrec/9"}, "beside the recommender sasrec/1234, and this one is sasrec/9"),
    ],
)
def test_an_adapter_beside_others_than_its_own_is_refused(
    lm_folder: str, tmp_path: Path, changes: dict[str, str], problem: str
) -> None:
    model = build_adapter(fresh(lm_folder), card("projector"))
    save_adapter(tmp_path, card("projector"), {n: w for n, w in model.named_parameters() if w.requires_grad})
    given = {"lm": "lm-hash", "recommender": "sasrec/1234", **changes}
    with pytest.raises(UsageError, match=problem):
        load_adapter(tmp_path, fresh(lm_folder), **given)


def test_a_folder_without_an_adapter_and_one_of_other_weights_are_told(lm_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no adapter"):
        load_adapter(tmp_path, fresh(lm_folder), "lm-hash", "sasrec/1234")
    save_adapter(tmp_path, card("projector"), {"projectors.user.layers.weight": torch.zeros(3, 3)})
    with pytest.raises(UsageError, match="another adapter's"):
        load_adapter(tmp_path, fresh(lm_folder), "lm-hash", "sasrec/1234")


def test_lora_on_matrices_the_model_has_not_says_which_it_has(lm_folder: str) -> None:
    config = AdapterConfig(projectors={"user": ProjectorConfig()}, lora=LoraOptions(targets=("c_attn",)))
    with pytest.raises(UsageError, match="c_attn") as told:
        build_adapter(fresh(lm_folder), AdapterCard(config, {"user": 6}, "", ""))
    assert "q_proj" in told.value.remedy
