"""A workspace with a release in force and a night of it in the online store, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from tests.made import make_ready
from tests.serving.lm_release import add_lm_release


@pytest.fixture(scope="session")
def ready_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("ready") / "workspace"
    make_ready(str(uri))
    assert main(["online", "--workspace", str(uri)]) == 0
    return uri


@pytest.fixture(scope="session")
def ready_lm_once(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `ready_once`, with a language model that nobody trained, and adapters between it and the recommender."""
    folder = tmp_path_factory.mktemp("ready_lm")
    uri = shutil.copytree(ready_once, folder / "workspace")
    add_lm_release(str(uri), folder / "lm")
    return uri


@pytest.fixture(scope="module")
def shared_lm(ready_lm_once: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy for a module's tests that change nothing of it."""
    return str(shutil.copytree(ready_lm_once, tmp_path_factory.mktemp("shared_lm") / "workspace"))


@pytest.fixture
def ready_lm(ready_lm_once: Path, tmp_path: Path) -> str:
    """A copy for the test."""
    return str(shutil.copytree(ready_lm_once, tmp_path / "ready_lm"))


@pytest.fixture
def ready(ready_once: Path, tmp_path: Path) -> str:
    """A copy of the workspace for the test."""
    return str(shutil.copytree(ready_once, tmp_path / "ready"))


@pytest.fixture(scope="module")
def shared(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy for a module's tests that change nothing of it."""
    return str(shutil.copytree(ready_once, tmp_path_factory.mktemp("shared") / "ready"))
