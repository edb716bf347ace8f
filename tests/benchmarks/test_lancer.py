"""The golden rows of LANCER: names of ablations, controls and floors, and commands that make them again."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import pytest

from tests.benchmarks import lancer
from tests.benchmarks.lancer import rows_of
from tests.benchmarks.recommenders import ROOT

METRICS = {
    "asked": 943,
    "loss_last": 1.0,
    "first_train_seconds": 3.0,
    "validation_step": 7,
    "validation_logprob": -6.1,
    "tokens_asked": 9,
    "Recall@5": 0.12,
    "NDCG@5": 0.08,
    "grounding exact@1": 0.9,
    "shuffled items: Recall@5": 0.1,
    "perturbed 2: NDCG@5": 0.05,
    "popularity: Recall@5": 0.06,
    "transitions: Recall@5": 0.11,
}


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[argparse.Namespace, list[list[str]]]:
    """The parsed words, and the jobs that the benchmark runs."""
    jobs: list[list[str]] = []
    seen: list[argparse.Namespace] = []

    def run(*job: str) -> dict[str, Any]:
        jobs.append(list(job))
        return {"models": {"lm": {"lm": "l1"}, "align": {"lancer": "a1"}}.get(job[0], {}), "metrics": METRICS}

    def told(metrics: dict[str, float], given: argparse.Namespace, machine: str) -> list[dict[str, Any]]:
        seen.append(given)
        return rows_of(metrics, given, machine)

    monkeypatch.setattr(lancer, "run", run)
    monkeypatch.setattr(lancer, "rows_of", told)
    # Made-up figures belong in no golden table, whatever the words say.
    monkeypatch.setattr(lancer, "merge", lambda path, rows: None)
    lancer.main(list(words))
    return seen[0], jobs


def option(job: list[str], name: str) -> str | None:
    return job[job.index(name) + 1] if name in job else None


@pytest.mark.parametrize(
    ("ablation", "options"),
    [
        ("", set()),
        ("reasoning", {"--no-lancer.reasoning"}),
        ("knowledge", {"--no-lancer.knowledge"}),
        ("both", {"--no-lancer.reasoning", "--no-lancer.knowledge"}),
    ],
)
def test_an_ablation_is_trained_without_its_prompt(
    monkeypatch: pytest.MonkeyPatch, ablation: str, options: set[str]
) -> None:
    given, jobs = ran(monkeypatch, "--ablation", ablation, "--seed", "3")
    assert [job[0] for job in jobs] == ["ingest", "lm", "align"]
    assert {word for word in jobs[2] if word.startswith("--no-")} == options
    assert option(jobs[1], "--hold_out") == "2"
    assert option(jobs[2], "--lm") == "builtin/l1"
    assert option(jobs[2], "--trainer.seed") == "3"
    assert {row["model"] for row in rows_of(METRICS, given, "")} >= {"popularity", "transitions"}


def test_rows_name_what_is_apart_and_the_command_that_makes_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--ablation", "reasoning", "--lm", "base", "--seed", "1", "--", "--trainer.epochs", "2"]
    given, _ = ran(monkeypatch, *words)
    rows = rows_of(METRICS, given, "")
    name = "LANCER no reasoning prompt base LM"
    assert {(row["model"], row["metric"]): row["value"] for row in rows} == {
        (name, "validation_logprob"): -6.1,
        (name, "Recall@5"): 0.12,
        (name, "NDCG@5"): 0.08,
        (name, "grounding exact@1"): 0.9,
        (f"{name}, shuffled items", "Recall@5"): 0.1,
        (f"{name}, perturbed 2", "NDCG@5"): 0.05,
        ("popularity", "Recall@5"): 0.06,
        ("transitions", "Recall@5"): 0.11,
    }
    make, bench, named, arguments = shlex.split(rows[0]["command"])
    assert (make, bench, named) == ("make", "bench", "NAME=lancer")
    again, _ = ran(monkeypatch, *shlex.split(arguments.removeprefix("ARGS=")))
    assert {**vars(again), "golden": False} == {**vars(given), "golden": False}


def test_the_system_itself_bears_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = ran(monkeypatch)
    assert rows_of(METRICS, given, "")[0]["model"] == "LANCER"
    assert rows_of(METRICS, given, "")[0]["protocol"].endswith("943 users asked")


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--dataset", "ml-100k"], "filtered"),
        (["--dataset", "amazon-industrial"], "kept"),
        (["--dataset", "ml-100k", "--", "--no-lancer.filter_seen"], "kept"),
        (["--dataset", "amazon-industrial", "--", "--lancer.filter_seen"], "filtered"),
        (["--dataset", "ml-100k", "--trained_on", "amazon-industrial"], "kept"),
        (["--dataset", "amazon-industrial", "--trained_on", "ml-100k"], "kept"),
    ],
)
def test_rows_say_whether_what_was_seen_is_left_out_as_lists_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], seen: str
) -> None:
    """With the other switch they are rows beside these, and so are the floors'."""
    given, _ = ran(monkeypatch, *words)
    told = f"leave-one-out, whole catalogue, seen items {seen}, best validation"
    assert {row["protocol"] for row in rows_of(METRICS, given, "")} == {f"{told}, 943 users asked"}
    assert {row["protocol"] for row in rows_of({**METRICS, "askable": 943}, given, "")} == {told}


