"""Which of a workspace's own language models writes the summaries."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.storage.models import Model, Models
from raypipe.storage.releases import Releases
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph


def stored(uri: str, folder: Path, seed: int) -> Model:
    """An untrained one; the last that is stored is the newest."""
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=256), train_tokenizer(["a b c"], [], [], 300), seed)
    return Models(Workspace(uri).store).add("lm", folder, f"recipe {seed}", {"hold_out": 1, "held_out_share": 0.2})


@pytest.mark.usefixtures("ray_cluster")
def test_a_language_model_that_is_not_the_newest_writes_where_it_is_named(
    raypipe: Run, ingested: str, tmp_path: Path
) -> None:
    older, newer = (stored(ingested, tmp_path / f"lm{seed}", seed) for seed in (1, 2))
    workspace = Workspace(ingested)

    def recipe(named: str) -> str:
        config = SummarizeConfig.model_validate({"workspace": ingested, "engine": {"lm": named}})
        return config.recipes(workspace, config.resolve_model(workspace)).block

    assert recipe("builtin") == recipe(f"builtin/{newer.hash}") != recipe(f"builtin/{older.hash}")
    words = (
        "summarize",
        "--workspace",
        ingested,
        "--max_reject_rate",
        1,
        "--summaries.block_decoding.max_new_tokens",
        8,
    )
    written = raypipe(*words, "--engine.lm", f"builtin/{older.hash}")
    assert written.code == 0, written.stderr
    (run,) = workspace.ledger("summarize").finished()
    assert run.manifest["facts"]["model"] == older.hash
    assert run.manifest["facts"]["model_hold_out"] == 1
    assert run.manifest["facts"]["model_held_out_share"] == 0.2
    refused = raypipe(*words, "--engine.lm", "builtin/none")
    assert refused.code == 2
    assert "has no language model none of its own yet" in one_paragraph(refused.stderr)

    # A night writes by it too, and its release holds it.
    night = ("nightly", "--workspace", ingested, "--date", "2026-01-06", "--summarize.max_reject_rate", 1)
    options = ("--summarize.summaries.block_decoding.max_new_tokens", 8, "--summarize.engine.lm")
    refused = raypipe(*night, *options, "builtin/none")
    assert refused.code == 2
    assert "name another with --summarize.engine.lm" in one_paragraph(refused.stderr)
    ended = raypipe(*night, *options, f"builtin/{older.hash}")
    assert ended.code == 0, ended.stderr
    champion = Releases(workspace.store).named("champion")
    assert champion is not None
    assert champion.lm == older.hash
