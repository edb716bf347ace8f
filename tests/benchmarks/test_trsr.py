"""The golden rows of LLM-TRSR: what ranks without a language model has its own name, and commands make rows again."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from raypipe.errors import UsageError
from raypipe.pipeline.report_figures import read_golden
from raypipe.pipeline.report_tables import tables_of
from raypipe.storage.models import Models
from raypipe.storage.workspace import Workspace
from tests.benchmarks import trsr

GOLDEN = Path(__file__).parents[1] / "golden"
SWEEP = re.findall(r"^    \S.*?  +(--.*)$", str(trsr.__doc__), re.MULTILINE)

METRICS = {
    "asked": 9,
    "Recall@3": 0.5,
    "seconds": 7.0,
    "calls": 189,
    "items_shown": 2.5,
    "no summaries: Recall@3": 0.4,
    "no summaries: tokens_asked": 1_000,
    "above its own without summaries: Recall@3": 0.1,
    "sasrec: Recall@3": 0.3,
    "sasrec: seconds": 0.1,
    "sasrec: train_seconds": 9.0,
    "above abc: Recall@3": 0.1,
    "above abc: Recall@3 low": 0.05,
    "summary_calls": 30,
    "loss_first": 3.0,
}


def given(
    monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[argparse.Namespace, list[list[str]], list[dict[str, Any]]]:
    """The parsed words, the jobs that the benchmark runs, and its rows."""
    jobs: list[list[str]] = []
    told: list[tuple[argparse.Namespace, list[dict[str, Any]]]] = []
    rows_of = trsr.rows_of

    def run(*job: str) -> dict[str, Any]:
        jobs.append(list(job))
        models = {"train": {"sasrec": f"s{len(jobs)}"}, "lm": {"lm": "l1"}, "align": {"trsr": f"t{len(jobs)}"}}
        return {"models": models.get(job[0], {}), "metrics": METRICS}

    def watched(result: Any, given: argparse.Namespace, *rest: Any, **named: Any) -> list[dict[str, Any]]:
        told.append((given, rows_of(result, given, *rest, **named)))
        return told[-1][1]

    monkeypatch.setattr(trsr, "run", run)
    monkeypatch.setattr(trsr, "best_epochs", lambda uri, sasrec: f"7 of {sasrec}")
    monkeypatch.setattr(trsr, "rows_of", watched)
    trsr.main(list(words))
    monkeypatch.setattr(trsr, "rows_of", rows_of)
    return told[0][0], jobs, told[0][1]


def option(job: list[str], name: str) -> str | None:
    return job[job.index(name) + 1] if name in job else None


def test_rows_bear_the_names_of_what_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, rows = given(monkeypatch)
    assert {(row["model"], row["metric"]): row["value"] for row in rows} == {
        ("LLM-TRSR", "Recall@3"): 0.5,
        ("LLM-TRSR", "seconds"): 7.0,
        ("LLM-TRSR", "calls"): 189,
        ("LLM-TRSR", "items_shown"): 2.5,
        ("LLM-TRSR, no summaries", "Recall@3"): 0.4,
        ("LLM-TRSR, no summaries", "tokens_asked"): 1_000,
        ("sasrec", "Recall@3"): 0.3,
        ("sasrec", "seconds"): 0.1,
        ("sasrec", "train_seconds"): 9.0,
        ("LLM-TRSR", "above its own without summaries: Recall@3"): 0.1,
        ("LLM-TRSR", "above one trained without summaries: Recall@3"): 0.1,
        ("LLM-TRSR", "above one trained without summaries: Recall@3 low"): 0.05,
        ("LLM-TRSR", "summary_calls"): 30,
    }


@pytest.mark.parametrize("paradigm", trsr.PARADIGMS)
def test_all_who_rank_the_same_candidates_stand_in_one_table(monkeypatch: pytest.MonkeyPatch, paradigm: str) -> None:
    """Which summaries are shown is in the model's name alone."""
    _, _, rows = given(monkeypatch, "--summaries", paradigm)
    assert {row["protocol"] for row in rows} == {"leave-one-out, 21 candidates, last 25 events shown, 9 users"}
    names = {"recurrent": "LLM-TRSR", "hierarchical": "LLM-TRSR hierarchical", "none": "LLM-TRSR no summary"}
    assert {row["model"] for row in rows if row["metric"] == "calls"} == {names[paradigm]}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("trsr-*.json")), ids=lambda path: path.stem)
def test_a_golden_table_is_one_table_of_the_report(path: Path) -> None:
    figures = read_golden(str(path))
    (dataset,) = {figure.dataset for figure in figures}
    (ranking,) = [table for table in tables_of(dataset, figures) if table.section.title == "Ranking"]
    names = {row.model.partition(" ")[0].strip(",") for row in ranking.rows}
    assert names >= {"LLM-TRSR", "SASRec", "popularity", "boosted", "chance"}


