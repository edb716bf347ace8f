"""`align --system lancer` on a log in which every item is followed by the next, and on the data of another workspace."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from raypipe.cli.main import main
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline import lancer
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from raypipe.systems.lancer_examples import LancerTrainingData
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.small_logs import (
    CHAIN_ITEMS,
    GENRES,
    START,
    chain_events,
    histories_of,
    newest,
    write_catalogue,
    write_log,
)
from tests.untrained import OF_LM

pytestmark = pytest.mark.usefixtures("ray_cluster")
USERS = 120
SMALL = (
    *("--system", "lancer", "--lancer.shown", "2", "--lancer.reads", "3", "--lancer.learnt", "4"),
    *("--lancer.virtual_tokens", "4", "--lancer.text_characters", "0", "--lancer.beams", "5"),
    *("--lancer.first_epochs", "20", "--lancer.prompts.line", "{title}", "--no-lancer.filter_seen"),
    *("--lancer.prompts.perturbed", '[{"lead": "Titles:"}]', "--hold_out", "2", "--held_out_share", "0.1"),
    *("--answer_tokens", "16", "--trainer.batch_size", "16", "--trainer.lr", "0.004", "--trainer.warmup_steps", "5"),
    *("--trainer.device", "cpu"),
)
TRAINED = (*SMALL, "--trainer.epochs", "10", "--trainer.validate_every", "5")


@pytest.fixture(scope="session")
def chains_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains of 120 users, and a language model that is not trained."""
    folder = tmp_path_factory.mktemp("lancer")
    log = write_log(folder / "log.csv", chain_events(USERS))
    catalogue = write_catalogue(folder / "items.csv", CHAIN_ITEMS)
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(catalogue)]
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off", "--cluster.workers", "1"]
    assert main(["ingest", *shared, *words]) == 0
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    lines = [f" {title} -> A person chose, oldest first: title: genre: {', '.join(GENRES)}" for title in titles]
    save_untrained(
        folder / "lm", BuiltinLmConfig(size="small", context=128), train_tokenizer(lines * 3, titles, [], 600)
    )
    return folder


def copy_of(folder: Path, to: Path, **lineage: object) -> str:
    """The workspace; `lineage` says what the language model has seen."""
    uri = str(shutil.copytree(folder / "workspace", to / "workspace"))
    Models(Store(uri)).add("lm", folder / "lm", "untrained", {**OF_LM, **lineage})
    return uri


@pytest.fixture
def chains(chains_once: Path, tmp_path: Path) -> str:
    """Whose language model has seen nobody's last two events, and a tenth of the users not at all."""
    return copy_of(chains_once, tmp_path, hold_out=2, held_out_share=0.1)


def following(item: str) -> str:
    return f"i{int(item[1:]) % CHAIN_ITEMS + 1}"


