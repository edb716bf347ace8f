"""The golden rows of LLM-TRSR: what ranks without a language model has its own name, and commands make rows again."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import trsr

METRICS = {
    "asked": 9,
    "Recall@3": 0.5,
    "seconds": 7.0,
    "no summaries: Recall@3": 0.4,
    "sasrec: Recall@3": 0.3,
    "sasrec: seconds": 0.1,
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
        models = {"train": {"sasrec": "s1"}, "lm": {"lm": "l1"}, "align": {"trsr": f"t{len(jobs)}"}}
        return {"models": models.get(job[0], {}), "metrics": METRICS}

    def watched(result: Any, given: argparse.Namespace, machine: str) -> list[dict[str, Any]]:
        told.append((given, rows_of(result, given, machine)))
        return told[-1][1]

    monkeypatch.setattr(trsr, "run", run)
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
        ("LLM-TRSR, no summaries", "Recall@3"): 0.4,
        ("sasrec", "Recall@3"): 0.3,
        ("sasrec", "seconds"): 0.1,
        ("LLM-TRSR", "above no summary: Recall@3"): 0.1,
        ("LLM-TRSR", "above no summary: Recall@3 low"): 0.05,
        ("LLM-TRSR", "summary_calls"): 30,
    }
    asked = "leave-one-out, 21 candidates, last 25 events shown, 9 users"
    protocols = {row["model"]: row["protocol"] for row in rows}
    assert protocols.pop("sasrec") == asked
    assert set(protocols.values()) == {f"{asked}, summaries of all before"}


def test_rows_of_another_length_of_histories_stand_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of floors and of the recommender too, which are told by their names alone."""
    _, _, rows = given(monkeypatch, "--label", "history 100", "--", "--trsr.history", "100")
    assert {row["protocol"].partition(", summaries")[0] for row in rows} == {
        "leave-one-out, 21 candidates, last 100 events shown, 9 users"
    }


def test_a_lesser_sasrec_beside_it_is_told_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    _, jobs, rows = given(monkeypatch, "--dataset", "ml-1m", "--sasrec", "short")
    trained = next(job for job in jobs if job[0] == "train")
    assert Path(str(option(trained, "--config"))).name == "sasrec-ml-1m-short.yaml"
    assert {row["model"] for row in rows if "sasrec" in row["model"]} == {"sasrec short"}
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


@pytest.mark.parametrize("paradigm", ["recurrent", "hierarchical"])
@pytest.mark.parametrize(("dataset", "cuts"), [("amazon-industrial", 3), ("ml-100k", 6)])
def test_summaries_are_compared_with_none_of_the_same_recipe(
    monkeypatch: pytest.MonkeyPatch, dataset: str, cuts: int, paradigm: str
) -> None:
    """Of every place that is learnt, and of the one that is asked about."""
    words = ("--dataset", dataset, "--paired", "--summaries", paradigm, "--block_items", "3")
    _, jobs, _ = given(monkeypatch, *words)
    assert [job[0] for job in jobs] == ["ingest", "lm", "train", *["summarize"] * cuts, "align", "align"]
    assert [option(job, "--summaries.hold_out") for job in jobs[3:-2]] == [str(cut + 1) for cut in range(cuts)]
    assert [option(job, "--summaries") for job in jobs[-2:]] == ["null", paradigm]
    assert option(jobs[-1], "--trsr.against") == f"trsr/t{cuts + 4}"
    assert option(jobs[-1], "--trsr.block_items") == "3"
