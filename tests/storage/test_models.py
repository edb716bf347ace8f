"""Content-addressed models: the same files are the same model, nothing executable is taken."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from raypipe.errors import UsageError
from raypipe.storage.model_users import forget_in_models, write_users
from raypipe.storage.models import Models
from raypipe.storage.store import Store

KEYS = np.array([-(2**61) + 5, 7, 2**60 + 9])
TASTES = np.array([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]], np.float32)


@pytest.fixture
def models(workspace_uri: str) -> Models:
    return Models(Store(workspace_uri))


def checkpoint(folder: Path, weights: bytes = b"\x00\x01", config: str = "{}") -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb")
    return folder


def test_the_same_files_are_the_same_model_and_other_files_another(models: Models, tmp_path: Path) -> None:
    first = models.add("lm", checkpoint(tmp_path / "a"), "recipe", {"seed": 1})
    again = models.add("lm", checkpoint(tmp_path / "b"), "recipe", {"seed": 1})
    other = models.add("lm", checkpoint(tmp_path / "c", weights=b"\x00\x02"), "recipe", {"seed": 1})
    assert first.hash == again.hash != other.hash
    assert [model.hash for model in models.all("lm")] == [first.hash, other.hash]
    assert first.folder == f"models/lm/{first.hash}"
    assert len(first.hash) == 32


def test_a_file_by_another_name_or_border_is_another_model(models: Models, tmp_path: Path) -> None:
    moved = checkpoint(tmp_path / "b")
    (moved / "tokenizer" / "vocab.txt").rename(moved / "vocab.txt")
    one = models.add("lm", checkpoint(tmp_path / "a"), "", {})
    assert models.add("lm", moved, "", {}).hash != one.hash


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pkl", "modeling.py", "nested.pt"])
def test_what_could_run_is_no_part_of_a_model(models: Models, tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "a")
    (folder / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=f"{name} cannot be part of a model"):
        models.add("lm", folder, "recipe", {})
    assert models.all("lm") == []


def test_the_newest_of_a_recipe_is_found(models: Models, tmp_path: Path) -> None:
    for number, recipe in enumerate(("old", "new", "new")):
        models.add("lm", checkpoint(tmp_path / str(number), weights=bytes([number])), recipe, {"number": number})
    newest = [models.newest("lm", recipe) for recipe in ("old", "new", None, "never")]
    assert [model.lineage["number"] if model else None for model in newest] == [0, 2, 2, None]
    assert models.newest("recommender") is None


def test_which_is_the_newest_survives_a_copy_of_the_workspace(tmp_path: Path) -> None:
    """Copied in another order than made, as object stores and `cp` do, so that files' times tell of the copy."""
    models = Models(Store(str(tmp_path / "workspace")))
    made = [models.add("lm", checkpoint(tmp_path / str(number), bytes([number])), "recipe", {}) for number in range(3)]
    again = models.add("lm", tmp_path / "0", "another recipe", {})
    shutil.copytree(tmp_path / "workspace", tmp_path / "copy")
    moment = time.time()
    for model in reversed(made):
        moment += 10
        os.utime(tmp_path / "copy" / model.folder / "model.json", (moment, moment))
    copy = Models(Store(str(tmp_path / "copy")))
    assert copy.all("lm") == models.all("lm") == [made[1], made[2], again]
    assert (again.hash, copy.newest("lm")) == (made[0].hash, again)


