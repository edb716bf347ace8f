"""What RecExplainer's figures say of a real language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.systems.recexplainer import CONTROL, ExplainerConfig
from tests.systems.sources import HELD_OUT, LENGTHS, source_of

TITLES = 3


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    source = source_of()
    save_untrained(
        folder, BuiltinLmConfig(size="tiny", context=512), train_tokenizer([*source.titles, "Yes No"] * 5, [], [], 400)
    )
    return folder


def test_questions_that_cannot_be_asked_are_counted_by_task(lm: Path) -> None:
    source = source_of()
    config = ExplainerConfig(variant="B", titles=TITLES)
    engine = EngineConfig(lm=str(lm), device="cpu").build()
    plain = config.build().measured(source, engine, 100, 8)
    assert {plain[f"refused {task}"] for task in ("T1", "T2", "T3")} == {0}

    (held, *_) = HELD_OUT.nonzero()[0].tolist()
    last = source.items(held, int(LENGTHS[held]))[-1]
    long = [title if item != last else "endless " * 600 for item, title in enumerate(source.titles, 1)]
    shown = sum(last in source.items(row, int(LENGTHS[row]))[-TITLES:] for row in HELD_OUT.nonzero()[0].tolist())
    told = config.build().measured(replace(source, catalogue=replace(source.catalogue, titles=long)), engine, 100, 8)
    assert told["refused T1"] == shown > 0
    assert told["refused T2"] >= shown
    assert told["refused T3"] >= 2 * shown
    # Everybody is asked about once in the control too, as somebody else.
    assert told[f"{CONTROL}: refused T1"] == shown
