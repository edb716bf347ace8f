"""`align` on a log in which every item is followed by the next: the state tells the history, and words can tell it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raypipe.cli.main import main
from raypipe.language.adapters import read_card
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.recinterpreter import InterpreterPrompts
from tests.conftest import Run
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_TRAINING, chain_events, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
SMALL = (
    *("--interpreter.titles", "3", "--held_out_share", "0.25", "--lora.rank", "16", "--lora.dropout", "0"),
    *("--trainer.epochs", "6", "--trainer.lr", "0.005", "--trainer.batch_size", "16", "--trainer.device", "cpu"),
    *(
        "--decoding.max_new_tokens",
        "24",
    ),
)


@pytest.fixture(scope="module")
def joined_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains of 120 users, a recommender that has learnt them, and an untrained language model with a word for every title."""
    folder = tmp_path_factory.mktemp("chains")
    log = write_log(folder / "log.csv", chain_events(120))
    catalogue = write_catalogue(folder / "items.csv", CHAIN_ITEMS)
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    assert main(["ingest", *shared, *words, "--cluster.workers", "1"]) == 0
    assert main(["train", *shared, *CHAIN_TRAINING]) == 0
    prompts = InterpreterPrompts()
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    tokenizer = train_tokenizer([*titles, *prompts.recovery, *prompts.residual] * 5, titles, [], 600)
    save_untrained(folder / "lm", BuiltinLmConfig(size="small", context=128), tokenizer)
    Models(Store(str(folder / "workspace"))).add("lm", folder / "lm", "untrained", {})
    return folder / "workspace"


@pytest.fixture
def with_lm(joined_once: Path, tmp_path: Path) -> str:
    """A copy of the workspace for the test."""
    return str(shutil.copytree(joined_once, tmp_path / "workspace"))


def test_words_tell_the_history_of_users_nobody_trained_on_and_controls_do_not(raypipe: Run, with_lm: str) -> None:
    ended = raypipe("align", "--workspace", with_lm, *SMALL)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    metrics = ended.metrics
    assert metrics["left_out"] == 0
    # Its recommender saw everybody, and the figures say so.
    assert metrics["unseen_by_both"] == 0
    assert "sasrec and lm may have been trained on users who are asked about here" in ended.stderr
    assert metrics["recovery"] > 0.35
    assert metrics["residual"] > 0.25
    for control in ("no states", "shuffled states"):
        assert metrics[f"{control}: recovery"] < 0.5 * metrics["recovery"]
        assert metrics[f"{control}: residual"] < 0.5 * metrics["residual"]
    store = Store(with_lm)
    model = Models(store).newest("recinterpreter")
    assert model is not None
    card = read_card(store.local_path(f"{model.folder}/checkpoint"))
    assert card.recommender.startswith("sasrec/")
    again = raypipe("align", "--workspace", with_lm, *SMALL)
    assert (again.status, again.result["models"]) == ("nothing_to_do", ended.result["models"])
    assert again.metrics == metrics


def test_what_cannot_be_joined_is_told_before_work_starts(raypipe: Run, with_lm: str) -> None:
    nobody = raypipe("align", "--workspace", with_lm, "--held_out_share", "0.0001")
    assert (nobody.code, nobody.status) == (2, "failed")
    assert "are held out, and one side has no history of two events" in nobody.stderr
    unknown = raypipe("align", "--workspace", with_lm, "--model", "gru4rec")
    assert "No model gru4rec is stored" in unknown.stderr
    lora = raypipe("align", "--workspace", with_lm, *SMALL, "--lora.targets", '["c_attn"]')
    assert lora.code == 2
    assert "c_attn" in lora.stderr
