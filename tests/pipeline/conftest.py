"""A workspace that holds one night's log, made once and copied for each test that goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.templates import Templates
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.candidate_facts import FORM
from raypipe.systems.explainer_prompts import ExplainerPrompts
from raypipe.systems.interpreter_prompts import InterpreterPrompts
from raypipe.systems.trsr import TrsrConfig
from tests.made import make_ready
from tests.pipeline.ranked_logs import RANKED_TRAINING, TERSE, ranked_events, ranked_titles
from tests.pipeline.small_logs import (
    CHAIN_ITEMS,
    CHAIN_TRAINING,
    SMALL_ITEMS,
    SMALL_LOG,
    chain_events,
    write_catalogue,
    write_log,
)
from tests.pipeline.two_nights import run_two_nights
from tests.untrained import OF_LM


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


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> str:
    """A workspace of its own for the test: the log of `chain_events`, and a sasrec that has learnt it."""
    return str(shutil.copytree(trained_once, tmp_path / "trained"))


@pytest.fixture(scope="session")
def joined_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains of 120 users, a recommender that has learnt them, and an untrained language model with a word for every title."""
    folder = tmp_path_factory.mktemp("chains")
    log = write_log(folder / "log.csv", chain_events(120))
    catalogue = write_catalogue(folder / "items.csv", CHAIN_ITEMS)
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    assert main(["ingest", *shared, *words, "--cluster.workers", "1"]) == 0
    assert main(["train", *shared, *CHAIN_TRAINING]) == 0
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, *asked_templates()] * 5, titles, [], 900)
    save_untrained(folder / "lm", BuiltinLmConfig(size="small", context=128), tokenizer)
    Models(Store(str(folder / "workspace"))).add("lm", folder / "lm", "untrained", OF_LM)
    return folder / "workspace"


def asked_templates() -> list[str]:
    """Every template of the systems, so that a tokenizer knows their words."""
    prompts = (InterpreterPrompts(), ExplainerPrompts())
    sets = [getattr(one, name) for one in prompts for name in type(one).model_fields]
    return [template for mine in sets if isinstance(mine, Templates) for template in (*mine.training, *mine.test)]


def ready_beside(folder: Path, lm: Path) -> str:
    """A workspace in `folder` with chains, an untrained recommender, and the untrained `lm` as its own language model."""
    uri = str(folder / "workspace")
    make_ready(uri)
    Models(Store(uri)).add("lm", lm, "untrained", OF_LM)
    return uri


@pytest.fixture
def titled_lm(tmp_path: Path) -> Path:
    """An untrained language model whose tokenizer knows the chains' titles and the systems' templates."""
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, *asked_templates()] * 5, titles, [], 900)
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny", context=256), tokenizer)
    return tmp_path / "lm"


@pytest.fixture
def with_lm(joined_once: Path, tmp_path: Path) -> str:
    """A copy of the workspace for the test."""
    return str(shutil.copytree(joined_once, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def two_nights_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remembered")
    run_two_nights(folder)
    return folder / "workspace"


@pytest.fixture
def two_nights(two_nights_once: Path, tmp_path: Path) -> str:
    """A copy of a workspace with every table filled."""
    return str(shutil.copytree(two_nights_once, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def ranked_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a recommender, recurrent summaries of what is before the cut, and an untrained language model."""
    folder = tmp_path_factory.mktemp("ranked")
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    log = write_log(folder / "log.csv", ranked_events())
    words = ["--log.path", str(log), "--log.columns.time", "time", "--cluster.workers", "1"]
    words += ["--catalogue.path", str(write_catalogue(folder / "items.csv", ranked_titles()))]
    assert main(["ingest", *shared, *words]) == 0
    assert main(["train", *shared, *RANKED_TRAINING]) == 0
    summaries = ["--summaries.paradigm", "recurrent", "--summaries.hold_out", "1", "--cluster.workers", "1"]
    assert main(["summarize", *shared, "--engine.engine", "echo", *summaries]) == 0
    facts = [FORM.replace("{}", str(number)) for number in range(10)]
    texts = [*ranked_titles().values(), TERSE, TrsrConfig().prompt, " yes no NULL title: genre: Drama", *facts]
    tokenizer = train_tokenizer([" ".join(texts)] * 5, ["yes", "no"], [], 700)
    save_untrained(folder / "lm", BuiltinLmConfig(size="tiny", context=512), tokenizer)
    Models(Store(str(folder / "workspace"))).add("lm", folder / "lm", "untrained", OF_LM)
    return folder / "workspace"


@pytest.fixture
def ranked(ranked_once: Path, tmp_path: Path) -> str:
    """A copy of the workspace for the test."""
    return str(shutil.copytree(ranked_once, tmp_path / "ranked"))
