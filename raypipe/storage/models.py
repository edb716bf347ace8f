"""Content-addressed models: `models/<name>/<hash>/checkpoint/` holds safetensors, JSON and text, nothing executable.

The hash covers the files' bytes, so the same weights are the same model wherever they were trained. `model.json` lies
beside the checkpoint and is written last; it holds the lineage (data versions, seeds, protocol). What a model keeps of
single users also lies beside the checkpoint (`storage/model_users.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.model_users import FIRST_STORED, USERS, Rows, first_stored, pack, read_users, unpack
from raypipe.storage.store import Store

_ALLOWED = {".safetensors", ".json", ".txt", ".jinja", ".model", ".md"}
_CARD = "model.json"
_SMALL = 1 << 20
_CHUNK = 1 << 24
_DOWNLOAD = ".download-"
_KILLED_S = 86_400.0  # a download older than a day was killed


@dataclass(frozen=True)
class Model:
    """One stored model. `created` is the time at which it was last added, in Unix seconds."""

    name: str
    hash: str
    recipe: str
    lineage: Mapping[str, Any]
    created: float

    @property
    def folder(self) -> str:
        return f"models/{self.name}/{self.hash}"


class Models:
    """The models of a workspace."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, name: str, files: Path, recipe: str, lineage: Mapping[str, Any]) -> Model:
        """Store the files of a checkpoint folder under the hash of their content, as the newest model of that name.

        The hash also covers the digest of the rows of users. `recipe` is the fingerprint of what made the model. Raises
        UsageError on a file that is neither weights nor text.
        """
        if (users := read_users(files)) is not None:
            (files / FIRST_STORED).write_text(first_stored(users))
        paths = [path for path in _files(files) if path != files / USERS]
        model = Model(name, _content_hash(files, paths), recipe, dict(lineage), time.time())
        for path in paths:
            self.store.put(f"{model.folder}/checkpoint/{path.relative_to(files)}", path.read_bytes())
        if users is not None:
            self.store.put(f"{model.folder}/{USERS}", pack(users))
        self.store.put(f"{model.folder}/{_CARD}", canonical_json(asdict(model)).encode())
        return model

    def names(self) -> list[str]:
        return self.store.folders("models")

    def mentions(self, model: Model) -> str:
        """The text in which a model names other models that it needs.

        It is the model's lineage and the small JSON files of its checkpoint.
        """
        entries = self.store.list(f"{model.folder}/checkpoint")
        small = [entry.path for entry in entries if entry.path.endswith(".json") and entry.size < _SMALL]
        return "\n".join([canonical_json(dict(model.lineage)), *(self.store.read(path).decode() for path in small)])

    def remove(self, model: Model) -> None:
        """Delete a model. Its `model.json` goes first, so that a partly deleted model is never found."""
        self.store.delete([f"{model.folder}/{_CARD}"])
        self.store.delete_folder(model.folder)

    def all(self, name: str) -> list[Model]:
        """Every complete model of that name, oldest first."""
        entries = [entry for entry in self.store.list(f"models/{name}") if entry.path.endswith(f"/{_CARD}")]
        found = [Model(**json.loads(self.store.read(entry.path))) for entry in entries]
        return sorted(found, key=lambda model: (model.created, model.hash))

    def newest(self, name: str, recipe: str | None = None) -> Model | None:
        """The newest model of that name, and of `recipe` if it is given. None if there is none."""
        found = [model for model in self.all(name) if recipe is None or model.recipe == recipe]
        return found[-1] if found else None

    def users(self, model: Model) -> Rows | None:
        """What the model keeps of single users now, without forgotten users; None for a model that never kept any.

        Raises UsageError if that is gone or damaged.
        """
        path = f"{model.folder}/{USERS}"
        if (data := self.store.get(path)) is not None:
            return unpack(data, self.store.object_uri(path))
        if self.store.exists(f"{model.folder}/checkpoint/{FIRST_STORED}"):
            raise UsageError(
                f"What the model {model.name}/{model.hash[:12]} keeps of its users is gone: there is no {path}.",
                "Restore it from a backup, or make the model again.",
            )
        return None

    def fetch_unharmed(self, model: Model, cache: Path) -> Path:
        """Do the same as `fetch`, and raise UsageError if the files are not byte for byte those that were stored."""
        folder = self.fetch(model, cache)
        if _content_hash(folder, _files(folder)) != model.hash:
            raise UsageError(
                f"The files of the model {model.name}/{model.hash[:12]} are not those that were stored: somebody changed them.",
                f"Restore {model.folder} from a backup, and delete {folder} where it is a copy.",
            )
        return folder

    def fetch(self, model: Model, cache: Path) -> Path:
        """The checkpoint as a local folder, downloaded into `cache` if the workspace is on an object store.

        Several processes may share a cache: the folder is there whole or not at all, and its files never change. The
        rows of users do change, so they are never in it.
        """
        if self.store.is_local:
            return self.store.local_path(f"{model.folder}/checkpoint")
        target = cache / model.name / model.hash
        if not (target / _CARD).exists():
            shutil.rmtree(target, ignore_errors=True)  # the folder is incomplete: something else left it
            self._download(model, target)
        return target / "checkpoint"

    def _download(self, model: Model, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{_DOWNLOAD}*"):
            with contextlib.suppress(OSError):  # another process was first
                if time.time() - left.stat().st_mtime > _KILLED_S:
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_DOWNLOAD) as beside:
            whole = Path(beside, model.hash)
            for entry in self.store.list(model.folder):
                if entry.path == f"{model.folder}/{USERS}":
                    continue
                path = whole / entry.path.removeprefix(f"{model.folder}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                self.store.download(entry.path, path)
            try:
                whole.rename(target)
            except OSError:
                if not (target / _CARD).exists():  # else another process was first
                    raise


def find_model(models: Models, named: str, fits: Callable[[Model], bool] = lambda model: True) -> Model:
    """The model NAME/HASH, or the newest model of NAME that `fits`. Raises UsageError if there is none."""
    name, _, wanted = named.partition("/")
    found = [model for model in models.all(name) if model.hash.startswith(wanted) and (wanted or fits(model))]
    if not found:
        raise UsageError(
            f"No model {named} is stored in this workspace.",
            "Train a recommender with `raypipe train`, an adapter with `raypipe align`.",
        )
    return found[-1]


def find_adapter(models: Models, named: str, system: str) -> Model:
    """The model that `find_model` finds, if `align` made it by `system`. Raises UsageError for any other model."""
    model = find_model(models, named)
    made_by = model.lineage.get("system")
    if made_by != system:
        raise UsageError(
            f"The model {model.name}/{model.hash} is {'no adapter' if made_by is None else f'one of the system {made_by}'}, and "
            f"one of {system} is asked for.",
            f"Name one made by `raypipe align --system {system}`.",
        )
    return model


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, sorted; raises UsageError on one that is neither weights nor text."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        if path.suffix not in _ALLOWED:
            raise UsageError(
                f"{path.name} cannot be part of a model.", "Models hold safetensors, JSON and text files only."
            )
    return paths


def _content_hash(folder: Path, paths: Sequence[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for chunk in iter(partial(file.read, _CHUNK), b""):
                state.update(chunk)
    return state.hexdigest()[:32]
