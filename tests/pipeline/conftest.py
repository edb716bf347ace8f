"""A workspace that holds one night's log, made once and copied for each test that goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from tests.pipeline.small_logs import (
    CHAIN_ITEMS,
    CHAIN_TRAINING,
    SMALL_ITEMS,
    SMALL_LOG,
    chain_events,
    write_catalogue,
    write_log,
)


@pytest.fixture(scope="session")
def ingested_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    log = write_log(folder / "log.csv", SMALL_LOG)
    catalogue = write_catalogue(folder / "items.csv", SMALL_ITEMS)
    words = ["ingest", "--workspace", str(folder / "workspace"), "--tracking", "off", "--cluster.workers", "1"]
    words += ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    assert main(words) == 0
    return folder / "workspace"


@pytest.fixture(scope="session")
def summarised_once(ingested_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    uri = tmp_path_factory.mktemp("summarised") / "workspace"
    shutil.copytree(ingested_once, uri)
    words = ["summarize", "--workspace", str(uri), "--tracking", "off", "--cluster.workers", "1"]
    assert main([*words, "--engine.engine", "echo"]) == 0
    return uri


@pytest.fixture
def ingested(ingested_once: Path, tmp_path: Path) -> str:
    """A workspace of its own for the test: SMALL_LOG is ingested."""
    return str(shutil.copytree(ingested_once, tmp_path / "workspace"))


@pytest.fixture
def summarised(summarised_once: Path, tmp_path: Path) -> str:
    """As `ingested`, and every user has a summary by the echo engine."""
    return str(shutil.copytree(summarised_once, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def trained_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    log, catalogue = write_log(folder / "log.csv", chain_events()), write_catalogue(folder / "items.csv", CHAIN_ITEMS)
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    assert main(["ingest", *shared, *words, "--cluster.workers", "1"]) == 0
    assert main(["train", *shared, *CHAIN_TRAINING]) == 0
    return folder / "workspace"


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> str:
    """A workspace of its own for the test: the log of `chain_events`, and a sasrec that has learnt it."""
    return str(shutil.copytree(trained_once, tmp_path / "trained"))
