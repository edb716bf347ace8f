"""What is read from states, their tokens and the language model's states: each vector belongs to its row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.engines.engine import EngineConfig
from raypipe.language.adapters import AdapterCard, build_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prompt import Prompt, Vectors
from raypipe.systems.oracles import SOURCE
from raypipe.systems.probes import LabelledVectors
from raypipe.systems.projection import AdaptedLm, probed
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.source import Source
from tests.systems.sources import source_of


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(["Film 1; Film 2 and what somebody chose"] * 9, [], [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=256), tokenizer)
    return folder


def adapted(folder: Path, config: InterpreterConfig | ExplainerConfig) -> AdaptedLm:
    adapter = config.build().adapter
    backbone = load_backbone(str(folder), device="cpu")
    card = AdapterCard(adapter, dict.fromkeys(adapter.projectors, 8), "", "")
    return AdaptedLm(backbone, build_adapter(backbone, card).eval(), card)


def test_every_row_has_its_own_vector_whatever_it_is_read_beside(lm_folder: Path) -> None:
    lm = adapted(lm_folder, InterpreterConfig())
    states = np.random.default_rng(0).normal(size=(70, 8)).astype(np.float32)
    vectors = [Vectors(state[None], SOURCE) for state in states]
    prompts = [Prompt.of("Film " * (at % 7), mine, " chose") for at, mine in enumerate(vectors)]
    together = lm.hidden_states(prompts)
    alone = np.concatenate([lm.hidden_states([prompt]) for prompt in prompts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    layer = lm.model.projectors[SOURCE].layers
    with torch.no_grad():
        np.testing.assert_allclose(lm.tokens(vectors), layer(torch.from_numpy(states)).numpy(), atol=1e-5)


def test_a_probe_finds_what_is_there_and_its_control_does_not() -> None:
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(21, 16)).astype(np.float32)

    def rows(count: int) -> LabelledVectors:
        items = rng.integers(1, 21, count)
        return LabelledVectors(codes[items], items[:, None].tolist(), np.arange(count))

    found = probed({"states": rows(400)}, {"states": rows(200)}, 20, {"recovered": "residual"})
    assert found["probe of states: residual"] > 0.95
    assert found["probe of states: shuffled states: residual"] < 0.15


@pytest.mark.parametrize(
    ("config", "kinds", "figure"),
    [
        (InterpreterConfig(titles=3), {"states", "tokens", "hidden states"}, "recovery"),
        (ExplainerConfig(variant="I", titles=3), {"states", "tokens", "hidden states"}, "T1 HR@5"),
        (ExplainerConfig(variant="B", titles=3), {"states", "hidden states"}, "T1 HR@5"),
    ],
)
def test_systems_probe_every_stage_on_the_way_into_words(
    lm_folder: Path, config: InterpreterConfig | ExplainerConfig, kinds: set[str], figure: str
) -> None:
    source: Source = source_of()
    bare = EngineConfig(lm=str(lm_folder), device="cpu").build()
    found = config.build().beside(source, adapted(lm_folder, config), bare, 100, 4, 100, 8)
    names = {f"probe of {kind}: {control}{figure}" for kind in kinds for control in ("", "shuffled states: ")}
    assert names <= set(found)
    assert all(0 <= value <= 1 for value in found.values())
    if isinstance(config, ExplainerConfig):
        assert {model.split(": ")[0] for model in found} >= {"linear surrogate", "tree surrogate", "student"}
        assert found["in-context LM: T1 HR@5"] == found["in-context LM: T1 HR@5 unseen"] == 0
        for kind in kinds:
            assert found[f"probe of {kind}: T1 HR@5 unseen"] >= found[f"probe of {kind}: T1 HR@5"]
