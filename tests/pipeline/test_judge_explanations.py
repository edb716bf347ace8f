"""`judge --what explanations` of planted words: what they tell of the recommender's scores and of who wrote them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline.user_rows import change_keys
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.sequences import Sequences
from raypipe.storage import ledger
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig
from tests.conftest import Run
from tests.pipeline.small_logs import SMALL_ITEMS, newest
from tests.untrained import store_untrained, store_untrained_adapter

pytestmark = pytest.mark.usefixtures("ray_cluster")
RECOMMENDER = RecommenderConfig(width=8, hidden=8, max_length=200, dropout=0.0)
ITEM = 7
JUDGE = ("judge", "--what", "explanations", "--workspace")
MINE, OTHER = "explain-recexplainer-h", "explain-recexplainer-b"


@pytest.fixture
def scored(ingested: str, tmp_path: Path) -> dict[str, float]:
    """What an untrained recommender, of which an adapter is stored, thinks of one item, by user."""
    recommender = store_untrained(ingested, RECOMMENDER)
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny"), train_tokenizer(["a word"] * 9, [], [], 300))
    store_untrained_adapter(ingested, ExplainerConfig(variant="H"), recommender, RECOMMENDER.width, tmp_path / "lm")
    model = RECOMMENDER.build(SMALL_ITEMS).eval()
    scores = {}
    with torch.no_grad():
        for row in newest(ingested, "histories").to_pylist():
            history = Sequences(torch.tensor(row["items"]), torch.tensor([len(row["items"])]))
            scores[row["user_id"]] = float(model.score(model.encode(history))[0, ITEM])
    return scores


def write(
    uri: str,
    variant: str,
    texts: dict[str, str],
    items: Sequence[int] = (ITEM,),
    keys: Mapping[str, str] | None = None,
    decisions: Mapping[str, str] | None = None,
) -> None:
    """Explanations of `items`, by user, as `explain` publishes them; `keys` are users' change keys, `decisions` all yes if unset."""
    workspace = Workspace(uri)
    table, buckets = workspace.tables["explanations"], workspace.require_info().buckets
    pairs = [(user, item) for user in texts for item in items]
    rows = pa.table(
        {
            "user_id": [user for user, _ in pairs],
            "item_index": pa.array([item for _, item in pairs], pa.int32()),
            "decision": [(decisions or {}).get(user, "yes") for user, _ in pairs],
            "text": [texts[user] for user, _ in pairs],
            "change_key": [(keys or {}).get(user, "planted") for user, _ in pairs],
        }
    )
    places = stable_hash(rows["user_id"].combine_chunks()) % np.uint64(buckets)
    parts: list[dict[str, str | int]] = [{"variant": variant, "bucket": bucket} for bucket in range(buckets)]
    staged = [
        table.stage(rows.filter(pa.array(places == np.uint64(part["bucket"]))), f"{variant}-{part['bucket']}", part)
        for part in parts
    ]
    table.publish(staged, mode="overwrite", app=f"test:{variant}", number=1, replaces=parts)


def keys_of(uri: str, recipe: str) -> dict[str, str]:
    """By user the change key of an explanation of the item, of today's history and by this recipe."""
    content = newest(uri, "items").sort_by("index")["content_hash"][ITEM - 1].as_py()
    histories = newest(uri, "histories")
    keys = change_keys(histories["history_key"].combine_chunks(), recipe).to_pylist()
    users = histories["user_id"].to_pylist()
    return {user: f"{key}-{ITEM}-{content}" for user, key in zip(users, keys, strict=True)}


def finished_run(uri: str, recipe: str = "recipe") -> ledger.Run:
    """As if the newest adapter had explained."""
    workspace = Workspace(uri)
    writer = Models(workspace.store).newest("recexplainer-h")
    assert writer is not None
    manifest = {"recipe": "r", "pins": {}, "base": {}, "scope": "all"}
    facts = {"variant": MINE, "model": writer.hash, "recipe": recipe}
    run = workspace.ledger("explain").start("e" * 32, {**manifest, "facts": facts})
    run.finish({"status": "ok", "metrics": {}, "tables": {}})
    return run