def test_what_comes_next_is_written_and_a_stored_model_is_asked_anew_here_and_elsewhere(
    raypipe: Run, chains: str, tmp_path: Path
) -> None:
    before = Models(Store(chains)).all("lm")[0].hash
    ended = raypipe("align", "--workspace", chains, *TRAINED)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    metrics = ended.metrics
    assert metrics["asked"] == USERS
    assert metrics["first_loss_last"] < metrics["first_loss_first"]
    assert metrics["Recall@5"] > 0.8
    assert metrics["Recall@5"] > metrics["popularity: Recall@5"] + 0.4
    # Who was never trained on is told the same: what follows what is everybody's.
    assert metrics["Recall@5 unseen users"] > 0.6
    assert metrics["Recall@5 length 1–10"] == metrics["Recall@5"]
    assert {"transitions: NDCG@5", "perturbed 1: Recall@5", "shuffled items: Recall@5"} <= set(metrics)
    assert metrics["grounding exact@1"] > 0.8
    assert Models(Store(chains)).all("lm")[0].hash == before
    again = raypipe("align", "--workspace", chains, *TRAINED)
    assert (again.status, again.result["models"]) == ("nothing_to_do", ended.result["models"])
    assert again.metrics == metrics
    widths = ended.result["intervals"]
    assert again.result["intervals"] == widths
    # Where all are hit there is no interval, and none is wider than that of yes and no.
    for name in ("Recall@5", "Recall@5 length 1–10", "popularity: Recall@5", "shuffled items: Recall@5"):
        hits = metrics[name]
        assert (name in widths) == (0 < hits < 1), name
        assert widths.get(name, 0) <= 1.01 * 1.96 * (hits * (1 - hits) / (USERS - 1)) ** 0.5, name
    # Everybody is asked, and no list is like another's.
    assert (metrics["askable"], metrics["coverage@10"] > 0.8) == (USERS, True)
    assert 0 < metrics["diversity@10"] < 1
    page = raypipe("report", "--workspace", chains, "--dataset", "chains").metrics["tables"]
    table = Path(page).read_text()
    floor = "popularity: Recall@5"
    assert f" {metrics[floor]:.4f} ± {widths[floor]:.4f} |" in table
    assert "### Beyond accuracy: leave-one-out, whole catalogue, seen items kept" in table

    held = raypipe("align", "--workspace", chains, *TRAINED, "--adapter", "lancer", "--lancer.constrained")
    assert held.result["models"] == ended.result["models"]
    assert (held.metrics["grounding exact@5"], held.metrics["grounding guessed"]) == (1.0, 0)
    assert held.metrics["Recall@5"] >= metrics["Recall@5"] - 0.05

    # The night's batch asks the same engine: what follows everybody's last event, and nothing where nothing changed.
    lists = ("recommend", "--workspace", chains, "--model", "lancer", "--length", 3, "--answer_tokens", 16)
    assert raypipe(*lists, "--no-filter_seen").status == "ok"
    rows = newest(chains, "recommendations").to_pylist()
    assert {row["variant"] for row in rows} == {"recommend-lancer"}
    ids = newest(chains, "items").sort_by("index")["item_id"].to_pylist()
    right = [ids[row["items"][0] - 1] == following(histories_of(chains)[row["user_id"]][-1][0]) for row in rows]
    assert (len(right), np.mean(right) > 0.7) == (USERS, True)
    assert all(row["scores"] == sorted(row["scores"], reverse=True) and max(row["scores"]) <= 0 for row in rows)
    assert raypipe(*lists, "--no-filter_seen").status == "nothing_to_do"
    few = raypipe(*lists, "--sample", 7)
    assert few.metrics["computed"] == 7

    # The same chains in another order: what it has learnt of titles does not help there.
    other = str(tmp_path / "other")
    order = np.random.default_rng(0).permutation(CHAIN_ITEMS) + 1
    titles = {f"i{n}": f"Title {order[n - 1]}" for n in range(1, CHAIN_ITEMS + 1)}
    log = write_log(tmp_path / "log.csv", chain_events(USERS))
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path")
    assert raypipe("ingest", "--workspace", other, *words, write_catalogue(tmp_path / "other.csv", titles)).code == 0
    home = ("--adapter", "lancer", "--adapter_workspace", chains)
    moved = raypipe("align", "--workspace", other, *TRAINED, *home)
    assert moved.code == 0, moved.stderr
    assert moved.metrics["Recall@5"] < 0.5 * metrics["Recall@5"]
    assert moved.metrics["transitions: Recall@5"] == metrics["transitions: Recall@5"]
    assert Models(Store(other)).all("lancer") == []
    wrong = raypipe("align", "--workspace", chains, *TRAINED, "--adapter", "lm")
    assert (wrong.code, "and one of lancer is asked for" in one_paragraph(wrong.stderr)) == (2, True)


def test_a_unique_last_title_is_in_nothing_that_is_learnt(
    raypipe: Run, chains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = chain_events(20)
    last = [(user, "last", START + 10**9) for user in {user for user, _, _ in events}]
    uri = str(tmp_path / "planted")
    titles = {f"i{n}": f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)} | {"last": "Only The Future Holds This"}
    log, catalogue = write_log(tmp_path / "log.csv", [*events, *last]), write_catalogue(tmp_path / "items.csv", titles)
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", uri, *words).code == 0
    learnt: list[LancerTrainingData] = []
    floors: list[Histories] = []
    prepare, popularity = lancer.prepare_lancer, lancer.Popularity

    def watched(folder, told, *rest):
        learnt.append(told)
        return prepare(folder, told, *rest)

    def counted(training, items):
        floors.append(training)
        return popularity(training, items)

    monkeypatch.setattr(lancer, "prepare_lancer", watched)
    monkeypatch.setattr(lancer, "Popularity", counted)
    lm = Models(Store(chains)).all("lm")[0]
    few = ("--lm", Store(chains).local_path(f"{lm.folder}/checkpoint"), "--trainer.steps", "2", "--lancer.first_epochs")
    ended = raypipe("align", "--workspace", uri, *SMALL, "--hold_out", "1", *few, "0", "--held_out_share", "0")
    assert ended.code == 0, ended.stderr
    planted = CHAIN_ITEMS + 1
    assert learnt[0].lines[planted - 1] == "Only The Future Holds This"
    assert (len(learnt[0].histories.items), planted in learnt[0].histories.items) == (20 * 9, False)
    assert planted not in floors[0].items
    assert ended.metrics["popularity: Recall@5"] == 0
    # Whatever is asked, nobody is asked about another event than the last.
    assert ended.metrics["Recall@5 cold items"] == ended.metrics["Recall@5"]


def test_what_would_tell_of_the_future_is_refused(raypipe: Run, chains_once: Path, tmp_path: Path) -> None:
    with_lm = copy_of(chains_once, tmp_path, hold_out=0, held_out_share=0.0)
    seen = raypipe("align", "--workspace", with_lm, *TRAINED)
    assert seen.code == 2
    assert "may have read all but the last 0 events of every user, and 2" in one_paragraph(seen.stderr)
    everything = raypipe("align", "--workspace", with_lm, *SMALL, "--hold_out", "0")
    assert (everything.code, "none is left to ask for" in one_paragraph(everything.stderr)) == (2, True)
    validated = raypipe("align", "--workspace", with_lm, *TRAINED, "--hold_out", "1")
    assert (validated.code, "training would see it" in one_paragraph(validated.stderr)) == (2, True)
