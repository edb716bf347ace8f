"""A summary helps where the old past decides, and LLM-TRSR is validated as it ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.engines.engine import EngineConfig
from raypipe.language.adapters import AdapterCard
from raypipe.language.alignment import prepare_alignment
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.metrics.ranking import candidate_metrics
from raypipe.systems.trsr import Trsr
from raypipe.systems.trsr_past import PastSummaries
from raypipe.systems.trsr_training import RankingTask, prepare_validation
from tests.systems.ranker_world import (
    FULL,
    asked,
    learnt,
    past,
    save_lm,
    summaries,
    trsr,
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def backbone(lm: str) -> Backbone:
    return load_backbone(lm, device="cpu")


def trained(system: Trsr, lm: str, folder: Path, steps: int, answers: int = 0) -> RankingTask:
    """By plain torch on one thread: Ray and DeepSpeed have tests of their own."""
    card = AdapterCard(system.config.adapter, {}, checkpoint_hash(Path(lm)), "")
    examples = learnt(system, positions=1)
    tokenizer = system.tokenizer
    prepare_alignment(folder, examples, tokenizer, 0, 512, lm, card, 0)  # type: ignore[arg-type]
    task = RankingTask(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = task.build()
    optimizer = torch.optim.AdamW([weight for weight in module.parameters() if weight.requires_grad], lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = module(task.batch(step, 0, 0, 1, 32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()
    weights = {name: weight.detach() for name, weight in module.named_parameters() if task.keeps(name)}
    task.save(weights, folder / "adapter")
    return task


def test_a_summary_helps_where_old_history_carries_the_signal(lm: str, backbone: Backbone, tmp_path: Path) -> None:
    """The last two items, all that is shown beside it, are plain for everybody; what comes next is of the kind of the first."""
    rows = np.flatnonzero(past(summaries(7)).held_out)
    recall = {}
    for name, known in (("summary", summaries(7)), ("none", PastSummaries())):
        training = trsr(backbone, past(known), recent=2, negatives=3, **FULL)
        trained(training, lm, tmp_path / name, steps=500)
        engine = EngineConfig(lm=lm, adapter=str(tmp_path / name / "adapter"), device="cpu", threads=1).build()
        system = trsr(backbone, past(known, hold_out=1), recent=2, negatives=3, **FULL)
        sets = asked(system, rows)
        for control in (None, "shuffled summaries"):
            scores = np.concatenate([part.yes for part in system.scores(engine, rows, sets, control)])
            recall[name, control] = float(candidate_metrics(*sets.ranks(scores))["Recall@3"].mean())
    assert recall["summary", None] > 0.5
    assert recall["none", None] < 0.35
    assert recall["summary", "shuffled summaries"] < 0.5 * recall["summary", None]


def test_validation_is_the_sum_of_recalls_of_the_model_as_it_is_over_all_workers(
    lm: str, backbone: Backbone, tmp_path: Path
) -> None:
    system = trsr(backbone, past(summaries(7), hold_out=1), recent=2)
    rows = np.arange(10)
    sets = asked(system, rows)
    prompts = list(system.prompts(rows, 0, sets.items, system.summaries(rows, 0)))
    assert prepare_validation(tmp_path, prompts, sets.places, backbone, system.answers, 512) == 0
    task = trained(system, lm, tmp_path, steps=1)
    module = task.build()
    engine = EngineConfig(lm=lm, device="cpu", threads=1).build()
    scores = np.concatenate([part.yes for part in system.scores(engine, rows, sets)])
    figures = candidate_metrics(*sets.ranks(scores))
    total, count = np.sum([task.validate(module, rank, 3) for rank in range(3)], axis=0)
    assert count == 10
    assert total / count == pytest.approx(sum(figures[f"Recall@{k}"].mean() for k in (3, 5, 10)))
    assert "likes" in task.describe(0, 0, 8)


def test_answers_of_unequal_numbers_of_tokens_validate_as_they_are_ranked(
    lm: str, backbone: Backbone, tmp_path: Path
) -> None:
    system = trsr(backbone, past(summaries(7), hold_out=1), recent=2)
    answers = [system.answers[0], f"{system.answers[1]}{system.answers[0]}"]
    sets = asked(system, [0, 1])
    prompts = list(system.prompts(np.arange(2), 0, sets.items, system.summaries(np.arange(2), 0)))
    assert prepare_validation(tmp_path, prompts, sets.places, backbone, answers, 512) == 0
    task = trained(system, lm, tmp_path, steps=0)
    engine = EngineConfig(lm=lm, device="cpu", threads=1).build()
    flat = [prompt for mine in prompts for prompt in mine]
    logprobs = np.array([one.logprobs for one in engine.score(flat, [answers] * len(flat))])
    ranks = sets.ranks((logprobs[:, 0] - logprobs[:, 1]).reshape(sets.items.shape))
    wanted = sum(candidate_metrics(*ranks)[f"Recall@{k}"].sum() for k in (3, 5, 10))
    assert task.validate(task.build(), 0, 1) == (pytest.approx(wanted), 2)


def test_who_does_not_fit_the_context_does_not_validate(lm: str, backbone: Backbone, tmp_path: Path) -> None:
    known = PastSummaries({row: [(7, "dark " * (600 if row % 2 else 1))] for row in range(4)})
    system = trsr(backbone, past(known, hold_out=1), recent=2)
    rows = np.arange(4)
    sets = asked(system, [0, 1, 2, 3])
    prompts = list(system.prompts(rows, 0, sets.items, system.summaries(rows, 0)))
    assert prepare_validation(tmp_path, prompts, sets.places, backbone, system.answers, backbone.context) == 2
    told = np.load(tmp_path / "validation.npz")
    assert told["places"].tolist() == sets.places[::2].tolist()
    lengths = np.diff(told["ends"], prepend=0)
    assert (len(lengths), lengths.max() < backbone.context) == (2 * 21, True)
    task = trained(system, lm, tmp_path, steps=0)
    total, count = task.validate(task.build(), 0, 1)
    assert (count, 0 <= total <= 6) == (2, True)
    with pytest.raises(ValueError, match="Of 2 users who validate nobody's prompts fit the context of 512 tokens"):
        prepare_validation(tmp_path, prompts[1::2], sets.places[1::2], backbone, system.answers, backbone.context)
