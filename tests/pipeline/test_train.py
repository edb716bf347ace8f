"""`train` and `evaluate` on a log with a planted answer: every item is followed by the next one of the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.metrics import published
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.task import prepare_training
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Models
from raypipe.storage.store import Store
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.small_logs import START, write_catalogue, write_log
from tests.untrained import store_untrained

ITEMS = 30
SMALL = (
    *("--recommender.width", 16, "--recommender.hidden", 32, "--recommender.max_length", 12),
    *("--recommender.dropout", 0, "--trainer.batch_size", 16, "--trainer.lr", 0.01, "--trainer.warmup_steps", 5),
    *("--trainer.epochs", 8, "--trainer.device", "cpu"),
)


def chain_log(files: Path, users: int, length: int) -> tuple[Path, Path]:
    starts = np.random.default_rng(0).integers(0, ITEMS, users)
    events = [
        (f"u{user}", f"i{(int(start) + step) % ITEMS + 1}", START + step)
        for user, start in enumerate(starts)
        for step in range(length)
    ]
    return write_log(files / "log.csv", events), write_catalogue(files / "items.csv", ITEMS)


def ingest_chains(raypipe: Run, uri: str, files: Path, users: int = 80, length: int = 9) -> None:
    log, catalogue = chain_log(files, users, length)
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", uri, *words).code == 0


@pytest.fixture
def chains(ray_cluster: None, raypipe: Run, tmp_path: Path, files: Path) -> str:
    uri = str(tmp_path / "workspace")
    ingest_chains(raypipe, uri, files)
    return uri


def test_a_planted_answer_is_learnt_stored_evaluated_and_not_trained_twice(raypipe: Run, chains: str) -> None:
    trained = raypipe("train", "--workspace", chains, *SMALL)
    assert (trained.code, trained.status) == (0, "ok"), trained.stderr
    assert (trained.metrics["users"], trained.metrics["events"]) == (80, 80 * 7)
    assert trained.metrics["validation_ndcg"] > 0.9
    assert "validation 0." in trained.stderr
    again = raypipe("train", "--workspace", chains, *SMALL)
    assert (again.status, again.result["models"]) == ("nothing_to_do", trained.result["models"])

    store = Store(chains)
    models = Models(store)
    model = models.newest("sasrec")
    assert model is not None
    assert model.lineage["hold_out"] == 2
    recommender, card = load_recommender(store.local_path(f"{model.folder}/checkpoint"))
    assert (recommender.items, card.catalogue["items"]) == (ITEMS, ITEMS)
    told = store.local_path(f"{model.folder}/checkpoint/README.md").read_text()
    assert "validation NDCG@10" in told
    assert '"width": 16' in told

    ended = raypipe("evaluate", "--workspace", chains)
    assert ended.code == 0, ended.stderr
    assert ended.metrics["sasrec.HR@10"] > 0.95
    assert ended.metrics["sasrec.NDCG@10"] > ended.metrics["popularity.NDCG@10"] + 0.5
    # What follows what is the whole secret of this log.
    assert ended.metrics["transitions.HR@10"] == 1.0
    assert "80 users, the whole catalogue, history: last 12 items, loss: softmax" in ended.stderr

    some = raypipe("evaluate", "--workspace", chains, "--asked", 30)
    assert some.stderr.startswith("30 users, the whole catalogue")
    assert some.metrics["sasrec.HR@10"] > 0.9
    protocols = {one.protocol.split(", whole")[0] for one in Evaluations(store).all()}
    assert protocols == {"leave-one-out", "leave-one-out, 30 of 80 users"}

    told = raypipe("report", "--workspace", chains)
    assert told.code == 0, told.stderr
    page = store.local_path("reports/report.html").read_text()
    assert f"<b>{ended.metrics['sasrec.NDCG@10']:.4f}</b><small>± " in page
    assert "Training loss of SASRec, seed 0" in page
    assert "Validation of SASRec, seed 0" in page


def test_published_figures_of_the_data_stand_beside_ours(raypipe: Run, chains: str, monkeypatch) -> None:
    raypipe("train", "--workspace", chains, *SMALL, "--trainer.epochs", 1)
    known = published.Published({"NDCG@10": 0.4321}, "somebody, somewhere", "some loss")
    monkeypatch.setitem(published.DATA_SETS, (80, 720), "chains")
    monkeypatch.setitem(published._FIGURES, ("chains", "sasrec"), known)
    evaluated = raypipe("evaluate", "--workspace", chains)
    assert evaluated.metrics["published.NDCG@10"] == 0.4321
    assert "0.4321" in evaluated.stderr
    assert "published: somebody, somewhere; some loss" in evaluated.stderr


def test_nothing_held_out_is_in_what_training_reads(raypipe: Run, chains: str, monkeypatch) -> None:
    from raypipe.recommenders import task

    seen = []
    prepare = task.prepare_training

    def watched(folder, histories, held, *rest, **named):
        seen.append((histories, held))
        raise ValueError("enough")

    monkeypatch.setattr("raypipe.pipeline.train.prepare_training", watched)
    assert raypipe("train", "--workspace", chains, *SMALL).code == 2
    assert prepare is not watched
    ((histories, held),) = seen
    # Events 1…7 train, 8 validates, 9 is for evaluation.
    assert set(histories.lengths) == {7}
    last = histories.items[histories.ends - 1]
    assert (held == last % ITEMS + 1).all()


def test_events_of_one_time_are_told_to_training(
    ray_cluster: None, raypipe: Run, tmp_path: Path, files: Path, monkeypatch
) -> None:
    uri = str(tmp_path / "workspace")
    events = [(f"u{user}", f"i{n + 1}", START + n // 2) for user in range(20) for n in range(8)]
    words = ("--log.path", write_log(files / "log.csv", events), "--log.columns.time", "time")
    catalogue = write_catalogue(files / "items.csv", ITEMS)
    assert raypipe("ingest", "--workspace", uri, *words, "--catalogue.path", catalogue).code == 0
    told = []

    def watched(*given, **named):
        told.append(given[-1])
        return prepare_training(*given, **named)

    monkeypatch.setattr("raypipe.pipeline.train.prepare_training", watched)
    short = (*SMALL, "--trainer.steps", 2)
    plain = raypipe("train", "--workspace", uri, *short)
    shuffled = raypipe("train", "--workspace", uri, *short, "--shuffle_ties")
    assert (plain.status, shuffled.status) == ("ok", "ok")
    assert plain.result["run_key"] != shuffled.result["run_key"]
    assert told[0] is None
    # Six events of each user in training, two at a time.
    assert told[1].tolist() == [1 + 4 * user + n // 2 for user in range(20) for n in range(6)]


def test_a_loss_that_is_no_number_stops_with_step_users_and_checkpoint(raypipe: Run, chains: str) -> None:
    ended = raypipe("train", "--workspace", chains, *SMALL, "--trainer.lr", "1e38", "--trainer.clip", "1e38")
    assert (ended.code, ended.status) == (1, "failed")
    told = one_paragraph(ended.stderr)
    assert "The loss of step" in told
    assert re.search(r"Its batch held events of the users u\d+(, u\d+){9} and 6 more\. ", told), told
    assert "There was no checkpoint before it" in told
    assert "Lower the learning rate" in told


def test_without_anything_to_learn_there_is_one_paragraph(
    ray_cluster: None, raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    empty = raypipe("train", "--workspace", uri)
    assert (empty.code, "raypipe ingest" in one_paragraph(empty.stderr)) == (2, True)
    ingest_chains(raypipe, uri, files, users=5, length=3)
    short = raypipe("train", "--workspace", uri, *SMALL)
    assert short.code == 2
    assert "No history has two events" in one_paragraph(short.stderr)
    few = str(tmp_path / "few")
    ingest_chains(raypipe, few, files, users=5, length=5)
    shared = raypipe("train", "--workspace", few, *SMALL, "--trainer.workers", 6)
    assert shared.code == 2
    assert "6 workers are too many for 5 examples" in one_paragraph(shared.stderr)
    assert "--trainer.workers to 5" in shared.stderr
    none = raypipe("evaluate", "--workspace", uri)
    assert none.code == 2
    assert "No model sasrec is stored" in one_paragraph(none.stderr)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--hold_out", 0), "validation asks for a held-out event"),
        (("--hold_out", 1), "the last one is for `evaluate`"),
        (("--recommender.heads", 5), "width 16 cannot be shared by 5 heads"),
        (("--recommender.model", "magic"), "recommender.model"),
        (("--recommender.dreamrec.sampling_steps", 900), "more than the 500 steps there are"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_read(
    raypipe: Run, tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    ended = raypipe("train", "--workspace", tmp_path / "none", *SMALL, *options)
    assert ended.code == 2
    assert told in one_paragraph(ended.stderr)


def test_a_dreamrec_starts_from_the_vectors_of_what_saw_no_more_than_it(raypipe: Run, chains: str, files: Path) -> None:
    assert raypipe("train", "--workspace", chains, *SMALL, "--trainer.steps", 2).code == 0
    catalogue = write_catalogue(files / "more.csv", ITEMS + 2)
    log = write_log(files / "more_log.csv", [("u1", f"i{ITEMS + 1}", START + 100)])
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", chains, *words).code == 0
    table = ("--recommender.model", "dreamrec", "--recommender.dreamrec.table", "sasrec", "--trainer.steps", 2)
    started = raypipe("train", "--workspace", chains, *SMALL, *table, "--trainer.validate_every", "null")
    assert started.code == 0, started.stderr
    assert "validation_ndcg" not in started.metrics
    model = Models(Store(chains)).newest("dreamrec")
    assert model is not None
    assert "NDCG" not in Store(chains).read(f"{model.folder}/checkpoint/README.md").decode()
    leaky = raypipe("train", "--workspace", chains, *SMALL, *table, "--held_out_share", 0.1)
    assert leaky.code == 2
    assert "10% of them are held out here" in one_paragraph(leaky.stderr)


def test_a_model_of_another_catalogue_is_refused(raypipe: Run, chains: str, tmp_path: Path, files: Path) -> None:
    assert raypipe("train", "--workspace", chains, *SMALL, "--trainer.steps", 2).code == 0
    other = str(tmp_path / "other")
    log = write_log(files / "other.csv", [("u1", f"x{n}", START + n) for n in range(9)])
    catalogue = files / "others.csv"
    catalogue.write_text("item_id,title\n" + "".join(f"x{n},Other {n}\n" for n in range(40)))
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", other, *words).code == 0
    model = Models(Store(chains)).newest("sasrec")
    assert model is not None
    Models(Store(other)).add("sasrec", Store(chains).local_path(f"{model.folder}/checkpoint"), "r", model.lineage)
    ended = raypipe("evaluate", "--workspace", other)
    assert ended.code == 2
    assert "was trained on another catalogue" in one_paragraph(ended.stderr)


def test_item_vectors_to_start_from_have_to_be_there_and_fit(raypipe: Run, chains: str) -> None:
    given = store_untrained(chains, RecommenderConfig(width=8, hidden=8, max_length=6))
    words = ("train", "--workspace", chains, *SMALL, "--recommender.model", "dreamrec", "--trainer.steps", 2)
    unknown = raypipe(*words, "--recommender.dreamrec.table", "sasrec/0")
    assert unknown.code == 2
    assert "No model sasrec/0 is stored" in one_paragraph(unknown.stderr)
    wider = raypipe(*words, "--recommender.dreamrec.table", "sasrec")
    assert wider.code == 2
    assert f"The item vectors of sasrec/{given.hash} are 8 wide and dreamrec's 16" in one_paragraph(wider.stderr)
    options = ("--recommender.width", 8, "--recommender.dreamrec.frozen_table")
    trained = raypipe(*words, *options, "--recommender.dreamrec.table", "sasrec")
    assert trained.code == 0, trained.stderr
    store = Store(chains)
    (model,) = Models(store).all("dreamrec")
    table = load_recommender(store.local_path(f"{model.folder}/checkpoint"))[0].item_states()
    start = load_recommender(store.local_path(f"{given.folder}/checkpoint"))[0].item_states()
    # In the direction they had, at the length of noise.
    torch.testing.assert_close(table[1:] / table[1:].norm() * start[1:].norm(), start[1:])
    assert table[1:].norm(dim=1).mean().item() == pytest.approx(8**0.5)
