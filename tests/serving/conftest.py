"""A workspace with a release in force and a night of it in the online store, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from tests.made import make_ready
from tests.serving.spoken import give_words


@pytest.fixture(scope="session")
def ready_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("ready") / "workspace"
    make_ready(str(uri))
    assert main(["online", "--workspace", str(uri)]) == 0
    return uri


@pytest.fixture(scope="session")
def spoken_once(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `ready_once`, with a language model that nobody trained, and adapters between it and the recommender."""
    folder = tmp_path_factory.mktemp("spoken")
    uri = shutil.copytree(ready_once, folder / "workspace")
    give_words(str(uri), folder / "lm")
    return uri


@pytest.fixture(scope="module")
def spoken(spoken_once: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy for a module's tests that change nothing of it."""
    return str(shutil.copytree(spoken_once, tmp_path_factory.mktemp("spoken") / "workspace"))


@pytest.fixture
def speaking(spoken_once: Path, tmp_path: Path) -> str:
    """A copy for the test."""
    return str(shutil.copytree(spoken_once, tmp_path / "speaking"))


@pytest.fixture
def ready(ready_once: Path, tmp_path: Path) -> str:
    """A copy of the workspace for the test."""
    return str(shutil.copytree(ready_once, tmp_path / "ready"))


@pytest.fixture(scope="module")
def shared(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy for a module's tests that change nothing of it."""
    return str(shutil.copytree(ready_once, tmp_path_factory.mktemp("shared") / "ready"))