def words_of(scores: dict[str, float], seed: int) -> dict[str, str]:
    """Words that give the score away, among words that tell nothing."""
    drawn, middle = random.Random(seed), float(np.median(list(scores.values())))
    said = {user: "splendid" if score > middle else "poor" for user, score in scores.items()}
    return {user: f"{word} {drawn.choice(['story', 'mood', 'cast'])}" for user, word in said.items()}


def test_words_that_follow_the_score_are_coherent_and_another_habit_is_told(
    raypipe: Run, ingested: str, scored: dict[str, float]
) -> None:
    mine = words_of(scored, 0)
    write(ingested, MINE, mine)
    write(ingested, OTHER, {user: f"moreover {text}" for user, text in mine.items()})
    write(ingested, "explain-recexplainer-i", mine)
    write(ingested, f"{MINE}-pairs", dict(list(mine.items())[:4]))
    ended = raypipe(*JUDGE, ingested)
    assert ended.code == 0, ended.stderr
    figures = ended.metrics
    assert figures["coherence.users"] == len(scored) == 25
    values = np.array(list(scored.values()))
    # Means of four fifths for the last fifth: a little worse than the variance.
    assert values.var() < figures["coherence.constant"] < 1.3 * values.var()
    assert figures["coherence.mse"] < 0.8 * figures["coherence.constant"]
    assert (figures[f"distinction.{OTHER}.accuracy"], figures[f"distinction.{OTHER}.chance"]) == (1.0, 0.5)
    assert (figures["distinction.explain-recexplainer-i.accuracy"], figures[f"distinction.{OTHER}.cases"]) == (0.5, 25)
    # Four cases are no ground for a classifier, and that is said.
    assert (figures[f"distinction.{MINE}-pairs.cases"], figures[f"distinction.{MINE}-pairs.accuracy"]) == (4, None)
    assert f"{MINE}-pairs explains 4 of the 25 pairs judged" in ended.stderr
    (path,) = [entry.path for entry in Workspace(ingested).store.list("judgements")]
    assert json.loads(Workspace(ingested).store.read(path))["metrics"] == figures


def test_decisions_are_counted_beside_always_yes_where_the_recommender_says_either(
    raypipe: Run, ingested: str, scored: dict[str, float]
) -> None:
    model, labels = RECOMMENDER.build(SMALL_ITEMS).eval(), {}
    for row in newest(ingested, "histories").to_pylist():
        with torch.no_grad():
            history = Sequences(torch.tensor(row["items"]), torch.tensor([len(row["items"])]))
            scores = model.score(model.encode(history))[0]
        unseen = [item for item in range(1, SMALL_ITEMS + 1) if item not in row["items"]]
        place = sum(float(scores[item]) > float(scores[ITEM]) for item in unseen) / max(len(unseen), 1)
        labels[row["user_id"]] = "yes" if place < 0.2 else "no" if place >= 0.5 else None
    told = {user: label for user, label in labels.items() if label is not None}
    yes = sum(label == "yes" for label in told.values())
    assert 0 < yes < len(told) < len(labels)
    other = {"yes": "no", "no": "yes"}
    wrong = sorted(told)[:2]
    decisions = {user: other[label] if user in wrong else label for user, label in told.items()}
    write(ingested, MINE, words_of(scored, 0), decisions=decisions)
    ended = raypipe(*JUDGE, ingested)
    figures = ended.metrics
    assert figures["decision.cases"] == len(told)
    assert figures["decision.accuracy"] == round((len(told) - 2) / len(told), 4)
    assert figures["decision.constant"] == round(yes / len(told), 4)
    assert f"of {len(told)} decisions are the recommender's, always saying yes has " in ended.stderr
    # Always yes is its own control.
    write(ingested, MINE, words_of(scored, 0))
    always = raypipe(*JUDGE, ingested).metrics
    assert always["decision.accuracy"] == always["decision.constant"] == figures["decision.constant"]
    judgement = json.loads(Workspace(ingested).store.read(f"judgements/{ended.result['run_key']}.json"))
    assert judgement["metrics"]["decision.accuracy"] == figures["decision.accuracy"]


