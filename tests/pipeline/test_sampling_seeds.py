"""A recommender that samples: what is taught, judged and put into words is of the list that is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline import align, judged
from raypipe.pipeline.align_options import AlignConfig
from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.sampling_seeds import known_seeds, read_event_seeds, user_seeds
from raypipe.pipeline.sequences import read_histories
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter
from raypipe.systems.source import Source
from raypipe.systems.surrogates import Lessons
from raypipe.systems.teacher import teach
from tests.conftest import Run
from tests.pipeline.small_logs import SMALL_ITEMS, SMALL_LOG, newest, write_catalogue, write_log
from tests.pipeline.test_judge_explanations import MINE, write
from tests.untrained import store_untrained, store_untrained_adapter

pytestmark = pytest.mark.usefixtures("ray_cluster")
DREAMREC = RecommenderConfig.model_validate(
    {
        "model": "dreamrec",
        "width": 8,
        "hidden": 8,
        "max_length": 200,
        "dropout": 0.0,
        "dreamrec": {"steps": 10, "sampling_steps": 1, "guidance": 0},
    }
)


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    save_untrained(tmp_path / "lm", BuiltinLmConfig(size="tiny"), train_tokenizer(["a word"] * 9, [], [], 300))
    return tmp_path / "lm"


@pytest.fixture
def listed(raypipe: Run, ingested: str) -> dict[str, tuple[list[int], list[float]]]:
    """By user what an untrained DreamRec recommends, seen or not, and the scores; of everybody."""
    store_untrained(ingested, DREAMREC)
    words = ("--model", "dreamrec", "--length", SMALL_ITEMS, "--no-filter_seen")
    assert raypipe("recommend", "--workspace", ingested, *words).code == 0
    rows = newest(ingested, "recommendations").to_pylist()
    return {row["user_id"]: (row["items"], row["scores"]) for row in rows}


def source_of(uri: str, lm: Path, hold_out: int) -> tuple[list[str], Source]:
    """What `align` learns from and asks about, and whose histories these are."""
    config = AlignConfig(workspace=uri, model="dreamrec", lm=str(lm), hold_out=hold_out, held_out_share=0.3)
    workspace = Workspace(uri)
    version = workspace.tables["histories"].version()
    users, _ = read_histories(workspace, version)
    return users.to_pylist(), align._read(config, workspace, version, None).source


def test_labels_surrogates_and_oracles_are_of_the_published_list(
    ingested: str, listed: dict[str, tuple[list[int], list[float]]], lm: Path
) -> None:
    users, source = source_of(ingested, lm, hold_out=0)
    rows = np.flatnonzero(source.histories.lengths < 20)
    events = source.histories.lengths[rows]
    taught = teach(source, rows, events, np.random.default_rng(0))
    lessons = Lessons.of(source, rows, events, np.random.default_rng(0))
    ranked = (-(lessons.queries @ lessons.table[1:].T)).argsort(1) + 1
    for at, row in enumerate(rows.tolist()):
        items, scores = listed[users[row]]
        unseen = [item for item in items if item not in source.before_cut(row)]
        assert taught.favourites[at] == unseen[0]
        assert taught.liked[at] in unseen[: len(unseen) // 5]
        assert taught.disliked[at] in unseen[len(unseen) // 2 :]
        expected = [scores[items.index(item)] for item in taught.candidates[at].tolist()]
        np.testing.assert_allclose(taught.scores[at], expected, rtol=1e-4, atol=1e-4)
        assert ranked[at].tolist() == items
    # Other noise would have told other lists.
    by_itself = replace(source, seeds=None)
    assert (teach(by_itself, rows, events, np.random.default_rng(0)).favourites != taught.favourites).mean() > 0.5


def test_an_interpreter_is_asked_about_the_oracle_of_the_published_list(
    ingested: str, listed: dict[str, tuple[list[int], list[float]]], lm: Path
) -> None:
    users, source = source_of(ingested, lm, hold_out=0)
    rows = source.rows(held_out=True, least=2, most=100, rng=np.random.default_rng(0))
    asked: list = []

    class Remembering(RecInterpreter):
        def questions(self, readings, oracles, control=""):
            asked.extend(oracles if not control else [])
            return super().questions(readings, oracles, control)

    class Silent:
        def generate(self, prompts, decoding, choices=None):
            return iter(())

    Remembering(InterpreterConfig(after="item")).measured(source, Silent(), 100, 8)
    assert len(asked) == len(rows) > 3
    for row, oracle in zip(rows.tolist(), asked, strict=True):
        items, scores = listed[users[row]]
        found = source.item_states[items] @ oracle.vector.values[0]
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)


def test_what_is_judged_right_is_what_the_list_says(
    ingested: str, listed: dict[str, tuple[list[int], list[float]]], lm: Path
) -> None:
    workspace = Workspace(ingested)
    (recommender,) = Models(workspace.store).all("dreamrec")
    store_untrained_adapter(ingested, ExplainerConfig(variant="H"), recommender, DREAMREC.width, lm)
    histories = {row["user_id"]: row for row in newest(ingested, "histories").to_pylist()}
    config = AlignConfig(workspace=ingested)
    unseen = {
        user: [item for item in items if item not in histories[user]["items"]] for user, (items, _) in listed.items()
    }
    for user in [user for user, items in unseen.items() if items][:8]:
        for place, expected in ((0, 1.0), (-1, 0.0)):
            write(ingested, MINE, {user: "words"}, (unseen[user][place],))
            figures = judged.sample_explanations(workspace, config, MINE, 10).figures
            assert (figures["decision.cases"], figures["decision.accuracy"]) == (1, expected)
    loaded = Loaded.of(config, workspace, "dreamrec")
    users = pa.array(sorted(histories))
    known = judged._prefixes(users, {user: histories[user]["items"] for user in histories})
    seeds = user_seeds(users, pa.array([histories[user]["history_key"] for user in sorted(histories)]))
    rows = np.arange(len(users))
    for place in (0, 7, SMALL_ITEMS - 1):
        items = np.array([listed[user][0][place] for user in sorted(histories)], np.int32)
        expected_scores = [listed[user][1][place] for user in sorted(histories)]
        found = judged._scores(loaded, known, rows, items, seeds)
        np.testing.assert_allclose(found, expected_scores, rtol=1e-4, atol=1e-4)


def test_seeds_before_the_cut_are_those_of_a_log_that_ends_there(raypipe: Run, ingested: str, tmp_path: Path) -> None:
    """What follows an event moves nothing that is sampled before it."""
    last = {user: [event for event in SMALL_LOG if event[0] == user][-2:] for user, *_ in SMALL_LOG}
    shorter = [event for event in SMALL_LOG if event not in last[event[0]]]
    other = str(tmp_path / "shorter")
    words = ("--log.path", write_log(tmp_path / "log.csv", shorter), "--log.columns.time", "time")
    catalogue = ("--catalogue.path", write_catalogue(tmp_path / "items.csv", SMALL_ITEMS))
    assert raypipe("ingest", "--workspace", other, *words, *catalogue).code == 0
    found = {}
    for uri, hold_out in ((ingested, 2), (other, 0)):
        workspace, rows = Workspace(uri), newest(uri, "histories").sort_by("user_id").combine_chunks()
        users, whole = read_histories(workspace, workspace.tables["histories"].version())
        items = newest(uri, "items").sort_by("index")
        every = read_event_seeds(workspace, workspace.tables["histories"].version(), items)
        published = user_seeds(rows["user_id"].combine_chunks(), rows["history_key"].combine_chunks())
        assert every[whole.ends - 1].tolist() == published.tolist()
        cut = whole.without_last(hold_out)
        seeds = known_seeds(every, whole, hold_out, SMALL_ITEMS)
        assert len(set(seeds.tolist())) == len(seeds) == len(cut.items)
        mine = np.split(seeds, cut.ends)
        found[uri] = {user: mine[row].tolist() for row, user in enumerate(users.to_pylist()) if len(mine[row])}
    assert found[ingested] == found[other]
    assert len(found[other]) == 23


def test_an_item_that_a_model_never_saw_leaves_the_seed_of_the_whole_history() -> None:
    histories = Histories(np.array([1, 9, 2, 9, 9, 9, 3, 4, 9], np.int32), np.array([5, 6, 9]))
    seeds = np.arange(10, 19)
    assert known_seeds(seeds, histories, 0, 8).tolist() == [11, 14, 16, 18]
    assert known_seeds(seeds, histories, 1, 8).tolist() == [11, 13, 16, 17]
    assert known_seeds(seeds, histories, 0, 9).tolist() == seeds.tolist()
