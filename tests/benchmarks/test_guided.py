"""The golden rows of guided refinement: names of controls, gains over the base, and commands that make them again."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import pytest

from tests.benchmarks import guided
from tests.benchmarks.guided import CONTROLS, rows_of

METRICS = {"sasrec.HR@10": 0.2, "sasrec.NDCG@10": 0.11, "sasrec.MRR@10": 0.08, "popularity.NDCG@10": 0.01}
BASE = {"sasrec.NDCG@10": 0.1}


def given(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[argparse.Namespace, list[list[str]]]:
    """The parsed words, and the jobs that the benchmark runs."""
    jobs: list[list[str]] = []
    seen: list[argparse.Namespace] = []

    def run(*job: str) -> dict[str, Any]:
        jobs.append(list(job))
        models = {"train": {"sasrec": f"m{len(jobs)}"}, "lm": {"lm": "l1"}, "align": {"guided": "g1"}}
        return {"models": models.get(job[0], {}), "metrics": METRICS | {"sasrec.NDCG@10": 0.1}}

    def told(given: argparse.Namespace, *rest: Any, **named: Any) -> list[dict[str, Any]]:
        seen.append(given)
        return rows_of(given, *rest, **named)

    monkeypatch.setattr(guided, "run", run)
    monkeypatch.setattr(guided, "rows_of", told)
    # Made-up figures belong in no golden table, whatever the words say.
    monkeypatch.setattr(guided, "merge", lambda path, rows: None)
    monkeypatch.setattr(guided, "latency", lambda uri, model, base: 1.0)
    guided.main(list(words))
    return seen[0], jobs


def option(job: list[str], name: str) -> str | None:
    return job[job.index(name) + 1] if name in job else None


@pytest.mark.parametrize("control", CONTROLS)
def test_each_control_trains_what_it_says(monkeypatch: pytest.MonkeyPatch, control: str) -> None:
    _, jobs = given(monkeypatch, "--control", control, "--seed", "3")
    names = [job[0] for job in jobs]
    trained = [job for job in jobs if job[0] == "train"]
    assert option(trained[0], "--recommender.guided.base") is None
    assert {option(job, "--trainer.seed") for job in trained} == {"3"}
    if control == "base":
        assert names == ["ingest", "train", "evaluate"]
        return
    assert option(trained[1], "--recommender.guided.base") == "sasrec/m2"
    wanted = {"again": None, "reduced": "none", "shuffled": "shuffled", "random": "random"}.get(control, "scores")
    assert option(trained[1], "--recommender.guided.block") == wanted
    assert option(trained[1], "--recommender.guided.scores") == (None if control == "again" else "guided/g1")
    aligned = [job for job in jobs if job[0] == "align"]
    assert ["--no-guided.tuned" in job for job in aligned] == ([] if control == "again" else [control == "zero-shot"])


def test_rows_name_the_control_the_gain_and_the_command_that_makes_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--control", "shuffled", "--users", "absent", "--seed", "1", "--", "--recommender.guided.scale", "2"]
    read, _ = given(monkeypatch, *words)
    rows = {row["metric"]: row for row in rows_of(read, METRICS, BASE, 1.02, filtered=False)}
    assert {row["model"] for row in rows.values()} == {"Guided shuffled, users absent"}
    assert {name: row["value"] for name, row in rows.items()} == {
        "Recall@10": 0.2,
        "NDCG@10": 0.11,
        "MRR@10": 0.08,
        "latency, share of the base's": 1.02,
        "relative NDCG@10 gain": 0.1,
    }
    make, bench, name, arguments = shlex.split(rows["NDCG@10"]["command"])
    assert (make, bench, name) == ("make", "bench", "NAME=guided")
    again, _ = given(monkeypatch, *shlex.split(arguments.removeprefix("ARGS=")))
    assert {**vars(again), "golden": False} == {**vars(read), "golden": False}


def test_the_system_itself_bears_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read, jobs = given(monkeypatch)
    assert rows_of(read, METRICS, BASE, 1.0, filtered=True)[0]["model"] == "Guided"
    assert [job[0] for job in jobs] == ["ingest", "train", "lm", "align", "train", "evaluate", "evaluate"]
    assert option(jobs[2], "--hold_out") == option(jobs[3], "--hold_out") == "2"
