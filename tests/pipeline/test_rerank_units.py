"""What a worker of `rerank` does once, and what for every bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline.rerank_units import RerankBucket, RerankTask
from raypipe.pipeline.user_rows import UserRows
from raypipe.runtime.budget import Budget, Limits
from raypipe.storage.ledger import Usage
from raypipe.storage.workspace import Workspace
from raypipe.systems.trsr import TrsrConfig
from tests.made import make_ready
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.untrained import store_untrained_ranker


def test_the_catalogue_is_counted_in_tokens_once_for_all_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, lm = str(tmp_path / "workspace"), tmp_path / "lm"
    make_ready(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, TERSE, " yes no NULL"] * 5, [*titles, "yes", "no"], [], 600)
    save_untrained(lm, BuiltinLmConfig(size="tiny", context=512), tokenizer)
    workspace, options = Workspace(uri), TrsrConfig(prompt=TERSE)
    versions = {name: table.version() for name, table in workspace.tables.items()}
    task = RerankTask(
        workspace,
        scope="all",
        variant="rerank-sasrec",
        recipe="recipe",
        versions=versions,
        lists="recommend-sasrec",
        lists_version=versions["recommendations"],
        summaries="summarize-hierarchical",
        ranker=store_untrained_ranker(uri, options, lm),
        lm=None,
        engine=EngineConfig(lm=str(lm), device="cpu"),
        options=options,
        users=None,
        micro_batch=8,
        model_cache=tmp_path / "cache",
    )
    counted: list[Sequence[str]] = []
    count_tokens = PromptTokenizer.count_tokens

    def watched(self: PromptTokenizer, texts: Sequence[str]) -> list[int]:
        counted.append(texts)
        return count_tokens(self, texts)

    monkeypatch.setattr(PromptTokenizer, "count_tokens", watched)
    worker = RerankBucket(task, Budget(Limits(), Usage()))
    prompts = []
    for bucket in (0, 1):
        state = UserRows(workspace, bucket, "recommendations", task.variant, task.recipe, versions["histories"], -1)
        work = worker._rows(state)
        trsr = worker._ranker(state, work)
        rows = work["place"].to_numpy()
        ((prompt, *_), *_) = trsr.prompts(
            rows, 0, np.array(work["items"].to_pylist(), np.int32), trsr.summaries(rows, 0)
        )
        prompts.append(prompt.text)
        assert f"likes {work['user_id'][0].as_py()} likes what comes next." in prompt.text
    assert len([texts for texts in counted if len(texts) == CHAIN_ITEMS]) == 1
    assert prompts[0] != prompts[1]
