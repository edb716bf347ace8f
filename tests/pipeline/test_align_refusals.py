"""`align` without a training: what is refused before one, and stored adapters that are asked anew, about whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.pipeline import lancer
from raypipe.pipeline.held_out import are_held_out
from raypipe.pipeline.sequences import pinned_versions, read_histories
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.conftest import ready_beside
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.untrained import OF_LM, store_untrained_ranker, store_untrained_writer

RANKER = TrsrConfig.model_validate({"prompt": TERSE, "candidates": {"negatives": 4}})
WRITER = LancerConfig.model_validate({"beams": 2, "reasoning": False, "prompts": {"line": "{title}", "perturbed": ()}})


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, TERSE, " yes no NULL"] * 5, [*titles, "yes", "no"], [], 600)
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny", context=512), tokenizer)
    return tmp_path / "lm"


@pytest.fixture
def ready(tmp_path: Path, lm: Path) -> str:
    """Chains, an untrained recommender, and an untrained language model of the workspace's own."""
    return ready_beside(tmp_path, lm)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ("--system", "lancer", "--beside"),
            "beside says nothing to lancer: it is for recinterpreter and recexplainer and",
        ),
        (("--system", "guided", "--summaries", "recurrent"), "summaries says nothing to guided"),
        (("--replay", "talk.jsonl"), "replay says nothing to recinterpreter: it is for recexplainer"),
        (
            ("--system", "recexplainer", "--replay", "talk.jsonl", "--recexplainer.tasks", '["T1", "T6b"]'),
            "replay says nothing without T5: add it to recexplainer.tasks, or leave replay out",
        ),
        (
            ("--system", "recexplainer", "--summaries", "recurrent", "--recexplainer.tasks", '["T1"]'),
            "summaries says nothing without T6b",
        ),
        (
            ("--system", "recexplainer", "--recexplainer.variant", "B", "--recexplainer.tasks", '["T6"]'),
            "variant B shows the titles that T6 asks for",
        ),
        (
            ("--system", "trsr", "--adapter", "trsr", "--adapter_workspace", "other"),
            "adapter_workspace says nothing to trsr",
        ),
        (("--system", "lancer", "--adapter_workspace", "other"), "name it with adapter"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(raypipe: Run, given: tuple[str, ...], told: str) -> None:
    ended = raypipe("align", "--workspace", "nowhere", *given)
    assert (ended.code, ended.status) == (2, "failed")
    assert told in one_paragraph(ended.stderr)


def test_an_adapter_of_another_system_than_is_asked_for_is_refused(raypipe: Run, ready: str, lm: Path) -> None:
    store_untrained_ranker(ready, RANKER, lm)
    ended = raypipe("align", "--workspace", ready, "--adapter", "trsr", "--asked", "2")
    assert (ended.code, ended.status) == (2, "failed")
    assert "one of the system trsr, and one of" in one_paragraph(ended.stderr)
    assert Evaluations(Store(ready)).all() == []


def test_a_ranker_that_has_read_the_answers_is_not_asked_for_them(raypipe: Run, ready: str, lm: Path) -> None:
    store_untrained_ranker(ready, RANKER, lm, hold_out=1)
    words = ("align", "--workspace", ready, "--system", "trsr", "--adapter", "trsr", "--trsr.candidates.negatives", "4")
    asked = raypipe(*words, "--asked", "2")
    assert (asked.code, asked.metrics["asked"]) == (0, 2), asked.stderr
    store_untrained_ranker(ready, RANKER.model_copy(update={"recent": 2}), lm, hold_out=0)
    refused = raypipe(*words, "--asked", "2")
    assert refused.code == 2
    assert "may have read all but the last 0 events of every user, and 1" in one_paragraph(refused.stderr)
    assert len(Evaluations(Store(ready)).all()) == 1


@pytest.mark.parametrize(("of_lm", "of_adapter", "least"), [(0.0, 0.5, 0.0), (0.5, 0.3, 0.3), (0.3, 0.5, 0.3)])
def test_unseen_users_are_those_whom_no_training_has_seen(
    raypipe: Run,
    ready: str,
    lm: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_lm: float,
    of_adapter: float,
    least: float,
) -> None:
    told: list[lancer.EvaluationSet] = []
    measured = lancer.measured

    def watched(asked, *rest):
        told.append(asked)
        return measured(asked, *rest)

    monkeypatch.setattr(lancer, "measured", watched)
    own = Models(Store(ready)).add("lm", lm, "another", {**OF_LM, "held_out_share": of_lm})
    named = f"{own.name}/{own.hash}"
    store_untrained_writer(ready, WRITER, lm, hold_out=1, held_out_share=of_adapter, lm_model=named)
    words = ("--system", "lancer", "--adapter", "lancer", "--answer_tokens", "4")
    ended = raypipe("align", "--workspace", ready, *words)
    assert ended.code == 0, ended.stderr
    np.testing.assert_array_equal(told[0].unseen, held_out(ready, least))
    # The floors learn from everybody whom the model learnt from.
    assert len(told[0].held.training) == int((~held_out(ready, of_adapter)).sum())
    assert ("Recall@5 unseen users" in ended.metrics) == (least > 0)


def test_lines_that_answers_cannot_be_held_to_are_refused_before_training(
    raypipe: Run, ready: str, lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lancer, "prepare_lancer", lambda *_: pytest.fail("a training is prepared"))
    words = ("align", "--workspace", ready, "--system", "lancer", "--lancer.constrained", "--answer_tokens", "1")
    long = raypipe(*words)
    assert (long.code, "The longest text takes" in one_paragraph(long.stderr)) == (2, True)
    stored = store_untrained_writer(ready, WRITER, lm, hold_out=1)
    anew = raypipe(*words, "--adapter", f"lancer/{stored.hash}", "--lm", lm)
    assert (anew.code, "The longest text takes" in one_paragraph(anew.stderr)) == (2, True)
    alike = Catalogue(["b : c", "c"], [{"of": ["a"]}, {"of": ["a : b"]}])
    with pytest.raises(UsageError, match="'b : c' and 'c' are both written 'a : b : c'"):
        lancer.check_lines(LancerConfig(constrained=True), alike, lm, 64)
    lancer.check_lines(LancerConfig(), alike, lm, 64)


def held_out(uri: str, share: float) -> NDArray[np.bool_]:
    workspace = Workspace(uri)
    users, _ = read_histories(workspace, pinned_versions(workspace)["histories"])
    return are_held_out(users, share)
