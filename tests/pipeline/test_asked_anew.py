"""Stored adapters that are asked anew, without a training before it: who may be asked, about whom, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import make_ready
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.untrained import store_untrained_ranker

RANKER = TrsrConfig.model_validate({"prompt": TERSE, "candidates": {"negatives": 4}})


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, TERSE, " yes no NULL"] * 5, [*titles, "yes", "no"], [], 600)
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny", context=512), tokenizer)
    return tmp_path / "lm"


@pytest.fixture
def ready(tmp_path: Path, lm: Path) -> str:
    """Chains, an untrained recommender, and an untrained language model of the workspace's own."""
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    Models(Store(uri)).add("lm", lm, "untrained", {"hold_out": 1})
    return uri


def test_an_adapter_of_another_system_than_is_asked_for_is_refused(raypipe: Run, ready: str, lm: Path) -> None:
    store_untrained_ranker(ready, RANKER, lm)
    ended = raypipe("align", "--workspace", ready, "--adapter", "trsr", "--asked", "2")
    assert (ended.code, ended.status) == (2, "failed")
    assert "Add --system trsr" in one_paragraph(ended.stderr)
    assert Evaluations(Store(ready)).all() == []