def test_a_fetched_model_is_a_local_folder_of_the_same_files(models: Models, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a")
    model = models.add("lm", source, "recipe", {})
    folder = models.fetch(model, tmp_path / "cache")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    assert models.fetch(model, tmp_path / "cache") == folder


def test_a_download_that_broke_off_is_not_taken_for_the_model(s3_uri: str, tmp_path: Path) -> None:
    models = Models(Store(s3_uri))
    model = models.add("lm", checkpoint(tmp_path / "a"), "recipe", {})
    folder = models.fetch(model, tmp_path / "cache")
    (folder.parent / "model.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert (models.fetch(model, tmp_path / "cache") / "model.safetensors").read_bytes() == b"\x00\x01"


def test_what_a_killed_download_left_a_day_ago_is_gone_with_the_next(s3_uri: str, tmp_path: Path) -> None:
    models = Models(Store(s3_uri))
    model = models.add("lm", checkpoint(tmp_path / "a"), "recipe", {})
    old, young = (tmp_path / "cache/lm" / name for name in (".download-old", ".download-young"))
    for folder in (old, young):
        (folder / "x").mkdir(parents=True)
    day_ago = time.time() - 90_000
    os.utime(old, (day_ago, day_ago))
    models.fetch(model, tmp_path / "cache")
    assert (old.exists(), young.exists()) == (False, True)


def test_who_comes_second_leaves_the_files_alone_that_the_first_reads(s3_uri: str, tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class SlowStore(Store):
        def download(self, path: str, target: Path) -> None:
            begun.set()
            assert goes_on.wait(60)
            super().download(path, target)

    def files() -> dict[str, tuple[int, int, int]]:
        stats = {str(path): path.stat() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
        return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    models = Models(Store(s3_uri))
    model = models.add("lm", checkpoint(tmp_path / "a"), "recipe", {})
    with ThreadPoolExecutor(1) as second:
        late = second.submit(Models(SlowStore(s3_uri)).fetch, model, tmp_path / "cache")
        assert begun.wait(60)
        folder = models.fetch(model, tmp_path / "cache")
        before = files()
        goes_on.set()
        assert late.result() == folder
    assert files() == before
    assert len(before) == 4
    assert [path.name for path in (tmp_path / "cache" / "lm").iterdir()] == [model.hash]


def test_a_model_without_its_card_was_never_finished(models: Models, tmp_path: Path) -> None:
    model = models.add("lm", checkpoint(tmp_path / "a"), "recipe", {})
    models.store.delete([f"{model.folder}/model.json"])
    assert models.newest("lm") is None


def with_users(folder: Path, tastes: np.ndarray = TASTES) -> Path:
    write_users(checkpoint(folder), {"keys": KEYS, "tastes": tastes})
    return folder


def files_with(models: Models, cache: Path, data: bytes) -> list[str]:
    """Where in the workspace and on this machine's copies the bytes are."""
    stored = [entry.path for entry in models.store.list("models") if data in models.store.read(entry.path)]
    return stored + [str(path) for path in cache.rglob("*") if path.is_file() and data in path.read_bytes()]


def test_who_is_forgotten_is_in_no_file_of_a_model_that_keeps_its_name(models: Models, tmp_path: Path) -> None:
    model = models.add("guided", with_users(tmp_path / "a"), "recipe", {})
    folder = models.fetch_unharmed(model, tmp_path / "cache")
    hers = KEYS[1].tobytes()
    assert files_with(models, tmp_path / "cache", hers) == [f"{model.folder}/users.safetensors"]
    assert forget_in_models(models.store, np.array([7, 8])) == 1
    assert files_with(models, tmp_path / "cache", hers) == []
    assert files_with(models, tmp_path / "cache", TASTES[1].tobytes()) == []
    rows = models.users(model)
    assert rows is not None
    assert {name: values.tolist() for name, values in rows.items()} == {
        "keys": [KEYS[0], KEYS[2]],
        "tastes": [[1.5, 2.5], [5.5, 6.5]],
    }
    assert models.newest("guided") == model
    assert models.fetch_unharmed(model, tmp_path / "cache") == folder
    assert forget_in_models(models.store, np.array([7, 8])) == 0


def test_models_that_differ_in_their_users_alone_are_two(models: Models, tmp_path: Path) -> None:
    one = models.add("guided", with_users(tmp_path / "a"), "recipe", {})
    again = models.add("guided", with_users(tmp_path / "b"), "recipe", {})
    other = models.add("guided", with_users(tmp_path / "c", TASTES + 1), "recipe", {})
    assert one.hash == again.hash != other.hash
    assert models.users(models.add("lm", checkpoint(tmp_path / "d"), "recipe", {})) is None


def test_rows_of_users_that_are_gone_or_damaged_are_told(models: Models, tmp_path: Path) -> None:
    model = models.add("guided", with_users(tmp_path / "a"), "recipe", {})
    path = f"{model.folder}/users.safetensors"
    whole = models.store.read(path)
    for harmed in (whole[:-1], whole[:-1] + b"\x00", whole.replace(b'"tastes"', b'"TASTES"'), b"", save(load(whole))):
        models.store.put(path, harmed)
        with pytest.raises(UsageError, match=r"users\.safetensors is damaged"):
            models.users(model)
    models.store.delete([path])
    with pytest.raises(UsageError, match="keeps of its users is gone"):
        models.users(model)
