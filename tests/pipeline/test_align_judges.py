"""Who judges what an oracle names: its identity, its question and its cost are told wherever the figures are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.storage.evaluations import Evaluation, Evaluations
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.recinterpreter import InterpreterConfig
from tests.conftest import Ended, Run
from tests.engines.chat_server import ChatServer
from tests.made import MODEL
from tests.pipeline.conftest import ready_beside
from tests.untrained import OF_LM, store_untrained_adapter

pytestmark = pytest.mark.usefixtures("ray_cluster")
ASKED, TRACKED = 10, ("--tracking", "auto")
QUESTION = "{history}\nA: {one}\nB: {other}\nLetter:"


@pytest.fixture
def ready(tmp_path: Path, titled_lm: Path) -> str:
    """Chains, an untrained recommender, and an untrained language model of the workspace's own."""
    return ready_beside(tmp_path, titled_lm)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer(answer=lambda prompt: "A") as running:
        yield running


def words(uri: str, server: ChatServer, *more: object) -> tuple[object, ...]:
    judges = {
        "endpoint": {"engine": "openai", "http": {"url": server.url, "model": "m"}},
        "own": {"lm": "builtin", "device": "cpu"},
    }
    asked = ("--recinterpreter.judges", json.dumps(judges), "--recinterpreter.rubric.prompt", QUESTION)
    seed = ("--recinterpreter.rubric.decoding.seed", 7, "--recinterpreter.rubric.decoding.max_new_tokens", 2)
    size = ("--asked", ASKED, "--answer_tokens", 4, "--held_out_share", 0.5)
    return ("align", "--workspace", uri, *asked, *seed, *size, *TRACKED, *more)


def runs_of(uri: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{Store(uri).local_path('mlflow.db')}")
    experiment = client.get_experiment_by_name("raypipe")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def check_told(uri: str, lm: Path, server: ChatServer, ended: Ended, evaluation: Evaluation) -> None:
    """The identities, the rubric, the seed and the cost, in the record and in MLflow's newest run."""
    judges = evaluation.settings["judges"]
    assert set(judges) == {"endpoint", "own"}
    assert (judges["endpoint"]["engine"], judges["endpoint"]["http"]["model"]) == ("openai", "m")
    assert judges["own"]["model"] == checkpoint_hash(lm)
    rubric = evaluation.settings["rubric"]
    assert (rubric["prompt"], rubric["decoding"]["seed"]) == (QUESTION, 7)

    # A prompt that the endpoint is sent is a call; the model of the workspace is asked for the same pairs.
    cost, sent = ended.result["cost"], len(server.requests)
    assert sent >= ASKED
    assert cost["calls"] == 2 * sent
    assert cost["tokens_in"] > 2 * sent
    assert cost["tokens_out"] > 0

    run = runs_of(uri)[0]
    assert run.data.tags["raypipe.job"] == "align"
    params = run.data.params
    assert (params["rubric"], params["seed"]) == (QUESTION, "7")
    assert (params["judge.endpoint"], params["judge.own"]) == ("m", "builtin")
    assert json.loads(params["judge.own.identity"]) == judges["own"]
    assert json.loads(params["judge.endpoint.identity"]) == judges["endpoint"]
    assert (run.data.metrics["calls"], run.data.metrics["tokens_in"]) == (cost["calls"], cost["tokens_in"])


def test_who_judged_a_training_is_in_its_lineage_its_record_and_its_run(
    raypipe: Run, ready: str, titled_lm: Path, server: ChatServer
) -> None:
    few = ("--recinterpreter.after", "item", "--recinterpreter.titles", 3, "--users", 10, "--positions", 1)
    trainer = ("--trainer.steps", 1, "--trainer.device", "cpu")
    ended = raypipe(*words(ready, server, *few, *trainer))
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    (model,) = Models(Store(ready)).all("recinterpreter")
    (evaluation,) = Evaluations(Store(ready)).all()
    assert model.lineage["judges"] == evaluation.settings["judges"]
    assert model.lineage["options"]["judges"]["own"]["lm"] == "builtin"
    check_told(ready, titled_lm, server, ended, evaluation)
    # What is stored is not judged again, and costs nothing.
    again = raypipe(*words(ready, server, *few, *trainer))
    assert (again.status, again.result["cost"]["calls"]) == ("nothing_to_do", 0)


def test_who_judges_a_stored_adapter_anew_is_in_a_record_and_a_run_of_its_own(
    raypipe: Run, ready: str, titled_lm: Path, server: ChatServer
) -> None:
    models = Models(Store(ready))
    recommender = models.all("sasrec")[-1]
    adapter = store_untrained_adapter(
        ready, InterpreterConfig(after="item", titles=3), recommender, MODEL.width, titled_lm
    )
    plain = raypipe(
        *words(ready, server)[:3], "--adapter", "recinterpreter", "--asked", ASKED, "--answer_tokens", 4, *TRACKED
    )
    assert (plain.code, plain.result["cost"]["calls"]) == (0, 0), plain.stderr
    anew = words(ready, server, "--adapter", "recinterpreter")
    ended = raypipe(*anew)
    assert (ended.code, ended.result["models"]) == (0, {adapter.name: adapter.hash}), ended.stderr
    evaluation = Evaluations(Store(ready)).all()[-1]
    check_told(ready, titled_lm, server, ended, evaluation)
    assert [run.data.params["model"] for run in runs_of(ready)] == [adapter.hash] * 2
    assert raypipe(*anew).code == 0
    assert len(runs_of(ready)) == len(Evaluations(Store(ready)).all()) == 2

    # By the same name another model judges: a record beside, as its figures are not to be compared.
    other = titled_lm.parent / "other"
    save_untrained(other, BuiltinLmConfig(size="tiny", context=256), train_tokenizer(["a word"] * 9, [], [], 300))
    models.add("lm", other, "newer", OF_LM)
    assert raypipe(*anew, "--lm", titled_lm).code == 0
    found = [one.settings["judges"]["own"]["model"] for one in Evaluations(Store(ready)).all()[1:]]
    assert found == [checkpoint_hash(titled_lm), checkpoint_hash(other)]
