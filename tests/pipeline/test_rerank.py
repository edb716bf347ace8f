"""Everybody's recommendations in the order of a language model: what changed is asked about, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prompt import Prompt
from raypipe.pipeline.job import BatchConfig, scope_of
from raypipe.pipeline.rerank_units import without_padding
from raypipe.recommenders.windows import Histories
from raypipe.storage.locks import Lock
from raypipe.storage.models import Models, find_model
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.candidate_facts import FORM, Facts
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import LENGTH, make_ready, retitle
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS, CHAIN_USERS, GENRES, START, newest, write_log
from tests.untrained import OF_LM, store_untrained_ranker

pytestmark = pytest.mark.usefixtures("ray_cluster")
LATE = ("--deadline", "2020-01-01T00:00:00Z")


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """Users with lists by a recommender, and a language model whose updates are random, taught by counts of all histories."""
    uri = str(tmp_path / "listed")
    make_ready(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    facts = [FORM.replace("{}", str(number)) for number in range(10)]
    texts = [*titles, *GENRES, TERSE, " yes no NULL title: genre:", *facts]
    lm = tmp_path / "lm"
    tokenizer = train_tokenizer([" ".join(texts)] * 5, ["yes", "no"], [], 500)
    save_untrained(lm, BuiltinLmConfig(size="tiny", context=512), tokenizer)
    Models(Store(uri)).add("lm", lm, "untrained", OF_LM)
    store_untrained_ranker(uri, TrsrConfig(prompt=TERSE, facts=True), lm, summaries="hierarchical")
    return uri


def lists(uri: str, variant: str) -> dict[str, dict]:
    return {row["user_id"]: row for row in newest(uri, "recommendations").to_pylist() if row["variant"] == variant}


def expected(uri: str, row: dict) -> list[float]:
    """The probability of yes to each item of a list, by the engine, of prompts put together by hand."""
    store = Store(uri)
    folders = {
        name: store.local_path(f"{find_model(Models(store), name).folder}/checkpoint") for name in ("lm", "trsr")
    }
    items = {one["index"]: one for one in newest(uri, "items").to_pylist()}
    (history,) = [one["items"] for one in newest(uri, "histories").to_pylist() if one["user_id"] == row["user_id"]]
    (summary,) = [
        one["summary"]
        for one in newest(uri, "summaries").to_pylist()
        if (one["user_id"], one["variant"]) == (row["user_id"], "summarize-hierarchical")
    ]

    def line(index: int) -> str:
        return f"title: {items[index]['title']}; genre: {dict(items[index]['attributes'])['genre'][0]}"

    past = Histories(np.array(history, np.int32), np.array([len(history)]))
    (facts,) = Facts.load(folders["trsr"], len(items)).told(past, np.array([row["items"]], np.int32))
    recent = "\n".join(line(index) for index in history[-5:])
    prompts = [
        Prompt.of(TERSE.format(summary=" ".join(summary.split()), recent=recent, candidate=f"{line(index)}; {fact}"))
        for index, fact in zip(row["items"], facts, strict=True)
    ]
    engine = EngineConfig(lm=str(folders["lm"]), adapter=str(folders["trsr"]), device="cpu", threads=1).build()
    found = [0.0] * len(prompts)
    for scores in engine.score(prompts, [["yes", "no"]] * len(prompts)):
        yes, no = np.exp(scores.logprobs)
        found[scores.index] = yes / (yes + no)
    return found


def test_lists_are_put_in_order_by_what_the_language_model_finds_likely(raypipe: Run, listed: str, files: Path) -> None:
    # It is shown the summaries it was trained with.
    words = ("rerank", "--workspace", listed)
    # A cap leaves users for the next run, which loses none.
    capped = raypipe(*words, "--max_calls", 10 * LENGTH)
    assert capped.code == 0, capped.stderr
    assert (capped.metrics["computed"], capped.metrics["capped"]) == (10, CHAIN_USERS - 10)
    ended = raypipe(*words)
    assert (ended.status, ended.metrics["computed"], ended.metrics["unchanged"]) == ("ok", CHAIN_USERS - 10, 10)
    assert ended.result["cost"]["calls"] == LENGTH * (CHAIN_USERS - 10)
    assert ended.result["cost"]["tokens_in"] > 20 * ended.result["cost"]["calls"]
    before, after = lists(listed, "recommend-sasrec"), lists(listed, "rerank-sasrec")
    assert set(after) == set(before)
    for user, row in after.items():
        assert sorted(row["items"]) == sorted(before[user]["items"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert 0 < row["scores"][-1] < row["scores"][0] < 1
    moved = sum(row["items"][0] != before[user]["items"][0] for user, row in after.items())
    assert moved == capped.metrics["first_moved"] + ended.metrics["first_moved"] > 0
    for user in ("u3", "u7"):
        np.testing.assert_allclose(after[user]["scores"], expected(listed, after[user]), atol=1e-5)
    assert raypipe(*words).status == "nothing_to_do"

    # One user did something more: one user is asked about.
    log = write_log(files / "more.csv", [("u3", "i9", START + 100)])
    assert raypipe("ingest", "--workspace", listed, "--log.path", log, "--log.columns.time", "time").code == 0
    late = raypipe(*words, *LATE)
    counts = ("computed", "unchanged", "capped", "stale")
    assert [late.metrics[name] for name in counts] == [0, CHAIN_USERS - 1, 1, 1]
    assert lists(listed, "rerank-sasrec") == after
    again = raypipe(*words)
    assert [again.metrics[name] for name in counts] == [1, CHAIN_USERS - 1, 0, 0]
    others = {user: row for user, row in lists(listed, "rerank-sasrec").items() if user != "u3"}
    assert others == {user: row for user, row in after.items() if user != "u3"}
    # An item has another title: whoever has it in the list is asked about anew.
    retitle(listed, 9, "Another title")
    renamed = raypipe(*words)
    holders = [user for user, row in before.items() if 9 in row["items"]]
    assert 0 < renamed.metrics["computed"] == len(holders) < CHAIN_USERS
    assert renamed.metrics["unchanged"] == CHAIN_USERS - len(holders)
    store, table = Store(listed), Workspace(listed).tables["recommendations"]
    touched = {file.path: file.size for file in table.files(table.version(), variant="rerank-sasrec")}
    assert 0 < renamed.metrics["bytes_written"] <= sum(touched.values())
    canary = raypipe(*words, "--sample", 2)
    assert (canary.status, canary.metrics["users"]) == ("ok", 2)
    users = scope_of(BatchConfig(workspace=listed, sample=2).canary_users(Workspace(listed)))
    with Lock(store, f"canary-rerank-{users[:12]}", "rerank"):
        assert "is being written by rerank" in raypipe(*words, "--sample", 2).stderr


def test_no_list_in_order_outlives_the_recipe_of_its_list(raypipe: Run, listed: str, files: Path) -> None:
    words = ("rerank", "--workspace", listed, "--summaries", "null")
    raypipe(*words)
    assert len(lists(listed, "rerank-sasrec")) == CHAIN_USERS
    denying = files / "deny.txt"
    denying.write_text("i5\n")
    assert raypipe("recommend", "--workspace", listed, "--length", LENGTH, "--deny", denying).code == 0
    late = raypipe(*words, *LATE)
    assert (late.metrics["capped"], late.metrics["stale"]) == (CHAIN_USERS, 0)
    assert lists(listed, "rerank-sasrec") == {}


def test_what_fills_a_short_list_is_no_item() -> None:
    lists = pa.array([[3, 0, 0], [], [0], [1, 2, 0]], pa.list_(pa.int32()))
    assert without_padding(lists).to_pylist() == [[3], [], [], [1, 2]]
    assert without_padding(lists.slice(2)).to_pylist() == [[], [1, 2]]


def test_what_cannot_rank_is_refused_before_work_starts(raypipe: Run, listed: str) -> None:
    cases = {
        ("--ranker", "sasrec"): "is no adapter, and one of trsr is asked for",
        ("--ranker", "trsr/0"): "No model trsr/0 is stored",
        ("--model", "gru4rec"): "no lists of the variant recommend-gru4rec yet",
        ("--summaries", "recurrent"): "no summaries of the variant summarize-recurrent yet",
        ("--engine.engine", "echo"): "cannot tell how likely an answer is",
    }
    for options, problem in cases.items():
        ended = raypipe("rerank", "--workspace", listed, *options)
        assert ended.code == 2, options
        assert problem in one_paragraph(ended.stderr)
