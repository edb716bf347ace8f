"""Guided refinement from a log to recommendations: who likes what is told by a word in the items' text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raypipe.cli.main import main
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.number_slots import NumberForm
from raypipe.pipeline import attribute_cards, guided
from raypipe.pipeline.sequences import user_keys
from raypipe.recommenders.attribute_scores import AttributeScores, load_scores, save_scores
from raypipe.recommenders.checkpoint import Card, catalogue_card, load_recommender
from raypipe.recommenders.ranking import candidate_scores
from raypipe.recommenders.recommender import Recommender, weights_hash
from raypipe.recommenders.windows import Histories
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.store import Store
from raypipe.storage.tombstones import tombstone_rows
from raypipe.systems.guided import GuidedConfig, Rating
from raypipe.systems.guided_attributes import find_attributes
from raypipe.systems.guided_reading import RatingPrompts
from tests.conftest import Run, unavailable
from tests.ground import one_paragraph
from tests.pipeline.small_logs import START, newest, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
KINDS = ("dark", "funny")
ITEMS, LATE, USERS = 20, 4, 60
DOMAIN = """attributes:
- {name: grim, description: how grim, low: not, high: very}
- {name: merry, description: how merry, low: not, high: very}
"""
TRAINING = (
    *("--recommender.width", "8", "--recommender.hidden", "16", "--recommender.max_length", "8"),
    *("--recommender.dropout", "0", "--trainer.batch_size", "16", "--trainer.lr", "0.01"),
    *("--trainer.warmup_steps", "2", "--trainer.steps", "20", "--trainer.device", "cpu"),
)
ALIGN = (
    *("--system", "guided", "--no-guided.described", "--guided.history", "3", "--guided.negatives", "8"),
    *("--guided.lora.rank", "4", "--guided.lora.dropout", "0", "--hold_out", "2", "--held_out_share", "0.25"),
    *("--positions", "2", "--trainer.steps", "120", "--trainer.batch_size", "12", "--trainer.lr", "0.001"),
    *("--trainer.schedule", "constant", "--trainer.warmup_steps", "0", "--trainer.device", "cpu"),
)


def titles() -> list[str]:
    return [f"Film {n}" if n <= ITEMS else f"Latecomer {n}" for n in range(1, ITEMS + LATE + 1)]


def kind_of(item: int) -> int:
    return (item - 1) % 2


def histories() -> dict[str, list[int]]:
    """Five films of one kind, and two latecomers that nobody chose before."""
    rng = np.random.default_rng(0)
    found = {}
    for user in range(USERS):
        kind = user % 2
        films = rng.choice(np.arange(1 + kind, ITEMS + 1, 2), 5, replace=False).tolist()
        found[f"u{user}"] = [*films, *rng.permutation(np.arange(ITEMS + 1 + kind, ITEMS + LATE + 1, 2)).tolist()]
    return found


def tokenizer_texts() -> list[str]:
    catalogue = Catalogue(
        titles(),
        [{"kind": [KINDS[kind_of(item)]]} for item in range(1, ITEMS + LATE + 1)],
        ["A tale."] * (ITEMS + LATE),
    )
    rating = Rating(GuidedConfig(described=False), find_attributes("movies", catalogue, 2)[:2], catalogue)
    numbers = [f'{{"grim": {n}, "merry": {n}}}' for n in range(1, 11)]
    return [*rating.item_lines(), rating.item_prompt("").text, rating.user_prompt([]).text, *numbers]


@pytest.fixture(scope="session")
def films_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log, a base recommender, and a language model that is not trained and has seen nobody."""
    folder = tmp_path_factory.mktemp("films")
    rows = [f"i{n},{title},{KINDS[kind_of(n)]}\n" for n, title in enumerate(titles(), 1)]
    (folder / "items.csv").write_text("item_id,title,kind\n" + "".join(rows))
    (folder / "domain.yaml").write_text(DOMAIN)
    events = [
        (user, f"i{item}", START + place) for user, items in histories().items() for place, item in enumerate(items)
    ]
    log = write_log(folder / "log.csv", events)
    shared = ["--workspace", str(folder / "workspace"), "--tracking", "off"]
    words = ["--log.path", str(log), "--log.columns.time", "time", "--catalogue.path", str(folder / "items.csv")]
    assert main(["ingest", *shared, *words, "--cluster.workers", "1"]) == 0
    assert main(["train", *shared, *TRAINING]) == 0
    save_untrained(
        folder / "lm", BuiltinLmConfig(size="tiny", context=256), train_tokenizer(tokenizer_texts() * 3, [], [], 500)
    )
    Models(Store(str(folder / "workspace"))).add(
        "lm", folder / "lm", "untrained", {"hold_out": 2, "held_out_share": 0.25}
    )
    return folder