def test_stored_rows_stand_in_one_table_with_the_recommenders_and_their_floors_are_the_same() -> None:
    rows, others = (
        json.loads((ROOT / f"tests/golden/{name}-ml-100k.json").read_text()) for name in ("lancer", "recommenders")
    )
    assert {row["protocol"] for row in rows} == {row["protocol"] for row in others}
    for floor in ("popularity", "transitions"):
        mine, theirs = (
            {row["metric"]: row["value"] for row in some if row["model"] == floor} for some in (rows, others)
        )
        for metric, same in (
            ("Recall@5", "HR@5"),
            ("Recall@10", "HR@10"),
            ("NDCG@5", "NDCG@5"),
            ("NDCG@10", "NDCG@10"),
        ):
            assert mine[metric] == pytest.approx(theirs[same], abs=5e-5)


def test_what_was_learnt_elsewhere_is_asked_here_and_nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    given, jobs = ran(monkeypatch, "--trained_on", "ml-100k", "--dataset", "amazon-industrial", "--constrained")
    assert [job[0] for job in jobs] == ["ingest", "lm", "align", "ingest", "align"]
    home, here = (str(option(job, "--workspace")) for job in (jobs[2], jobs[4]))
    assert (home.endswith("ml-100k"), here.endswith("amazon-industrial")) == (True, True)
    assert option(jobs[4], "--adapter") == "lancer/a1"
    assert option(jobs[4], "--adapter_workspace") == home
    assert "--lancer.constrained" in jobs[4]
    assert "--lancer.constrained" not in jobs[2]
    assert rows_of(METRICS, given, "")[0]["model"] == "LANCER constrained trained on ml-100k"


@pytest.mark.parametrize("metric", ["Recall@5", "NDCG@5"])
def test_what_was_measured_stands_above_its_floors(metric: str) -> None:
    rows = json.loads((ROOT / "tests/golden/lancer-ml-100k.json").read_text())
    seeds = {row["seed"] for row in rows if row["model"] == "LANCER"}
    assert seeds
    for seed in seeds:
        told = {row["model"]: row["value"] for row in rows if (row["metric"], row["seed"]) == (metric, seed)}
        assert told["LANCER"] > max(told["popularity"], told["transitions"])


def test_each_prompt_tells_the_next_line_where_two_items_are_shown() -> None:
    rows = json.loads((ROOT / "tests/golden/lancer-ml-100k.json").read_text())
    told = {row["model"]: row["value"] for row in rows if row["metric"] == "validation_logprob"}
    whole = told.pop("LANCER two shown")
    ablations = {name for name in told if name.endswith("two shown")}
    assert len(ablations) == 3
    assert whole > max(told[name] for name in ablations)
