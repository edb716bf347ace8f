"""MLflow beside the workspace: one run per run key, one registered version per model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.errors import UsageError
from raypipe.storage.models import Model
from raypipe.storage.store import Store
from raypipe.storage.tracking import Tracking


@pytest.fixture(autouse=True)
def no_server(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_same_run_key_reopens_its_run_and_a_model_is_registered_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = Store(str(tmp_path / "workspace"))
    store.put("workspace.json", b"{}")
    lengths = {"perturbed 1: Recall@5 length 1–10": 0.2, "Recall@5 length > 200": 0.1}
    for attempt in (1, 2):
        tracking = Tracking(store, "auto", print)
        tracking.log_run(
            "summarize", "a" * 32, {"engine": "echo"}, {"users": 10.0 * attempt, "ndcg@10": 0.5, **lengths}
        )
        tracking.register(Model("lm", "0" * 32, "recipe", {}, 0.0))
    tracking.log_run("summarize", "b" * 32, {"engine": "echo"}, {"users": 1.0}, {"report.md": "# Told"})
    tracking.register(Model("lm", "1" * 32, "recipe", {}, 0.0))

    client = MlflowClient(f"sqlite:///{tmp_path}/workspace/mlflow.db")
    experiment = client.get_experiment_by_name("raypipe")
    assert experiment is not None
    runs = {run.data.tags["raypipe.run_key"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"a" * 32, "b" * 32}
    reopened = runs["a" * 32]
    assert reopened.data.metrics == {
        "users": 20.0,
        "ndcg_at_10": 0.5,
        "perturbed 1: Recall_at_5 length 1-10": 0.2,
        "Recall_at_5 length over 200": 0.1,
    }
    assert reopened.data.params == {"engine": "echo"}
    assert reopened.info.status == "FINISHED"
    artifacts = store.local_path("mlartifacts").rglob("report.md")
    assert [path.read_text() for path in artifacts] == ["# Told"]
    versions = client.search_model_versions("name = 'raypipe-lm'")
    assert sorted(version.source for version in versions) == [store.object_uri(f"models/lm/{d * 32}") for d in "01"]


def test_a_workspace_on_an_object_store_needs_a_tracking_server(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"no MLflow server is named. Set MLFLOW_TRACKING_URI"):
        Tracking(Store("s3://bucket/workspace"), "auto", print)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Tracking(Store("s3://bucket/workspace"), "auto", print).uri == "http://mlflow:5000"


def test_a_server_that_does_not_answer_stops_nobody_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told: list[str] = []
    tracking = Tracking(Store(str(tmp_path / "workspace")), "auto", told.append)
    model = Model("lm", "0" * 32, "recipe", {}, 0.0)
    tracking.log_run("summarize", "a" * 32, {"engine": "echo"}, {"users": 10.0})
    tracking.register(model)
    tracking.unregister(model)
    whats = ["the run aaaaaaaaaaaa of summarize", "the model lm/000000000000", "the end of the model lm/000000000000"]
    assert [line.split(",")[0] for line in told] == [f"MLflow was not told of {what}" for what in whats]
    assert all("127.0.0.1" in line for line in told)


def test_a_database_that_is_damaged_stops_nobody_and_is_told_of(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("mlflow.db", b"no database " * 1000)
    told: list[str] = []
    tracking = Tracking(store, "auto", told.append)
    model = Model("lm", "0" * 32, "recipe", {}, 0.0)
    tracking.log_run("summarize", "a" * 32, {"engine": "echo"}, {"users": 10.0})
    tracking.register(model)
    tracking.unregister(model)
    assert len(told) == 3
    assert all("all else is done: (sqlite3.DatabaseError) file is not a database" in line for line in told)


def test_tracking_that_is_off_opens_nothing_and_imports_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from raypipe.storage.tracking import Tracking; from raypipe.storage.store import Store;"
        "from raypipe.storage.models import Model;"
        "tracking = Tracking(Store(sys.argv[1]), 'off', print); tracking.log_run('j', 'k', {}, {});"
        "tracking.register(Model('lm', 'h', 'r', {}, 0.0)); assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "workspace")], check=True)
    assert not (tmp_path / "workspace").exists()