@pytest.fixture
def films(films_once: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(films_once / "workspace", tmp_path / "workspace"))


def store_planted(uri: str, folder: Path, hold_out: int = 2) -> Model:
    """Scores that tell the kinds apart, as a language model might give them."""
    items = newest(uri, "items").sort_by("index")["item_id"].to_pylist()
    kinds = np.array([kind_of(int(name[1:])) for name in items])
    rows = np.stack([np.where(kinds == 0, 9, 2), np.where(kinds == 1, 8, 3)], 1).astype(np.float32)
    users = pa.array(histories())
    order = np.argsort(user_keys(users))
    told = np.array([[9, 3] if number % 2 == 0 else [2, 8] for number in range(USERS)], np.float32)
    table = np.concatenate([np.full((1, 2), np.nan, np.float32), rows])
    scores = AttributeScores(("grim", "merry"), table, told[order], user_keys(users)[order], catalogue_card(items))
    save_scores(folder, scores)
    named = [
        {"name": name, "description": f"how {name}", "low": f"not {name}", "high": f"very {name}"}
        for name in scores.names
    ]
    lineage = {"hold_out": hold_out, "held_out_share": 0.0, "attributes": named}
    return Models(Store(uri)).add("guided", folder, f"planted {hold_out}", lineage)


def apart(items: np.ndarray) -> np.ndarray:
    """How far the scores of the two kinds lie from each other, in standard deviations of one of them, [attributes]."""
    some, others = items[1::2], items[2::2]
    return abs(some.mean(0) - others.mean(0)) / np.sqrt((some.var(0) + others.var(0)) / 2)


def stored_scores(uri: str, model: Model) -> AttributeScores:
    store = Store(uri)
    return load_scores(store.local_path(f"{model.folder}/checkpoint"), Models(store).users(model))


def stored_recommender(uri: str, model: Model) -> tuple[Recommender, Card]:
    store = Store(uri)
    return load_recommender(store.local_path(f"{model.folder}/checkpoint"), users=Models(store).users(model))