def test_rows_tell_what_is_ranked_and_counted_by_the_options_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of floors and of the recommender too, which are told by their names alone."""
    options = ("--trsr.history=100", "--trsr.candidates.negatives", "999")
    _, _, rows = given(monkeypatch, "--label", "history 100", "--", *options)
    assert {row["protocol"] for row in rows} == {"leave-one-out, 1000 candidates, last 100 events shown, 9 users"}


def test_what_align_refuses_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trsr, "run", lambda *job: pytest.fail(f"{job[0]} ran"))
    with pytest.raises(UsageError, match="no-facts"):
        trsr.main(["--", "--trsr.no-facts"])


@pytest.mark.parametrize("line", SWEEP)
def test_a_row_of_the_sweep_is_a_command_that_the_benchmark_takes(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    assert len(SWEEP) == 14
    _, jobs, rows = given(monkeypatch, *shlex.split(line))
    assert jobs
    assert rows


def test_sasrec_learns_what_all_learn_for_as_many_epochs_as_validated_best(monkeypatch: pytest.MonkeyPatch) -> None:
    _, jobs, rows = given(monkeypatch)
    validated, last = [job for job in jobs if job[0] == "train"]
    assert [option(validated, name) for name in ("--hold_out", "--trainer.epochs")] == [None, None]
    assert [option(last, name) for name in ("--hold_out", "--trainer.validate_every")] == ["1", "null"]
    assert option(last, "--trainer.epochs") == "7 of s3"
    assert option(jobs[-1], "--model") == "sasrec/s4"
    assert "sasrec" in {row["model"] for row in rows}


def test_one_that_learnt_an_event_less_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, jobs, rows = given(monkeypatch, "--sasrec_hold_out", "2")
    assert [option(job, "--hold_out") for job in jobs if job[0] == "train"] == [None]
    assert option(jobs[-1], "--model") == "sasrec/s3"
    assert {row["model"] for row in rows if "sasrec" in row["model"]} == {"sasrec-without the last 2 events"}
    assert "--sasrec_hold_out 2" in rows[0]["command"]


def test_the_best_epochs_are_those_of_the_first_best_validation(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.json").write_text("none")
    lineage = {
        "training": {"validations": [[26, 0.1], [52, 0.3], [78, 0.3], [90, 0.2]]},
        "config": {"trainer": {"validate_every": 2.0}},
    }
    stored = Models(Workspace(str(tmp_path / "ws")).store).add("sasrec", tmp_path / "model", "recipe", lineage)
    assert trsr.best_epochs(str(tmp_path / "ws"), stored.hash) == "4"


def test_a_lesser_sasrec_beside_it_is_told_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    _, jobs, rows = given(monkeypatch, "--dataset", "ml-1m", "--sasrec", "short")
    trained = [job for job in jobs if job[0] == "train"]
    assert {Path(str(option(job, "--config"))).name for job in trained} == {"sasrec-ml-1m-short.yaml"}
    assert {row["model"] for row in rows if "sasrec" in row["model"]} == {"sasrec-short"}
    assert "--sasrec short" in rows[0]["command"]


def test_the_command_makes_the_row_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--summaries", "none", "--label", "recent 1", "--seed", "2", "--", "--trsr.recent", "1"]
    read, jobs, rows = given(monkeypatch, *words)
    assert rows[0]["model"] == "LLM-TRSR no summary recent 1"
    assert option(jobs[-1], "--summaries") == "null"
    assert option(jobs[-1], "--trsr.recent") == "1"
    make, bench, name, arguments = shlex.split(rows[0]["command"])
    assert (make, bench, name) == ("make", "bench", "NAME=trsr")
    again, _, _ = given(
        monkeypatch, *[word for word in shlex.split(arguments.removeprefix("ARGS=")) if word != "--golden"]
    )
    assert vars(again) == vars(read)


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ((), 3),
        (("--positions", "5"), 6),
        (("--trainer.validate_every", "1"), 4),
        (("--positions=1",), 2),
        (("--trsr.block_items", "3"), 3),
    ],
)
def test_summaries_are_written_of_all_that_the_options_ask_for_by_the_model_that_reads_them(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], cuts: int
) -> None:
    _, jobs, _ = given(monkeypatch, "--", *options)
    written = [job for job in jobs if job[0] == "summarize"]
    assert [option(job, "--summaries.hold_out") for job in written] == [str(cut + 1) for cut in range(cuts)]
    assert {option(job, "--engine.lm") for job in written} == {option(jobs[-1], "--lm")} == {"builtin/l1"}
    assert {option(job, "--summaries.block_items") for job in written} == {
        option([*options], "--trsr.block_items") or "5"
    }


@pytest.mark.parametrize("paradigm", ["recurrent", "hierarchical"])
@pytest.mark.parametrize(("dataset", "cuts"), [("amazon-industrial", 3), ("ml-100k", 6)])
def test_summaries_are_compared_with_none_of_the_same_recipe(
    monkeypatch: pytest.MonkeyPatch, dataset: str, cuts: int, paradigm: str
) -> None:
    """Of every place that is learnt, and of the one that is asked about."""
    words = ("--dataset", dataset, "--paired", "--summaries", paradigm, "--block_items", "3")
    _, jobs, _ = given(monkeypatch, *words)
    assert [job[0] for job in jobs] == ["ingest", "lm", "train", "train", *["summarize"] * cuts, "align", "align"]
    assert [option(job, "--summaries.hold_out") for job in jobs[4:-2]] == [str(cut + 1) for cut in range(cuts)]
    assert [option(job, "--summaries") for job in jobs[-2:]] == ["null", paradigm]
    assert option(jobs[-1], "--trsr.against") == f"trsr/t{cuts + 5}"
    assert option(jobs[-1], "--trsr.block_items") == "3"
