"""Summarising over HTTP: one bad prompt rejects its user alone, an outage rejects nobody and is gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.engines.chat_server import ChatServer
from tests.ground import one_paragraph
from tests.pipeline.small_logs import DAY, START, newest, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
TITLES = {"i1": "One", "i2": "Two", "evil": "Evil [400]"}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
def uri(raypipe: Run, tmp_path: Path, files: Path) -> str:
    """Twenty users with three events each, and one who met the evil item."""
    events = [(f"u{user}", f"i{n % 2 + 1}", START + n * DAY) for user in range(20) for n in range(3)]
    log = write_log(files / "log.csv", [*events, ("unlucky", "i1", START), ("unlucky", "evil", START + DAY)])
    words = ("--log.columns.time", "time", "--catalogue.path", write_catalogue(files / "items.csv", TITLES))
    workspace = str(tmp_path / "workspace")
    assert raypipe("ingest", "--workspace", workspace, "--log.path", log, *words).code == 0
    return workspace


def words(uri: str, server: ChatServer) -> tuple[object, ...]:
    http = ("--engine.http.url", server.url, "--engine.http.model", "echo", "--engine.http.attempts", 2)
    return ("summarize", "--workspace", uri, "--engine.engine", "openai", *http, "--micro_batch_users", 4)


def test_a_prompt_the_endpoint_refuses_rejects_its_user_alone(raypipe: Run, uri: str, server: ChatServer) -> None:
    ended = raypipe(*words(uri, server))
    assert ended.code == 0, ended.stderr
    assert (ended.metrics["computed"], ended.metrics["rejected"]) == (20, 1)
    (reject,) = newest(uri, "rejects").to_pylist()
    assert (reject["key"], reject["reason"]) == ("unlucky", "refused")
    assert "HTTP 400: told to answer 400" in reject["message"]
    usage = ended.result["cost"]
    assert (usage["calls"], usage["tokens_in"] > 0) == (len(server.requests), True)
    assert usage["calls"] == 22  # one more than users: whether the endpoint refuses everybody


@pytest.mark.parametrize(("cap", "value"), [("--max_tokens", 17_000), ("--max_calls", 16)])
def test_caps_hold_where_the_endpoint_tells_no_tokens_and_fails(
    raypipe: Run, uri: str, server: ChatServer, cap: str, value: int
) -> None:
    server.usage, server.to_all = False, "[500 1]"
    ended = raypipe(*words(uri, server), cap, value)
    assert ended.code == 0, ended.stderr
    cost = ended.result["cost"]
    assert cost["calls"] == len(server.requests)
    spent = cost["calls"] if cap == "--max_calls" else cost["tokens_in"] + cost["tokens_out"]
    assert spent <= value
    assert ended.metrics["computed"] > 0
    assert ended.metrics["capped"] > 0


def test_an_outage_rejects_nobody_and_the_next_run_goes_on(raypipe: Run, uri: str, server: ChatServer) -> None:
    server.down_after = 10
    down = raypipe(*words(uri, server))
    assert (down.code, down.status) == (1, "failed")
    told = one_paragraph(down.stderr)
    assert "answers nothing: HTTP 503" in told
    assert "it goes on where it stopped" in told
    (asked, server.down_after) = (len(server.requests), None)
    again = raypipe(*words(uri, server))
    assert again.code == 0, again.stderr
    assert (again.metrics["computed"], again.metrics["rejected"]) == (20, 1)
    # What is told of it is what all of it took, and how much of that was before.
    cost = again.result["cost"]
    assert 0 < cost["calls_before"] < cost["calls"] == cost["calls_before"] + len(server.requests) - asked


def test_what_a_run_finished_is_kept_where_its_inputs_change_before_the_next(
    raypipe: Run, uri: str, server: ChatServer, tmp_path: Path, files: Path
) -> None:
    whole = str(shutil.copytree(uri, tmp_path / "uninterrupted"))
    server.down_after = 10  # the buckets have 2, 5, 7 and 7 users
    assert raypipe(*words(uri, server)).code == 1
    (run,) = Workspace(uri).open_runs()
    kept = sum(receipt.counts.ok for receipt in run.receipts().values())
    assert 0 < kept < 20
    (asked, server.down_after) = (len(server.requests), None)
    log = write_log(files / "more.csv", [("new", "i1", START + 9 * DAY)])
    for workspace in (uri, whole):
        assert raypipe("ingest", "--workspace", workspace, "--log.path", log, "--log.columns.time", "time").code == 0
    again = raypipe(*words(uri, server))
    assert again.code == 0, again.stderr
    assert "was killed and what it read has changed since" in again.stderr
    first = run.result()
    assert first is not None
    assert (first["status"], first["metrics"]["computed"]) == ("interrupted", kept)
    assert again.metrics["computed"] == 21 - kept
    assert first["metrics"]["rejected"] + again.metrics["rejected"] == 1
    assert len(server.requests) - asked <= 21 - kept + 2  # of the unlucky one, and a probe
    assert raypipe(*words(uri, server)).status == "nothing_to_do"
    assert raypipe(*words(whole, server)).metrics["computed"] == 21
    for table, key in (("summaries", ["user_id"]), ("block_summaries", ["user_id", "level", "block"])):
        order = [(name, "ascending") for name in key]
        found, wanted = (newest(workspace, table).sort_by(order) for workspace in (uri, whole))
        assert found.num_rows > 20
        assert found.equals(wanted)


def test_what_a_run_of_another_variant_finished_is_kept(raypipe: Run, uri: str, server: ChatServer) -> None:
    recurrent = (*words(uri, server), "--summaries.paradigm", "recurrent")
    server.down_after = 10
    assert raypipe(*recurrent).code == 1
    (run,) = Workspace(uri).open_runs()
    kept = sum(receipt.counts.ok for receipt in run.receipts().values())
    assert 0 < kept < 20
    server.down_after = None
    between = raypipe(*words(uri, server))
    assert (between.code, between.metrics["computed"]) == (0, 20), between.stderr
    assert f"run {run.run_key[:12]} was killed and another variant than summarize-recurrent" in between.stderr
    asked = len(server.requests)
    again = raypipe(*recurrent)
    assert (again.code, again.metrics["computed"]) == (0, 20 - kept), again.stderr
    assert len(server.requests) - asked <= 21 - kept + 2  # of the unlucky one, and a probe
    rows = newest(uri, "summaries")["variant"].to_pylist()
    assert {variant: rows.count(variant) for variant in rows} == {
        "summarize-hierarchical": 20,
        "summarize-recurrent": 20,
    }


def test_calls_of_a_unit_that_never_ended_count_against_the_cap(raypipe: Run, uri: str, server: ChatServer) -> None:
    cap = 12
    capped = (*words(uri, server), "--micro_batch_users", 1, "--max_calls", cap, "--engine.http.attempts", 1)
    server.down_after = 6  # within a bucket: they have 2, 5, 7 and 7 users
    assert raypipe(*capped).code == 1
    (asked, server.down_after) = (len(server.requests), None)
    again = raypipe(*capped)
    assert again.code == 0, again.stderr
    answered = 6 + len(server.requests) - asked
    # A user may take two calls, and a probe after each: the last one began with room for these.
    assert cap - 4 < answered <= cap
    # What the unit had when it ended was asked for again.
    assert again.metrics["capped"] > 21 - answered


def test_prompts_go_to_no_other_host_without_consent(raypipe: Run, uri: str, server: ChatServer) -> None:
    ended = raypipe(*words(uri, server), "--engine.http.url", "http://10.1.2.3:8000/v1")
    assert ended.code == 2
    assert "would be sent to 10.1.2.3: set consent to true" in one_paragraph(ended.stderr)


def test_a_run_that_rejects_too_many_stops_with_what_it_saw(
    raypipe: Run, uri: str, server: ChatServer, files: Path
) -> None:
    titles = {**TITLES, "i1": "One [silent]"}
    assert (
        raypipe("ingest", "--workspace", uri, "--catalogue.path", write_catalogue(files / "new.csv", titles)).code == 0
    )
    stopped = raypipe(*words(uri, server))
    assert (stopped.code, stopped.status) == (1, "failed")
    told = one_paragraph(stopped.stderr)
    assert "rows were rejected, more than max_reject_rate 20%" in told
    assert "empty_output: The model wrote nothing." in told
    asked = len(server.requests)
    again = raypipe(*words(uri, server))
    assert (again.code, len(server.requests) > asked) == (1, True)
    tolerated = raypipe(*words(uri, server), "--max_reject_rate", 1)
    assert tolerated.code == 0, tolerated.stderr
    assert (tolerated.metrics["computed"], tolerated.metrics["rejected"]) == (0, 21)


def test_what_a_broken_endpoint_rejected_is_asked_again_once_it_is_mended(
    raypipe: Run, uri: str, server: ChatServer
) -> None:
    server.to_all = "[silent]"
    stopped = raypipe(*words(uri, server))
    assert (stopped.code, "submit again: what was rejected is tried once more" in stopped.stderr) == (1, True)
    server.to_all = ""
    mended = raypipe(*words(uri, server))
    assert mended.code == 0, mended.stderr
    assert "too much was rejected in" in mended.stderr
    # Whose title the endpoint refuses is told apart from the others now.
    assert (mended.metrics["computed"], mended.metrics["rejected"]) == (20, 1)