def test_a_tuned_language_model_scores_everybody_by_what_is_before_the_cut(
    raypipe: Run, films: str, films_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ids = RatingPrompts.ids

    def watched(self, prompts):
        asked.extend(prompt.text for prompt in prompts)
        return ids(self, prompts)

    monkeypatch.setattr(RatingPrompts, "ids", watched)
    before = {name: Models(Store(films)).all(name)[0].hash for name in ("lm", "sasrec")}
    words = ("align", "--workspace", films, *ALIGN, "--guided.domain", films_once / "domain.yaml")
    ended = raypipe(*words)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    metrics = ended.metrics
    assert (metrics["items"], metrics["users"]) == (ITEMS + LATE, USERS)
    assert metrics["loss_last"] < metrics["loss_first"]
    # What a user has not seen of her kind fits in a list; somebody else's scores are as often those of the other kind.
    assert metrics["scores HR@10"] > metrics["shuffled users: scores HR@10"] + 0.25
    of_users = [text for text in asked if "one person chose" in text]
    assert len(of_users) > USERS
    assert sum("Film" in text for text in of_users) == len(of_users)
    assert not any("Latecomer" in text for text in of_users)
    assert before == {name: Models(Store(films)).all(name)[0].hash for name in ("lm", "sasrec")}

    (model,) = Models(Store(films)).all("guided")
    assert model.lineage["lm_model"] == f"lm/{before['lm']}"
    scores = stored_scores(films, model)
    assert scores.names == ("grim", "merry")
    assert np.isfinite(scores.items[1:]).all()
    assert (scores.items[1:].min() >= 1) & (scores.items[1:].max() <= 10)
    # One word of an item's text decides who chooses it: the scores of the two kinds lie apart.
    assert (apart(scores.items) > 3).all()
    np.testing.assert_array_equal(scores.keys, np.sort(user_keys(pa.array(histories()))))
    assert raypipe(*words).status == "nothing_to_do"

    # The same scores again, from the stored language model; and others where it is asked as it is.
    rescored = raypipe(*words, "--adapter", "guided")
    assert rescored.status == "ok"
    again = Models(Store(films)).newest("guided")
    assert again is not None
    assert "steps" not in again.lineage["metrics"]
    np.testing.assert_allclose(stored_scores(films, again).items, scores.items, atol=1e-5)
    plain = raypipe(*words, "--no-guided.tuned")
    as_it_is = find_model(Models(Store(films)), f"guided/{plain.result['models']['guided']}")
    assert (apart(stored_scores(films, as_it_is).items) < 0.5 * apart(scores.items)).all()
    assert not Store(films).exists(f"{as_it_is.folder}/checkpoint/adapter.json")
    written = raypipe(*words, "--no-guided.tuned", "--guided.reading", "parsed", "--answer_tokens", 16)
    assert written.code == 2
    assert "Not one score could be read from" in one_paragraph(written.stderr)


def test_who_is_forgotten_while_scores_are_made_is_not_among_them(
    raypipe: Run, films: str, films_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = guided._read

    def read_and_forget(config, workspace, versions):
        inputs = read(config, workspace, versions)
        table = workspace.tables["tombstones"]
        table.publish([table.stage(tombstone_rows(["u7"]), "one")], mode="append", app="tombstones:forget", number=1)
        return inputs

    monkeypatch.setattr(guided, "_read", read_and_forget)
    words = ("align", "--workspace", films, *ALIGN, "--guided.domain", films_once / "domain.yaml")
    ended = raypipe(*words, "--no-guided.tuned")
    assert ended.code == 0, ended.stderr
    (model,) = Models(Store(films)).all("guided")
    others = pa.array(user for user in histories() if user != "u7")
    np.testing.assert_array_equal(stored_scores(films, model).keys, np.sort(user_keys(others)))


def test_scores_that_fill_columns_change_what_is_recommended_and_nothing_else(
    raypipe: Run, films: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = store_planted(films, tmp_path / "planted")
    options = ("--recommender.guided.scores", "guided", "--recommender.guided.base", "sasrec")
    base = Models(Store(films)).newest("sasrec")
    assert base is not None
    trained = raypipe("train", "--workspace", films, *TRAINING, *options)
    assert (trained.code, trained.status) == (0, "ok"), trained.stderr
    store = Store(films)
    model = Models(store).newest("sasrec")
    assert model is not None
    recommender, card = stored_recommender(films, model)
    # By name in the command, by content in the recipe.
    assert card.config.guided.scores == f"guided/{planted.hash}"
    assert card.config.guided.base == f"sasrec/{base.hash}"
    assert card.blocks == (2, USERS)
    assert recommender.item_states().shape == (ITEMS + LATE + 1, 8)
    blocks = recommender.item_block.numpy()
    assert len(np.unique(blocks[1::2].round(4), axis=0)) == len(np.unique(blocks[2::2].round(4), axis=0)) == 1
    assert raypipe("train", "--workspace", films, *TRAINING, *options).status == "nothing_to_do"
    before = weights_hash(recommender)

    # What is published of a user is one vector, times the items' vectors the list, as of any recommender.
    for job in ("extract", "recommend"):
        ended = raypipe(job, "--workspace", films, "--model", f"sasrec/{model.hash}")
        assert ended.code == 0, ended.stderr
    states = newest(films, "hidden_states").sort_by("user_id")
    lists = newest(films, "recommendations").sort_by("user_id")
    vectors = newest(films, "item_states").sort_by("item_index")
    matrix = np.array(vectors["state"].to_pylist())
    for row, state in zip(lists.to_pylist(), states["state"].to_pylist(), strict=True):
        scored = matrix @ np.array(state)
        np.testing.assert_allclose(scored[np.array(row["items"]) - 1], row["scores"], rtol=1e-4, atol=1e-4)
    assert weights_hash(stored_recommender(films, model)[0]) == before

    told = raypipe("evaluate", "--workspace", films, "--model", f"sasrec/{model.hash}", "--cards", 3)
    assert told.code == 0, told.stderr
    page = Path(films) / f"evaluations/{model.hash}/attributes.html"
    assert page.as_uri() in told.stderr or str(page) in told.stderr
    text = page.read_text()
    assert text.count("<article>") == 3
    assert "very grim: Film 1" in text
    recommended = re.findall(r"<h3>([^<]*) <small>([-0-9.]+)</small></h3>", text)
    bars = [float(found.replace("−", "-")) for found in re.findall(r"<span>([+-][0-9.]+)</span></div>", text)]
    assert len(recommended) == 15
    assert len(bars) == 15 * 3 + 3 * 2
    # Each recommendation's bars, two attributes behind the history's part, add up to the score by which it is ranked.
    table = newest(films, "items").to_pylist()
    by_id, by_title = ({row[name]: row["index"] for row in table} for name in ("item_id", "title"))
    keys = {int(user_keys(pa.array([user]))[0]): items[:-1] for user, items in histories().items()}
    users = sorted(keys, key=lambda key: key % 2**64)[:3]
    items = np.array([by_id[f"i{item}"] for user in users for item in keys[user]], np.int32)
    lists = np.array([by_title[name] for name, _ in recommended], np.int32).reshape(3, 5)
    scores = candidate_scores(recommender, Histories(items, np.arange(1, 4) * 6, np.array(users)), lists)
    sums = np.array(bars).reshape(3, 2 + 15)[:, 2:].reshape(15, 3).sum(1)
    np.testing.assert_allclose(sums, scores.ravel(), atol=0.02)
    np.testing.assert_allclose([float(told) for _, told in recommended], scores.ravel(), atol=0.006)

    # Who is forgotten while the page is drawn is not on it.
    drawn = attribute_cards.top_lists

    def forget_meanwhile(model, prefixes, *rest, **options):
        (hers, *_) = [user for user in histories() if user_keys(pa.array([user]))[0] == prefixes.users[0]]
        assert raypipe("forget", "--workspace", films, "--user", hers).metrics["rows_of_models_removed"] == 2
        monkeypatch.setattr(attribute_cards, "top_lists", drawn)
        return drawn(model, prefixes, *rest, **options)

    monkeypatch.setattr(attribute_cards, "top_lists", forget_meanwhile)
    again = raypipe("evaluate", "--workspace", films, "--model", f"sasrec/{model.hash}", "--cards", 3)
    assert again.code == 0, again.stderr
    assert re.findall(r"<h2>(User \d)", page.read_text()) == ["User 2", "User 3"]
    plain = raypipe("evaluate", "--workspace", films, "--model", f"sasrec/{base.hash}", "--cards", 3)
    assert plain.code == 2
    assert "has no guided scores to be drawn" in one_paragraph(plain.stderr)


def test_the_columns_of_controls_bear_no_names_of_attributes(raypipe: Run, films: str, tmp_path: Path) -> None:
    store_planted(films, tmp_path / "planted")
    options = ("--recommender.guided.scores", "guided", "--recommender.guided.block", "shuffled")
    assert raypipe("train", "--workspace", films, *TRAINING, *options).code == 0
    drawn = one_paragraph(raypipe("evaluate", "--workspace", films, "--cards", 2).stderr)
    assert "is a control of --recommender.guided.block shuffled" in drawn
    assert raypipe("evaluate", "--workspace", films).code == 0
    (record,) = Evaluations(Store(films)).all()
    assert "HR@10" in record.figures["sasrec"]
    assert not any("attribute share" in metric for metric in record.figures["sasrec"])


def test_whatever_has_read_what_is_held_out_is_refused(
    raypipe: Run, films: str, films_once: Path, tmp_path: Path
) -> None:
    store_planted(films, tmp_path / "planted", hold_out=1)
    scores = ("--recommender.guided.scores", "guided")
    leaky = raypipe("train", "--workspace", films, *TRAINING, *scores)
    assert leaky.code == 2
    assert "may have read all but the last 1 events" in one_paragraph(leaky.stderr)
    unvalidated = ("--hold_out", 1, "--trainer.validate_every", "null")
    shorter = raypipe("train", "--workspace", films, *TRAINING, *scores, *unvalidated)
    assert shorter.code == 0, shorter.stderr
    share = ("--held_out_share", "0.1")
    users = raypipe("train", "--workspace", films, *TRAINING, "--recommender.guided.base", "sasrec", *share)
    assert users.code == 2
    assert "may have read all but 0% of the users, and 10% of them are held out here" in one_paragraph(users.stderr)
    more = raypipe(
        "align", "--workspace", films, *ALIGN, "--hold_out", "3", "--guided.domain", films_once / "domain.yaml"
    )
    assert more.code == 2
    assert "lm/" in one_paragraph(more.stderr)
    assert "Make it with --hold_out 3" in one_paragraph(more.stderr)


def test_what_does_not_fit_is_told_before_anything_is_trained(raypipe: Run, films: str, tmp_path: Path) -> None:
    store_planted(films, tmp_path / "planted")
    scores = ("--recommender.guided.scores", "guided")
    cases = {
        ("--recommender.width", "2", *scores): "2 attributes leave nothing for what is learnt",
        (
            "--recommender.width",
            "12",
            *scores,
            "--recommender.guided.base",
            "sasrec",
        ): "8 dimensions to be reduced to 10",
        ("--recommender.model", "caser", *scores): "guided is for gru4rec, sasrec, bert4rec",
        ("--recommender.guided.block", "random"): "without `scores` there are no columns",
        ("--recommender.guided.scores", "sasrec"): "holds no scores of attributes",
        ("--recommender.guided.scores", "guided/0"): "No model guided/0 is stored",
    }
    for options, problem in cases.items():
        ended = raypipe("train", "--workspace", films, *TRAINING, *options)
        assert ended.code == 2, options
        assert problem in one_paragraph(ended.stderr)
    unknown = raypipe("align", "--workspace", films, *ALIGN, "--guided.domain", "music")
    assert unknown.code == 2
    assert "There is no domain 'music'" in one_paragraph(unknown.stderr)


def test_a_browser_shows_bars_to_both_sides(raypipe: Run, films: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        unavailable("There is no chromium")
    store_planted(films, tmp_path / "planted")
    assert raypipe("train", "--workspace", films, *TRAINING, "--recommender.guided.scores", "guided").code == 0
    assert raypipe("evaluate", "--workspace", films, "--cards", 2).code == 0
    shares = {
        metric.removeprefix("attribute share: "): number.value
        for metric, number in Evaluations(Store(films)).all()[-1].figures["sasrec"].items()
        if metric.startswith("attribute share: ")
    }
    assert set(shares) == {"what was learnt of the history", "grim", "merry"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert min(shares.values()) > 0
    told = raypipe("report", "--workspace", films)
    assert "What decides on recommendations of Guided beside SASRec" in Path(told.metrics["page"]).read_text()
    (page,) = Path(films).glob("evaluations/*/attributes.html")
    script = page.with_name("measured.html")
    measure = (
        "<script>document.title = JSON.stringify([...document.querySelectorAll('.bar i')].map(bar => "
        "[bar.parentElement.className, bar.getBoundingClientRect().width]))</script></body>"
    )
    script.write_text(page.read_text().replace("</body>", measure))
    command = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", script.as_uri()], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    bars = json.loads(re.search(r"<title>(.*?)</title>", shown)[1])  # type: ignore[index]
    assert {side for side, _ in bars} == {"", "minus"}
    assert max(width for _, width in bars) > 50


def test_numbers_are_one_token_each_for_the_language_model_of_these_tests(films_once: Path) -> None:
    from raypipe.language.backbone import load_backbone

    backbone = load_backbone(str(films_once / "lm"), device="cpu")
    form = NumberForm.of(backbone, ['{"grim": ', ', "merry": ', "}"], 10, backbone.ends[0])
    assert [len(number) for number in form.numbers] == [1] * 10
