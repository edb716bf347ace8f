"""Folders in which trainings keep prepared histories and checkpoints, and their removal once the model is stored.

Until then a folder outside of the workspace is noted in the workspace, as nobody else there could tell of it.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raypipe.config import Config, free, shaping
from raypipe.errors import RaypipeError
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import TrainerConfig, only_node, remove_checkpoints
from raypipe.storage.locks import hold
from raypipe.storage.models import Model, Models
from raypipe.storage.store import Store
from raypipe.storage.tracking import Tracking
from raypipe.storage.workspace import Workspace

_NOTE = "outside.json"
_COUNTS = "counts.json"


@dataclass(frozen=True)
class Training:
    """A training of the model `name` by a job.

    `recipe` is the fingerprint of all that shapes the model; `lease_s` is the lease of the job's lock, in seconds.
    """

    job: str
    name: str
    recipe: str
    lease_s: float

    @property
    def folder(self) -> str:
        """The name of the folder of its prepared data and checkpoints."""
        return f"{self.name}-{self.recipe}"


class TrainingOptions(Config):
    """How a job trains, and where it keeps what its workers share."""

    work_folder: str | None = free(
        None,
        "folder all training nodes share; unset: below a local workspace, else a temporary one, and workers on the driver's node",
    )
    trainer: TrainerConfig = shaping(TrainerConfig, "training under Ray Train and DeepSpeed")

    def training_folder(self, workspace: Workspace, name: str) -> Path:
        """The folder for the prepared data and the checkpoints of the training `name`, which is also its run's name.

        If the folder is outside of the workspace, this notes it there.
        """
        if places := self._outside(workspace, name):
            note = f"{_staging(name)}/{_NOTE}"
            earlier = json.loads(workspace.store.get(note) or b"[]")
            workspace.store.put(note, json.dumps(sorted({*earlier, *places})).encode())
        return self._folder(workspace, name)

    def workers_node(self, workspace: Workspace, cluster: ClusterConfig) -> str | None:
        """The id of the node that workers have to be on, as only it has the training's folder; None if any will do.

        It is to be asked before anything is prepared. Raises UsageError if the workers do not fit on that node, and
        what `connect` raises.
        """
        if self.work_folder is not None or workspace.store.is_local or cluster.is_private:
            return None
        cluster.connect()
        return only_node(self.trainer, cluster.driver_cpus)

    def remove_training(self, workspace: Workspace, name: str) -> None:
        """Delete all that the training `name` kept, once its model is stored.

        What cannot be deleted is told, and is no error.
        """
        folder = self._folder(workspace, name)
        try:
            if self.trainer.storage:
                remove_checkpoints(self.trainer, name)
            if folder.exists():
                shutil.rmtree(folder)
            # Last, as the note of what lies outside is in it.
            workspace.store.delete_folder(_staging(name))
        except (OSError, ValueError, RaypipeError) as error:
            places = self._outside(workspace, name) or [str(folder)]
            say(
                f"The model is stored, and what its training kept could not be deleted: {error}. Delete it by hand: "
                f"{', '.join(places)}."
            )

    def trained_once(
        self, workspace: Workspace, tracking: Tracking, training: Training, train: Callable[[], Model]
    ) -> tuple[Model, str]:
        """The model that is stored, or that `train` stores now, and the job's status: "nothing_to_do" or "ok".

        Raises UnavailableError if another job trains models of that name.
        """
        with hold(workspace.store, [f"models-{training.name}"], training.job, training.lease_s):
            model, status = Models(workspace.store).newest(training.name, training.recipe), "nothing_to_do"
            if model is None:
                model, status = train(), "ok"
            else:
                self.remove_training(workspace, training.folder)  # a driver may have died before it did this
            tracking.register(model)
        return model, status

    def _folder(self, workspace: Workspace, name: str) -> Path:
        if self.work_folder is not None:
            return Path(self.work_folder) / name
        if workspace.store.is_local:
            return workspace.store.local_path(_staging(name))
        return Path(tempfile.gettempdir()) / "raypipe-training" / name

    def _outside(self, workspace: Workspace, name: str) -> list[str]:
        """The places outside of the workspace where the training `name` keeps files, in words."""
        places = []
        if self.work_folder is not None or not workspace.store.is_local:
            places.append(f"{self._folder(workspace, name).absolute()} on {socket.gethostname()}")
        if self.trainer.storage:
            places.append(f"{self.trainer.storage.rstrip('/')}/{name}-*")
        return places


def prepared_once(folder: Path, lm: Path | None, prepare: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Fill `folder` by `prepare`, unless this training did before it was interrupted, and return what was counted.

    Preparing many users takes long. The folder belongs to one recipe, so that it holds what would be prepared again.
    Only the place of the language model may differ, which all workers read from there: then the folder is filled again.
    """
    told = folder / _COUNTS
    if told.is_file() and (earlier := json.loads(told.read_text()))["lm"] == str(lm):
        return dict(earlier["counts"])
    told.unlink(missing_ok=True)
    counts = dict(prepare())
    written = told.with_suffix(".part")
    written.write_text(json.dumps({"lm": str(lm), "counts": counts}))
    written.replace(told)
    return counts


def trainings_outside(store: Store, folder: str = "staging") -> list[str]:
    """Where trainings that have not ended keep histories outside of the workspace.

    `folder` is that of one training, or holds those of all.
    """
    notes = [entry.path for entry in store.list(folder) if entry.path.endswith(f"/{_NOTE}")]
    return [place for note in notes for place in json.loads(store.read(note))]


def _staging(name: str) -> str:
    return f"staging/{name}"
