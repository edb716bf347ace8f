"""`align --system trsr` from a log to ranks of stored candidates, beside what ranks the same ones without a language model."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypipe.language.alignment import prepare_alignment
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.metrics.ranking import candidate_metrics
from raypipe.pipeline import trsr
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import make_ready
from tests.pipeline.ranked_logs import ALIGN_TRSR, LAST, RANKED_USERS, TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS, newest
from tests.untrained import store_untrained_ranker


@pytest.mark.usefixtures("ray_cluster")
def test_everybody_s_candidates_are_ranked_by_all_and_models_are_compared_user_by_user(
    raypipe: Run, ranked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[str] = []

    def watched(folder, examples, *rest):
        some = list(examples)
        learnt.extend(example.prompt.text for example in some)
        return prepare_alignment(folder, some, *rest)

    monkeypatch.setattr(trsr, "prepare_alignment", watched)
    words = ("align", "--workspace", ranked, *ALIGN_TRSR)
    plain = raypipe(*words, "--beside", "--trsr.facts")
    assert (plain.code, plain.status) == (0, "ok"), plain.stderr
    models = Models(Store(ranked))
    (ranker,) = models.all("trsr")
    assert ranker.lineage["lm_model"] == f"lm/{models.all('lm')[0].hash}"
    metrics = plain.metrics
    # All who have two events before the last one, whoever is held out from training among them.
    assert (metrics["asked"], metrics["refused"]) == (RANKED_USERS, 0)
    rankers = ("", "popularity: ", "transitions: ", "sasrec: ", "boosted trees: ", "boosted trees on facts: ")
    for name in rankers:
        assert 0 <= metrics[f"{name}MRR@3"] <= metrics[f"{name}Recall@3"] <= metrics[f"{name}Recall@10"] <= 1
        assert metrics[f"{name}seconds"] >= 0
    # Everybody has seven events before the last.
    assert metrics["Recall@3 after 5 to 9 events"] == metrics["Recall@3"]
    assert not any("after 2 to 4" in name for name in metrics)
    # Nobody chose it before the cut: what counts alone puts it last.
    assert metrics["popularity: Recall@3"] == 0
    assert metrics["tokens_asked"] > RANKED_USERS * 21
    # Everybody is asked about 21 candidates once, after the last five of seven items.
    assert metrics["calls"] == plain.result["cost"]["calls"] == RANKED_USERS * 21
    assert plain.result["cost"]["tokens_in"] == metrics["tokens_asked"]
    assert (metrics["items_shown"], metrics["items_cut"]) == (5, 0)
    (sasrec,) = models.all("sasrec")
    assert metrics["sasrec: train_seconds"] == sasrec.lineage["training"]["seconds"] > 0
    # What is held out, which has a title of its own, is in no training text but as a candidate that was not chosen.
    assert len(learnt) == metrics["examples"]
    assert not any(LAST in text.split(" next ")[0] for text in learnt)
    (path,) = Path(ranked).glob("candidates/*.parquet")
    stored = pq.read_table(path)
    assert stored.num_rows == RANKED_USERS
    assert {len(items) for items in stored["items"].to_pylist()} == {21}
    chosen = [
        items[place] for items, place in zip(stored["items"].to_pylist(), stored["place"].to_pylist(), strict=True)
    ]
    indices = {row["title"]: row["index"] for row in newest(ranked, "items").to_pylist()}
    assert set(chosen) == {indices[LAST]}

    told = raypipe(*words, "--beside", "--trsr.facts")
    assert (told.status, told.result["models"]) == ("nothing_to_do", plain.result["models"])
    assert told.result["cost"]["calls"] == 0

    named = f"trsr/{plain.result['models']['trsr']}"
    shown = raypipe(*words, "--trsr.facts", "--summaries", "recurrent", "--trsr.against", named)
    assert (shown.code, shown.status) == (0, "ok"), shown.stderr
    assert shown.metrics["summary_calls"] > 0
    told = {one.settings["summaries"]: one.settings for one in Evaluations(Store(ranked)).all()}
    assert set(told) == {None, "recurrent"}
    assert {one["recommender"].partition("/")[0] for one in told.values()} == {"sasrec"}
    assert {"no summaries: Recall@3", "shuffled summaries: Recall@3"} <= set(shown.metrics)
    assert shown.metrics["popularity: MRR@3"] == metrics["popularity: MRR@3"]
    apart = f"above {named.removeprefix('trsr/')[:12]}: Recall@3"
    assert shown.metrics[apart] == pytest.approx(shown.metrics["Recall@3"] - metrics["Recall@3"], abs=1e-3)
    assert shown.metrics[f"{apart} low"] <= shown.metrics[apart] <= shown.metrics[f"{apart} high"]

    # What it is asked with, and without, is of one model: the ranks of both are stored.
    stored = models.users(models.newest("trsr", shown.result["run_key"]))
    for control, name in (("no summaries", "without summaries"), ("shuffled summaries", "with shuffled summaries")):
        figures = [candidate_metrics(stored[f"above/{of}"], stored[f"same/{of}"]) for of in ("", control)]
        gains = figures[0]["Recall@3"] - figures[1]["Recall@3"]
        itself = f"above its own {name}: Recall@3"
        assert shown.metrics[itself] == pytest.approx(gains.mean(), abs=1e-4)
        assert shown.metrics[f"{itself} low"] <= shown.metrics[itself] <= shown.metrics[f"{itself} high"]
        assert shown.metrics[f"{control}: calls"] == RANKED_USERS * 21
    assert not any(name.startswith("above its own") for name in metrics)
    assert shown.result["cost"]["calls"] == 3 * RANKED_USERS * 21
    assert shown.metrics["no summaries: tokens_asked"] < shown.metrics["tokens_asked"]
    told = {one.name: one for one in Evaluations(Store(ranked)).all() if one.settings["summaries"]}
    assert "above its own without summaries: Recall@3" in told["trsr"].figures["trsr"]

    # A stored one is asked again with less to go by.
    again = raypipe(*words, "--adapter", named)
    assert again.metrics["MRR@3"] == metrics["MRR@3"]
    # It is shown the summaries that it was made with, unless it is told to go without.
    knowing = f"trsr/{shown.result['models']['trsr']}"
    same = raypipe(*words, "--adapter", knowing)
    assert same.metrics["MRR@3"] == shown.metrics["MRR@3"]
    without = raypipe(*words, "--adapter", knowing, "--summaries", "null")
    assert without.code == 0, without.stderr
    assert without.metrics["tokens_asked"] < same.metrics["tokens_asked"]
    bare = raypipe(*words, "--adapter", named, "--trsr.recent", 0, "--trsr.against", knowing)
    apart = f"above {knowing.removeprefix('trsr/')[:12]}: MRR@3"
    assert bare.metrics[apart] == pytest.approx(bare.metrics["MRR@3"] - shown.metrics["MRR@3"], abs=1e-3)
    assert bare.metrics[f"{apart} low"] <= bare.metrics[apart] <= bare.metrics[f"{apart} high"]
    itself = raypipe(*words, "--adapter", named, "--trsr.against", named)
    assert {itself.metrics[name] for name in itself.metrics if name.startswith("above ")} == {0}
    assert bare.metrics["tokens_asked"] < 0.9 * again.metrics["tokens_asked"]
    assert bare.result["cost"]["tokens_in"] == bare.metrics["tokens_asked"]
    assert (bare.metrics["items_shown"], again.metrics["items_shown"]) == (0, 5)

    for options in ((), ("--adapter", named)):
        anew = raypipe(*words, *options, "--trsr.candidates.seed", 1, "--trsr.against", named)
        assert anew.code == 2
        assert "ranked other candidates" in one_paragraph(anew.stderr)


@pytest.mark.usefixtures("ray_cluster")
def test_the_epoch_that_ranks_best_is_kept(raypipe: Run, ranked: str) -> None:
    words = ("align", "--workspace", ranked, *ALIGN_TRSR, "--trainer.steps", 8, "--trainer.validate_every", 1)
    ended = raypipe(*words)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert 0 <= ended.metrics["validation_recalls"] <= 3


def test_prompts_that_do_not_hold_the_history_are_told(raypipe: Run, tmp_path: Path) -> None:
    uri, lm = str(tmp_path / "workspace"), tmp_path / "lm"
    make_ready(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    save_untrained(
        lm, BuiltinLmConfig(size="tiny", context=128), train_tokenizer([*titles, TERSE] * 5, titles, [], 500)
    )
    store_untrained_ranker(uri, TrsrConfig(prompt=TERSE), lm, hold_out=1)
    words = ("align", "--workspace", uri, "--lm", lm, "--system", "trsr", "--adapter", "trsr", "--asked", 20)
    few = raypipe(*words, "--trsr.recent", 1)
    assert few.code == 0, few.stderr
    assert (few.metrics["items_shown"], few.metrics["items_cut"]) == (1, 0)
    assert "do not fit" not in few.stderr
    none = raypipe(*words, "--trsr.history_missing", 1)
    assert (none.metrics["items_shown"], none.metrics["items_cut"]) == (0, 0)
    assert none.metrics["popularity: MRR@3"] == few.metrics["popularity: MRR@3"]
    many = raypipe(*words, "--trsr.recent", "null", "--trsr.history", 100)
    assert many.code == 0, many.stderr
    assert 1 < many.metrics["items_shown"] < 128 / 4
    assert many.metrics["items_cut"] > 0
    assert many.stderr.count("of the prompts do not fit the context of 128 tokens") == 1
    assert f"{many.metrics['items_cut']:.1%} of the prompts" in many.stderr
    assert f"to {many.metrics['items_shown']:.1f} items on average" in many.stderr


def test_who_validates_nothing_is_told(raypipe: Run, tmp_path: Path) -> None:
    """The one user who is asked is held out from training."""
    uri, lm = str(tmp_path / "workspace"), tmp_path / "lm"
    make_ready(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    save_untrained(lm, BuiltinLmConfig(size="tiny"), train_tokenizer([*titles, TERSE, " yes no"] * 5, titles, [], 500))
    words = ("align", "--workspace", uri, "--lm", lm, *ALIGN_TRSR, "--trainer.validate_every", 1)
    ended = raypipe(*words, "--asked", 1, "--held_out_share", 0.9)
    assert ended.code == 2
    assert "Of the 1 users who are asked nobody can validate" in one_paragraph(ended.stderr)


@pytest.mark.usefixtures("ray_cluster")
def test_what_has_read_the_answers_or_cannot_be_asked_is_refused(raypipe: Run, ranked: str) -> None:
    cases = {
        ("--hold_out", "0"): "none is left to ask for",
        ("--hold_out", "2"): "may have read all but the last 1 events",
        ("--summaries", "hierarchical"): "no hierarchical summaries without the last 1 events",
        ("--summaries", "recurrent", "--trsr.block_items", "3"): "are of blocks of 5 items and not of 3",
        ("--trsr.candidates.negatives", "58"): "leaves 58 items unseen",
        ("--adapter", "sasrec"): "is no adapter, and one of trsr is asked for",
        ("--trsr.against", "trsr/0"): "No model trsr/0 is stored",
    }
    for options, problem in cases.items():
        ended = raypipe("align", "--workspace", ranked, *ALIGN_TRSR, *options)
        assert ended.code == 2, options
        assert problem in one_paragraph(ended.stderr)


@pytest.mark.usefixtures("ray_cluster")
def test_how_much_is_learnt_without_the_summary_that_is_asked_with_is_told(raypipe: Run, ranked: str) -> None:
    """Everybody has seven events before the last, and a block has five: after two of the five learnt places there is one."""
    words = ("align", "--workspace", ranked, *ALIGN_TRSR, "--positions", 5, "--trainer.steps", 2)
    few = raypipe(*words, "--summaries", "recurrent")
    assert few.code == 0, few.stderr
    assert few.metrics["learnt_without_summary"] == pytest.approx(3 / 5, abs=0.02)
    assert "60% of what is learnt has no summary of what came before it" in few.stderr
    for paradigm, cut in (("recurrent", 4), ("hierarchical", 1)):
        kind = ("--summaries.paradigm", paradigm, "--summaries.hold_out", cut)
        assert raypipe("summarize", "--workspace", ranked, "--engine.engine", "echo", *kind).code == 0
    more = raypipe(*words, "--summaries", "recurrent")
    assert more.metrics["learnt_without_summary"] == pytest.approx(2 / 5, abs=0.02)
    refused = raypipe(*words, "--summaries", "hierarchical")
    assert (refused.code, refused.status) == (2, "failed")
    assert "no hierarchical summaries without the last 2 events" in one_paragraph(refused.stderr)


@pytest.mark.usefixtures("ray_cluster")
def test_hierarchical_summaries_are_needed_of_what_is_learnt_in_training_and_of_what_is_asked_after_it(
    raypipe: Run, ranked: str
) -> None:
    """Summaries of other blocks without the last 4 events are not needed for two places, and do not stand in the way."""
    kind = ("summarize", "--workspace", ranked, "--engine.engine", "echo", "--summaries.paradigm", "hierarchical")
    for cut, block in ((1, 2), (2, 2), (3, 2), (4, 3)):
        written = raypipe(*kind, "--summaries.hold_out", cut, "--summaries.block_items", block)
        assert written.code == 0, written.stderr
    words = ("align", "--workspace", ranked, *ALIGN_TRSR, "--trsr.block_items", 2)
    made = raypipe(*words, "--summaries", "hierarchical")
    assert (made.code, made.status) == (0, "ok"), made.stderr
    assert made.metrics["learnt_without_summary"] == 0
    assert {"no summaries: Recall@3", "above its own without summaries: Recall@3"} <= set(made.metrics)
    needed = raypipe(*words, "--summaries", "hierarchical", "--positions", 3)
    assert needed.code == 2
    assert "summarize-hierarchical-cut4 are of blocks of 3 items and not of 2" in one_paragraph(needed.stderr)

    named = f"trsr/{made.result['models']['trsr']}"
    anew = raypipe("align", "--workspace", ranked, "--system", "trsr", "--adapter", named)
    assert (anew.code, anew.status) == (0, "ok"), anew.stderr
    for figure in ("MRR@3", "no summaries: MRR@3", "shuffled summaries: MRR@3", "tokens_asked"):
        assert anew.metrics[figure] == made.metrics[figure]
