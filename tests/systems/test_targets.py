"""Every recommender is read by the systems that put vectors into words, in eval mode, and left as it was."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.language.prompt import Vectors
from raypipe.recommenders.recommender import weights_hash
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from tests.systems.sources import source_of


class Silent:
    """An engine that answers nothing."""

    def generate(self, prompts, decoding, choices=None):
        return iter(())

    def score(self, prompts, continuations):
        return iter(())


@pytest.mark.parametrize("model", ["gru4rec", "caser", "sasrec", "bert4rec", "dreamrec", "mf"])
@pytest.mark.parametrize("config", [InterpreterConfig(after="item", titles=3), ExplainerConfig(variant="H", titles=3)])
def test_every_recommender_is_read_and_left_as_it_was(model: str, config: InterpreterConfig | ExplainerConfig) -> None:
    source = source_of(model)
    before = weights_hash(source.recommender)
    system = config.build()
    examples = list(system.examples(source, 100, 100, np.random.default_rng(0)))
    shown = [piece for example in examples for piece in example.prompt.segments if isinstance(piece, Vectors)]
    assert shown
    assert all(np.isfinite(piece.values).all() for piece in shown)
    assert system.measured(source, Silent(), 100, 8)["asked"] > 1
    assert not source.recommender.training
    assert not any(parameter.requires_grad for parameter in source.recommender.parameters())
    assert weights_hash(source.recommender) == before