def test_explanations_are_judged_by_who_wrote_them(
    raypipe: Run, ingested: str, scored: dict[str, float], tmp_path: Path
) -> None:
    """And not by a newer adapter of the same name, beside another recommender."""
    write(ingested, MINE, words_of(scored, 0), keys=keys_of(ingested, "recipe"))
    models = Models(Workspace(ingested).store)
    writer = models.newest("recexplainer-h")
    run = finished_run(ingested)
    before = raypipe(*JUDGE, ingested).metrics
    other = RECOMMENDER.model_copy(update={"width": 12, "hidden": 12})
    recommender = store_untrained(ingested, other)
    store_untrained_adapter(ingested, ExplainerConfig(variant="H"), recommender, other.width, tmp_path / "lm")
    assert models.newest("recexplainer-h") != writer
    after = raypipe(*JUDGE, ingested).metrics
    assert {name: after[name] for name in before} == before
    run.store.delete_folder(run.folder)
    assert raypipe(*JUDGE, ingested).metrics["coherence.mse"] != before["coherence.mse"]


def test_shuffled_words_tell_no_score_and_few_users_are_not_judged_for_it(
    raypipe: Run, ingested: str, scored: dict[str, float]
) -> None:
    mine = words_of(scored, 0)
    texts = random.Random(3).sample(list(mine.values()), len(mine))
    write(ingested, MINE, dict(zip(mine, texts, strict=True)))
    shuffled = raypipe(*JUDGE, ingested).metrics
    assert shuffled["coherence.mse"] > 0.9 * shuffled["coherence.constant"]
    assert not any(name.startswith("distinction.") for name in shuffled)
    few = raypipe(*JUDGE, ingested, "--sample", 9)
    assert (few.metrics["coherence.users"], few.metrics["coherence.mse"]) == (9, None)
    assert "coherence wants explanations of 10 users, and there are 9" in few.stderr


def test_users_are_counted_once_however_many_explanations_each_has(
    raypipe: Run, ingested: str, scored: dict[str, float]
) -> None:
    write(ingested, f"{MINE}-pairs", words_of(scored, 0), (ITEM, ITEM + 1))
    figures = raypipe(*JUDGE, ingested, "--explanations", f"{MINE}-pairs").metrics
    assert (figures["users"], figures["coherence.users"], figures["cases"]) == (25, 25, 50)


def test_explanations_of_older_histories_or_of_another_recipe_are_left_out_and_told(
    raypipe: Run, ingested: str, scored: dict[str, float]
) -> None:
    keys, others = (keys_of(ingested, recipe) for recipe in ("recipe", "other"))
    users = list(keys)
    # Of another recipe, of another item's words, and of a history that is not there any more.
    content = keys[users[1]].rpartition("-")[0]
    keys |= {users[0]: others[users[0]], users[1]: f"{content}-other", users[2]: keys[users[3]]}
    write(ingested, MINE, words_of(scored, 0), keys=keys)
    untold = raypipe(*JUDGE, ingested).metrics
    assert (untold["cases"], untold["stale"]) == (25, None)
    run = finished_run(ingested)
    told = raypipe(*JUDGE, ingested)
    assert (told.metrics["cases"], told.metrics["stale"]) == (22, 3)
    assert "3 explanations are of histories or items that have changed since" in told.stderr
    judgement = json.loads(Workspace(ingested).store.read(f"judgements/{told.result['run_key']}.json"))
    assert set(judgement["users"]) == set(users[3:])
    # A sample is of those that stand.
    assert raypipe(*JUDGE, ingested, "--sample", 22).metrics["cases"] == 22
    run.store.delete_folder(run.folder)
    finished_run(ingested, recipe="newer")
    none = raypipe(*JUDGE, ingested)
    assert (none.code, "is of a history and an item as they are now" in none.stderr) == (2, True)
