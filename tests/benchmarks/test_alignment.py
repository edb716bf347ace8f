"""What the benchmark of alignment writes into a golden table, of figures that nobody had to train for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import alignment
from tests.benchmarks.recommenders import merge

METRICS = {
    "unseen_by_all": 1,
    "loss_first": 3.0,
    "tokens": 9,
    "asked": 7,
    "recovery": 0.4,
    "recovery by place 1": 0.9,
    "shuffled states: recovery": 0.1,
    "probe of states: shuffled states: residual": 0.2,
    "nearest item: oracle preferred to random": 0.7,
}


class Jobs:
    """Stands in for the command line; remembers every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, metrics: dict[str, float]) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.name, self.metrics = name, metrics
        monkeypatch.setattr(alignment, "run", self.run)

    def run(self, *words: str) -> dict[str, Any]:
        self.calls.append(words)
        if words[0] == "train":
            return {"models": {Path(words[words.index("--config") + 1]).stem.split("-")[0]: "abc"}}
        return {"models": {"lm": "f00"} if words[0] == "lm" else {self.name: "123"}, "metrics": self.metrics}

    def option(self, job: str, name: str) -> list[str]:
        return [words[words.index(name) + 1] for words in self.calls if words[0] == job and name in words]


Table = list[dict[str, Any]]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """The rows that would have been written."""
    found: Table = []
    monkeypatch.setattr(alignment, "merge", lambda path, rows: found.extend(rows))
    return found


def test_a_system_has_its_name_and_controls_and_probes_are_models_of_their_own(
    monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    Jobs(monkeypatch, "recinterpreter", METRICS)
    alignment.main(["--golden", "--seed", "2"])
    assert [(row["model"], row["metric"], row["value"]) for row in table] == [
        ("RecInterpreter", "recovery", 0.4),
        ("RecInterpreter", "recovery by place 1", 0.9),
        ("RecInterpreter, shuffled states", "recovery", 0.1),
        ("RecInterpreter, probe of states, shuffled states", "residual", 0.2),
        ("RecInterpreter, nearest item", "oracle preferred to random", 0.7),
    ]
    assert {(row["dataset"], row["recommender"], row["seed"]) for row in table} == {("ml-100k", "sasrec", 2)}
    table.clear()
    figures = {"asked": 7, "T1 HR@5": 0.9, "T2 NDCG@5": 0.8, "student: T3 accuracy": 0.7, "shuffled users: T6 HCR": 0.1}
    Jobs(monkeypatch, "recexplainer-i", figures)
    alignment.main(["--golden", "--system", "recexplainer"])
    assert [(row["model"], row["metric"]) for row in table] == [
        ("RecExplainer-I", "T1 HR@5"),
        ("RecExplainer-I", "T2 NDCG@5"),
        ("RecExplainer-I, student", "T3 accuracy"),
        ("RecExplainer-I, shuffled users", "T6 HCR"),
    ]


@pytest.mark.parametrize(
    ("words", "model", "recommender"),
    [
        (["--width", "16"], "RecInterpreter", "sasrec-16"),
        (["--lm", "large"], "RecInterpreter large LM", "sasrec"),
        (["--recipe", "terse"], "RecInterpreter terse", "sasrec"),
        (["--model", "gru4rec", "--adapter_of", "sasrec"], "RecInterpreter trained on sasrec", "gru4rec"),
        (["--label", "linear", "--", "--recinterpreter.projector", "linear"], "RecInterpreter linear", "sasrec"),
        (["--label", "without T2", "--", "--recexplainer.tasks", "T1,T3"], "RecInterpreter without T2", "sasrec"),
    ],
)
def test_a_row_of_a_sweep_is_one_command_that_gives_it_again(
    words: list[str], model: str, recommender: str, monkeypatch: pytest.MonkeyPatch, table: Table
) -> None:
    jobs = Jobs(monkeypatch, "recinterpreter", METRICS)
    alignment.main(["--golden", *words])
    assert (table[0]["model"], table[0]["recommender"]) == (model, recommender)
    assert jobs.option("align", "--lm")[-1] == "builtin/f00"
    calls, rows = list(jobs.calls), list(table)
    *make, arguments = shlex.split(rows[0]["command"])
    assert make == ["make", "bench", "NAME=alignment"]
    alignment.main(shlex.split(arguments.removeprefix("ARGS=")))
    assert (jobs.calls[len(calls) :], table[len(rows) :]) == (calls, rows)


def test_what_is_swept_reaches_the_job_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(monkeypatch, "recinterpreter", METRICS)
    alignment.main(
        ["--width", "16", "--lm", "base", "--model", "gru4rec", "--adapter_of", "sasrec", "--recipe", "terse"]
    )
    assert jobs.option("train", "--recommender.width") == ["16", "16"]
    assert jobs.option("lm", "--data.model.size") == ["base"]
    assert jobs.option("align", "--model") == ["sasrec/abc", "gru4rec/abc"]
    assert jobs.option("align", "--adapter") == ["recinterpreter/123"]
    assert {Path(path).name for path in jobs.option("align", "--config")} == {"recinterpreter-ml-100k-terse.yaml"}


def test_rows_take_the_place_of_those_of_the_same_model_recommender_seed_and_protocol(tmp_path: Path) -> None:
    def row(recommender: str, value: float, seed: int = 0, protocol: str = "all") -> dict[str, Any]:
        model = {"model": "RecInterpreter", "recommender": recommender, "seed": seed}
        return {**model, "protocol": protocol, "command": "make bench", "value": value}

    path = tmp_path / "golden.json"
    merge(path, [row("sasrec", 0.1), row("gru4rec", 0.2), row("sasrec", 0.3, seed=1)])
    merge(path, [row("sasrec", 0.4)])
    merge(path, [row("sasrec", 0.5, protocol="last 100")])
    assert json.loads(path.read_text()) == [
        row("gru4rec", 0.2),
        row("sasrec", 0.4),
        row("sasrec", 0.5, protocol="last 100"),
        row("sasrec", 0.3, seed=1),
    ]


def test_what_was_read_of_another_training_goes_with_the_model_it_was_read_of(tmp_path: Path) -> None:
    def row(model: str, command: str) -> dict[str, Any]:
        return {"model": model, "recommender": "sasrec", "seed": 0, "protocol": "all", "command": command}

    path = tmp_path / "golden.json"
    one, probe = row("RecExplainer-H", "one"), row("RecExplainer-H, probe of states", "one")
    apart = row("RecExplainer-H listed, probe of states", "one")
    merge(path, [one, probe, apart])
    unprobed = row("RecExplainer-H", "one --no-beside")
    merge(path, [unprobed])
    assert json.loads(path.read_text()) == [unprobed, apart, probe]
    other = row("RecExplainer-H", "other --no-beside")
    merge(path, [other])
    assert json.loads(path.read_text()) == [other, apart]
