"""Everybody's recommendations in the order of a language model: what changed is asked about, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.language.prompt import Prompt
from raypipe.recommenders.windows import Histories
from raypipe.storage.models import Models, find_model
from raypipe.storage.store import Store
from raypipe.systems.candidate_facts import Facts
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.ranked_logs import ALIGN_TRSR, RANKED_ITEMS, RANKED_USERS, TERSE
from tests.pipeline.small_logs import START, newest, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
SHOWN = ("--summaries", "recurrent")


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
        if (one["user_id"], one["variant"]) == (row["user_id"], "summarize-recurrent")
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


def test_lists_are_put_in_order_by_what_the_language_model_finds_likely(raypipe: Run, ranked: str, files: Path) -> None:
    align = raypipe("align", "--workspace", ranked, *ALIGN_TRSR, "--trsr.facts", *SHOWN)
    assert align.code == 0, align.stderr
    words = ("rerank", "--workspace", ranked, *SHOWN)
    early = raypipe(*words)
    assert early.code == 2
    assert "no lists of the variant recommend-sasrec yet" in one_paragraph(early.stderr)
    assert raypipe("recommend", "--workspace", ranked, "--length", 6).code == 0

    # A cap leaves users for the next run, which loses none.
    capped = raypipe(*words, "--max_calls", 60)
    assert (capped.code, capped.metrics["computed"], capped.metrics["capped"]) == (0, 10, RANKED_USERS + 1 - 10)
    ended = raypipe(*words)
    assert (ended.status, ended.metrics["computed"], ended.metrics["unchanged"]) == ("ok", RANKED_USERS + 1 - 10, 10)
    assert ended.result["cost"]["calls"] == 6 * (RANKED_USERS + 1 - 10)
    assert ended.result["cost"]["tokens_in"] > ended.result["cost"]["calls"]
    before, after = lists(ranked, "recommend-sasrec"), lists(ranked, "rerank-sasrec")
    assert set(after) == set(before)
    for user, row in after.items():
        assert sorted(row["items"]) == sorted(before[user]["items"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert 0 < row["scores"][-1] < row["scores"][0] < 1
    for user in ("u3", "short"):
        np.testing.assert_allclose(after[user]["scores"], expected(ranked, after[user]), atol=1e-5)
    assert raypipe(*words).status == "nothing_to_do"

    # One user did something more: one user is asked about.
    log = write_log(files / "more.csv", [("u3", f"i{RANKED_ITEMS - 1}", START + 100)])
    assert raypipe("ingest", "--workspace", ranked, "--log.path", log, "--log.columns.time", "time").code == 0
    assert raypipe("recommend", "--workspace", ranked, "--length", 6).metrics["computed"] == 1
    again = raypipe(*words)
    assert (again.metrics["computed"], again.metrics["unchanged"]) == (1, RANKED_USERS)
    assert {user: row for user, row in lists(ranked, "rerank-sasrec").items() if user != "u3"} == {
        user: row for user, row in after.items() if user != "u3"
    }

    canary = raypipe(*words, "--sample", 2)
    assert (canary.status, canary.metrics["users"]) == ("ok", 2)


def test_what_cannot_rank_is_refused_before_work_starts(raypipe: Run, ranked: str) -> None:
    cases = {
        ("--ranker", "sasrec"): "sasrec ranks no candidates",
        ("--ranker", "trsr"): "No model trsr is stored",
    }
    for options, problem in cases.items():
        ended = raypipe("rerank", "--workspace", ranked, *options)
        assert ended.code == 2, options
        assert problem in one_paragraph(ended.stderr)
