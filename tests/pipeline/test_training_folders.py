"""What a training keeps goes when its model is stored, wherever it lies; of one that never ended `forget` and `vacuum` tell."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from raypipe.errors import RaypipeError
from raypipe.pipeline.training_folders import TrainingOptions, prepared_once, trainings_outside
from raypipe.runtime.trainer import TrainerConfig
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.pipeline.test_train import SMALL, ingest_chains

SHORT = (*SMALL, "--trainer.steps", 2, "--trainer.validate_every", "null")


@pytest.fixture
def small_chains(ray_cluster: None, raypipe: Run, tmp_path: Path, files: Path) -> str:
    uri = str(tmp_path / "workspace")
    ingest_chains(raypipe, uri, files, users=12)
    return uri


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_stored_model_leaves_nothing_of_its_training(raypipe: Run, small_chains: str, tmp_path: Path) -> None:
    work, storage = tmp_path / "shared", tmp_path / "storage"
    for beside in (work / "sasrec-other", storage / "sasrec-other-workers1-zero0"):
        beside.mkdir(parents=True)
    words = ("train", "--workspace", small_chains, *SHORT, "--work_folder", work, "--trainer.storage", storage)
    ended = raypipe(*words)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert (names(work), names(storage)) == (["sasrec-other"], ["sasrec-other-workers1-zero0"])
    assert Store(small_chains).list("staging") == []

    # As a driver leaves it that dies between the model and its folder.
    name = f"sasrec-{ended.result['run_key']}"
    for left in (work / name / "data", storage / f"{name}-workers1-zero0/checkpoint_0"):
        left.mkdir(parents=True)
    assert raypipe(*words).status == "nothing_to_do"
    assert (names(work), names(storage)) == (["sasrec-other"], ["sasrec-other-workers1-zero0"])


def test_where_an_unfinished_training_keeps_histories_is_told(
    raypipe: Run, small_chains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RaypipeError("The driver dies here.")

    monkeypatch.setattr("raypipe.pipeline.train.fit", killed)
    words = ("--work_folder", tmp_path / "shared", "--trainer.storage", tmp_path / "storage")
    assert raypipe("train", "--workspace", small_chains, *SHORT, *words).code == 1
    (name,) = names(tmp_path / "shared")
    places = [f"{tmp_path}/storage/{name}-*", f"{tmp_path}/shared/{name} on {socket.gethostname()}"]
    assert trainings_outside(Store(small_chains)) == sorted(places)

    note = Store(small_chains).local_path(f"staging/{name}/outside.json")
    (noted, times) = (note.read_bytes(), (time.time() - 10 * 86_400,) * 2)
    for job, options in (("vacuum", ()), ("forget", ("--user", "u1"))):
        note.parent.mkdir(exist_ok=True)
        note.write_bytes(noted)
        os.utime(note, times)
        ended = raypipe(job, "--workspace", small_chains, *options)
        assert ended.code == 0, ended.stderr
        assert all(f"delete {place}" in ended.stderr for place in places)
        assert not note.exists()
    assert names(tmp_path / "shared") == [name]


def test_trainings_of_a_workspace_on_s3_keep_histories_outside_of_it(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    workspace, options = Workspace(s3_uri), TrainingOptions()
    folder = options.training_folder(workspace, "lm-1")
    assert folder == tmp_path / "raypipe-training/lm-1"
    # Resumed with another folder: both are told.
    other = TrainingOptions(work_folder=str(tmp_path / "shared"))
    for path in (folder, other.training_folder(workspace, "lm-1")):
        path.mkdir(parents=True)
    assert len(trainings_outside(workspace.store)) == 2
    options.remove_training(workspace, "lm-1")
    assert not folder.exists()
    assert workspace.store.list("staging") == []


def test_what_was_prepared_whole_is_not_prepared_again(tmp_path: Path) -> None:
    ended: list[str] = []

    def prepare() -> dict[str, int]:
        (tmp_path / "tokens").write_text("begun")
        if not ended:
            ended.append("killed")
            raise KeyboardInterrupt
        ended.append("whole")
        return {"examples": len(ended)}

    with pytest.raises(KeyboardInterrupt):
        prepared_once(tmp_path, Path("lm"), prepare)
    assert prepared_once(tmp_path, Path("lm"), prepare) == {"examples": 2}
    assert prepared_once(tmp_path, Path("lm"), prepare) == {"examples": 2}
    assert ended == ["killed", "whole"]
    # Workers read the language model from the folder that is noted: it may lie elsewhere when the training goes on.
    assert prepared_once(tmp_path, Path("moved"), prepare) == {"examples": 3}


def test_a_resumed_training_of_a_language_model_reads_what_was_prepared(
    raypipe: Run, small_chains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "lm",
        "--workspace",
        small_chains,
        "--trainer.steps",
        2,
        "--trainer.device",
        "cpu",
        "--work_folder",
        tmp_path / "w",
    )
    with monkeypatch.context() as broken:
        broken.setattr(
            "raypipe.pipeline.lm.fit", lambda *_: (_ for _ in ()).throw(RaypipeError("The driver dies here."))
        )
        assert raypipe(*words).code == 1
    monkeypatch.setattr("raypipe.pipeline.lm.prepare_lm", lambda *_: pytest.fail("prepared again"))
    ended = raypipe(*words)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert ended.metrics["examples"] > 0
    assert names(tmp_path / "w") == []


def test_what_cannot_be_deleted_is_told_and_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(str(tmp_path / "workspace"))
    options = TrainingOptions(trainer=TrainerConfig(storage="nowhere://at-all"))
    folder = options.training_folder(workspace, "lm-1")
    options.remove_training(workspace, "lm-1")
    assert "Delete it by hand: nowhere://at-all/lm-1-*." in capsys.readouterr().err
    assert not (folder / "data").exists()
    assert trainings_outside(workspace.store) == ["nowhere://at-all/lm-1-*"]
