"""Canaries: the same one runs once at a time, and is of users who are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.pipeline.job import BatchConfig, scope_of
from raypipe.storage.locks import Lock
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph

pytestmark = pytest.mark.usefixtures("ray_cluster")
MERGE = SummaryPrompts().merge.replace("mostly", "often")
ECHO = ("--engine.engine", "echo")


def scope(uri: str) -> str:
    return scope_of(BatchConfig(workspace=uri, sample=3).canary_users(Workspace(uri)))


def test_a_canary_that_runs_is_neither_run_twice_nor_given_up(raypipe: Run, summarised: str) -> None:
    words, where = ("summarize", "--workspace", summarised, *ECHO, "--sample", 3), ("status", "--workspace", summarised)
    workspace = Workspace(summarised)
    manifest = {"base": {"summaries": -1}, "scope": scope(summarised), "created": 0.0}
    run = workspace.ledger("summarize").start("e" * 32, manifest)
    with Lock(workspace.store, f"canary-summarize-{scope(summarised)[:12]}", "summarize"):
        for other_prompt in ((), ("--summaries.prompts.merge", MERGE), ("--summaries.paradigm", "recurrent")):
            ended = raypipe(*words, *other_prompt)
            assert (ended.code, "is being written by summarize" in ended.stderr) == (1, True), ended.stderr
        assert (raypipe(*where, "--discard", "eeee").code, run.result()) == (1, None)
    assert raypipe(*where, "--discard", "eeee").code == 0
    assert raypipe(*words).metrics["computed"] == 3


@pytest.mark.parametrize("job", ["extract", "recommend"])
def test_a_canary_of_a_recommender_is_not_run_twice(raypipe: Run, trained: str, job: str) -> None:
    with Lock(Workspace(trained).store, f"canary-{job}-{scope(trained)[:12]}", job):
        ended = raypipe(job, "--workspace", trained, "--sample", 3)
    assert (ended.code, f"is being written by {job}" in ended.stderr) == (1, True)


def test_a_canary_of_users_without_a_history_is_refused(raypipe: Run, summarised: str, files: Path) -> None:
    (files / "users.txt").write_text("u7\nnobody\nstranger\n", encoding="utf-8")
    ended = raypipe("summarize", "--workspace", summarised, *ECHO, "--users", files / "users.txt")
    assert ended.code == 2
    told = one_paragraph(ended.stderr)
    assert "2 of 3 users of" in told
    assert "have no history, for example 'nobody'" in told
