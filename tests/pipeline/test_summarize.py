"""Summarising with the echo engine: the cost is what changed, the recipe decides what is computed anew, caps are hard."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from raypipe.engines.engine import EngineConfig
from raypipe.errors import RaypipeError
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.pipeline.summary_state import BucketState, Pins, PromptCatalogue
from raypipe.storage.tables import ABSENT, Table
from raypipe.storage.workspace import Workspace
from tests.conftest import Ended, Run
from tests.pipeline.small_logs import (
    DAY,
    SMALL_LOG,
    START,
    full_cost,
    newest,
    write_log,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")
ECHO = ("--engine.engine", "echo")
# A context in which not even two texts can be merged; most users are rejected for it.
TIGHT = (
    *("--max_reject_rate", 1),
    *("--engine.context", 110),
    *("--summaries.block_decoding.max_new_tokens", 12),
    *("--summaries.merge_decoding.max_new_tokens", 12),
)
LENGTHS = {**{f"u{length}": length for length in range(1, 25)}, "long": 120}
BLOCK = SummaryPrompts().block.replace("how often", "how many times")
MERGE = SummaryPrompts().merge.replace("mostly", "often")


def summaries(uri: str, paradigm: str = "hierarchical") -> dict[str, dict[str, Any]]:
    rows = [row for row in newest(uri, "summaries").to_pylist() if row["variant"] == f"summarize-{paradigm}"]
    assert len({row["user_id"] for row in rows}) == len(rows), "a user is there twice"
    return {row["user_id"]: row for row in rows}


def calls(ended: Ended) -> int:
    assert ended.code == 0, ended.stderr
    return int(ended.result["cost"]["calls"])


def counted(ended: Ended) -> dict[str, int]:
    """The users by what became of them; nothing vanishes."""
    kinds = ("computed", "rejected", "unchanged", "blocked", "capped", "unfinished")
    assert ended.metrics["users"] == sum(ended.metrics[kind] for kind in kinds)
    return {kind: ended.metrics[kind] for kind in kinds if ended.metrics[kind]}


def ingest(raypipe: Run, uri: str, log: Path) -> None:
    assert raypipe("ingest", "--workspace", uri, "--log.path", log, "--log.columns.time", "time").code == 0


def test_every_user_gets_a_summary_at_the_price_of_the_formula(raypipe: Run, ingested: str) -> None:
    planned = raypipe("plan", "--workspace", ingested, *ECHO)
    ended = raypipe("summarize", "--workspace", ingested, *ECHO, "--cluster.workers", 2, "--micro_batch_users", 3)
    assert counted(ended) == {"computed": 25}
    assert calls(ended) == sum(map(full_cost, LENGTHS.values())) == planned.metrics["calls"]
    rows = summaries(ingested)
    assert {user: row["calls"] for user, row in rows.items()} == {u: full_cost(n) for u, n in LENGTHS.items()}
    assert {user: row["covered"] for user, row in rows.items()} == {u: n // 5 for u, n in LENGTHS.items()}
    assert all(row["summary"] for row in rows.values())
    # The echo of every history differs, names no attribute, and there is nothing older to compare with.
    assert (ended.metrics["distinctness"], ended.metrics["untouched_share"], ended.metrics["stability"]) == (
        1,
        None,
        None,
    )
    assert ended.result["cost"]["tokens_in"] == sum(row["tokens_in"] for row in rows.values())
    again = raypipe("summarize", "--workspace", ingested, *ECHO)
    assert (again.code, again.status) == (0, "nothing_to_do")


def test_a_second_night_computes_exactly_the_changed_users_and_their_new_blocks(
    raypipe: Run, summarised: str, files: Path
) -> None:
    before = summaries(summarised)
    # u7 gets one event (its partial block changes), u10 six (two new blocks), u3 an early one (all changes), new is new.
    later = START + 300 * DAY
    events = [("u7", "i9", later), *(("u10", f"i{n}", later + n) for n in range(1, 7)), ("u3", "i39", START - DAY)]
    events += [("new", f"i{n}", later + n) for n in range(1, 13)]
    ingest(raypipe, summarised, write_log(files / "tuesday.csv", [*events, *SMALL_LOG[:9]]))
    ended = raypipe("summarize", "--workspace", summarised, *ECHO)
    assert counted(ended) == {"computed": 4, "unchanged": 22}
    # u7: block 1 and merge; u10: blocks 2, 3 and merge; u3: one block; new: three blocks and merge.
    assert calls(ended) == (1 + 1) + (2 + 1) + 1 + (3 + 1)
    after = summaries(summarised)
    assert {user for user, row in after.items() if row != before.get(user)} == {"u3", "u7", "u10", "new"}
    assert {user: after[user]["calls"] for user in ("u3", "u7", "u10", "new")} == {"u3": 1, "u7": 2, "u10": 3, "new": 4}

    # The incremental night equals the full recomputation of the same histories.
    fresh = Workspace(summarised)
    for table in ("summaries", "block_summaries"):
        fresh.store.delete_folder(f"tables/{table}")
    full = raypipe("summarize", "--workspace", summarised, *ECHO)
    assert counted(full) == {"computed": 26}
    shaped = {user: (row["summary"], row["change_key"], row["covered_key"]) for user, row in after.items()}
    assert {u: (r["summary"], r["change_key"], r["covered_key"]) for u, r in summaries(summarised).items()} == shaped


def test_recurrent_summaries_read_new_blocks_alone_and_stand_beside_the_others(
    raypipe: Run, summarised: str, files: Path
) -> None:
    words = ("summarize", "--workspace", summarised, *ECHO, "--summaries.paradigm", "recurrent")
    hierarchical = summaries(summarised)
    planned = raypipe("plan", *words[1:])
    first = raypipe(*words)
    assert counted(first) == {"computed": 25}
    assert calls(first) == sum(-(-length // 5) for length in LENGTHS.values()) == planned.metrics["calls"]
    rows = summaries(summarised, "recurrent")
    assert {user: row["covered"] for user, row in rows.items()} == {u: n // 5 for u, n in LENGTHS.items()}
    assert rows["u10"]["carry"] == rows["u10"]["summary"] != rows["u11"]["carry"]
    assert rows["u4"]["carry"] is None
    assert summaries(summarised) == hierarchical

    later = START + 300 * DAY
    events = [("u7", "i9", later), *(("u10", f"i{n}", later + n) for n in range(1, 7)), ("u24", "i39", START + 1)]
    ingest(raypipe, summarised, write_log(files / "tuesday.csv", events))
    second = raypipe(*words)
    # u7: its partial block; u10: a full one and a partial one; u24, whose past changed: all five.
    assert calls(second) == 1 + 2 + 5
    assert counted(second) == {"computed": 3, "unchanged": 22}
    after = summaries(summarised, "recurrent")
    assert raypipe(*words).status == "nothing_to_do"
    workspace = Workspace(summarised)
    for table in ("summaries", "block_summaries"):
        workspace.store.delete_folder(f"tables/{table}")
    assert counted(raypipe(*words)) == {"computed": 25}
    costs = {"calls", "tokens_in", "tokens_out"}
    shaped = {user: {name: row[name] for name in row if name not in costs} for user, row in after.items()}
    whole = summaries(summarised, "recurrent")
    assert {user: {name: row[name] for name in row if name not in costs} for user, row in whole.items()} == shaped


@pytest.mark.parametrize("paradigm", ["hierarchical", "recurrent"])
def test_an_endless_history_is_read_over_several_nights(raypipe: Run, ingested: str, paradigm: str) -> None:
    all_of_it = ("--summaries.window_events", 200, "--summaries.paradigm", paradigm)
    words = ("summarize", "--workspace", ingested, *ECHO, *all_of_it, "--summaries.max_blocks_per_run", 10)
    first = raypipe(*words)
    assert {kind: first.metrics[kind] for kind in ("computed", "unfinished")} == {"computed": 24, "unfinished": 1}
    assert "1 users have more blocks than one run reads" in first.stderr
    assert ("long" in summaries(ingested, paradigm)) == (paradigm == "recurrent")
    second, third, fourth = (raypipe(*words) for _ in range(3))
    assert (second.metrics["unfinished"], calls(second)) == (1, 10)
    assert (third.metrics["computed"], calls(third)) == (1, 4 + (paradigm == "hierarchical"))
    assert fourth.status == "nothing_to_do"
    found = summaries(ingested, paradigm)["long"]["summary"]
    Workspace(ingested).store.delete_folder("tables/summaries")
    Workspace(ingested).store.delete_folder("tables/block_summaries")
    assert raypipe("summarize", "--workspace", ingested, *ECHO, *all_of_it).code == 0
    assert summaries(ingested, paradigm)["long"]["summary"] == found


def test_a_word_of_the_block_prompt_recomputes_all_and_of_the_merge_prompt_only_merges(
    raypipe: Run, summarised: str
) -> None:
    merges = sum(length > 5 for length in LENGTHS.values())
    merge = raypipe("summarize", "--workspace", summarised, *ECHO, "--summaries.prompts.merge", MERGE)
    assert calls(merge) == merges
    assert counted(merge) == {"computed": 25}
    block = raypipe(
        "summarize",
        "--workspace",
        summarised,
        *ECHO,
        "--summaries.prompts.merge",
        MERGE,
        "--summaries.prompts.block",
        BLOCK,
    )
    assert calls(block) == sum(map(full_cost, LENGTHS.values()))


def test_a_smaller_window_costs_merges_only(raypipe: Run, summarised: str) -> None:
    ended = raypipe("summarize", "--workspace", summarised, *ECHO, "--summaries.window_events", 15)
    # 15 events are three blocks, of which a partial last one leaves two full ones.
    assert calls(ended) == sum(length > 5 for length in LENGTHS.values())
    assert (
        newest(summarised, "block_summaries")
        .filter([user == "long" for user in newest(summarised, "block_summaries")["user_id"].to_pylist()])
        .num_rows
        == 3
    )


def test_workers_and_batches_recompute_nothing(raypipe: Run, summarised: str) -> None:
    for options in (
        ("--cluster.workers", 2),
        ("--micro_batch_users", 1),
        ("--engine.batch_tokens", 99),
        ("--engine.dtype", "bfloat16"),
        ("--max_calls", 1),
        ("--price_in", 7),
    ):
        assert raypipe("summarize", "--workspace", summarised, *ECHO, *options).status == "nothing_to_do", options


@pytest.mark.parametrize("way", ["sample", "users"])
def test_a_canary_never_touches_the_production_tables(raypipe: Run, summarised: str, files: Path, way: str) -> None:
    workspace = Workspace(summarised)
    before = {name: table.version() for name, table in workspace.tables.items()}
    (files / "users.txt").write_text("u7\nlong\n", encoding="utf-8")
    option = ("--sample", 3) if way == "sample" else ("--users", files / "users.txt")
    ended = raypipe("summarize", "--workspace", summarised, *ECHO, *option, "--summaries.prompts.merge", MERGE)
    assert counted(ended) == {"computed": 3 if way == "sample" else 2}
    assert {name: table.version() for name, table in workspace.tables.items()} == before
    folder = f"canary/{ended.result['run_key']}/summaries"
    canary = Table(workspace.store, workspace.tables["summaries"].spec, folder)
    assert canary.rows(canary.version()) == (3 if way == "sample" else 2)
    assert raypipe("summarize", "--workspace", summarised, *ECHO).status == "nothing_to_do"


def test_a_cap_on_calls_is_hard_and_the_next_run_does_the_rest(raypipe: Run, ingested: str) -> None:
    total, spent, runs = sum(map(full_cost, LENGTHS.values())), 0, 0
    while spent < total:
        runs += 1
        ended = raypipe("summarize", "--workspace", ingested, *ECHO, "--max_calls", 40, "--cluster.workers", 2)
        assert 0 < calls(ended) <= 40
        spent += calls(ended)
        assert runs < 6
    assert spent == total
    assert counted(ended).get("capped") is None
    assert len(summaries(ingested)) == 25
    assert raypipe("summarize", "--workspace", ingested, *ECHO).status == "nothing_to_do"


def test_who_did_most_since_the_last_summary_is_read_first(raypipe: Run, summarised: str, files: Path) -> None:
    later = START + 300 * DAY
    new = {"u7": 1, "u10": 6, "u3": 3, "u24": 9, "fresh": 4}
    events = [(user, f"i{n + 1}", later + n) for user, count in new.items() for n in range(count)]
    ingest(raypipe, summarised, write_log(files / "tuesday.csv", events))
    workspace = Workspace(summarised)
    config = SummarizeConfig(workspace=summarised, engine=EngineConfig(engine="echo"))
    names = ("histories", "items", "summaries", "block_summaries", "rejects")
    pins = Pins(**{name: workspace.tables[name].version() for name in names})
    catalogue = PromptCatalogue(workspace.tables["items"].read(pins.items), config.summaries)
    order = {}
    for bucket in range(4):
        state = BucketState(workspace, bucket, pins, config.recipes(workspace, None), config.summaries, catalogue)
        users = state.users.to_pylist()
        order[bucket] = [users[place] for place in state.changed_by_activity]
    assert sorted(user for users in order.values() for user in users) == sorted(new)
    # Events after the last full block count as not yet read: u7 had two, u3 three, u24 four.
    unread = {"u7": 3, "u10": 6, "u3": 6, "u24": 13, "fresh": 4}
    for users in order.values():
        assert [unread[user] for user in users] == sorted((unread[user] for user in users), reverse=True)


@pytest.mark.parametrize(
    ("cap", "value", "spent"),
    [
        ("--max_calls", 0, lambda cost: cost["calls"]),
        ("--max_tokens", 24_000, lambda cost: cost["tokens_in"] + cost["tokens_out"]),
        ("--max_cost", 0.1, lambda cost: cost["money"]),
        ("--deadline", datetime.datetime.now(datetime.UTC).isoformat(), lambda cost: cost["calls"]),
    ],
    ids=["calls", "tokens", "cost", "deadline"],
)
def test_no_cap_is_ever_exceeded(raypipe: Run, ingested: str, cap: str, value: Any, spent: Any) -> None:
    ended = raypipe("summarize", "--workspace", ingested, *ECHO, cap, value, "--price_in", 1, "--price_out", 9)
    assert ended.code == 0
    most = 0 if cap == "--deadline" else value
    assert spent(ended.result["cost"]) <= most
    assert ended.metrics["capped"] > 0
    assert (ended.metrics["computed"] > 0) == (cap in {"--max_tokens", "--max_cost"})


def test_a_user_who_cannot_be_summarised_is_rejected_and_blocked_until_his_history_changes(
    raypipe: Run, ingested: str, files: Path
) -> None:
    small = (*ECHO, *TIGHT)
    ended = raypipe("summarize", "--workspace", ingested, *small)
    failed = {user for user, length in LENGTHS.items() if length > 5}
    assert counted(ended) == {"computed": 5, "rejected": len(failed)}
    rejects = newest(ingested, "rejects").to_pylist()
    assert {(row["key"], row["reason"]) for row in rejects} == {(user, "prompt_too_long") for user in failed}
    assert set(summaries(ingested)) == set(LENGTHS) - failed

    assert raypipe("summarize", "--workspace", ingested, *small).status == "nothing_to_do"
    ingest(
        raypipe,
        ingested,
        write_log(files / "more.csv", [("u7", "i1", START + 99 * DAY), ("u2", "i1", START + 99 * DAY)]),
    )
    next_night = raypipe("summarize", "--workspace", ingested, *small)
    assert counted(next_night) == {"computed": 1, "rejected": 1, "unchanged": 4, "blocked": len(failed) - 1}

    retried = raypipe("retry-rejected", "--workspace", ingested)
    assert retried.code == 0
    assert newest(ingested, "rejects").num_rows == 0
    assert counted(raypipe("summarize", "--workspace", ingested, *small)) == {"rejected": len(failed), "unchanged": 5}


def test_a_rejected_user_keeps_an_older_summary_only_if_it_is_of_the_same_recipe(
    raypipe: Run, ingested: str, files: Path
) -> None:
    raypipe("summarize", "--workspace", ingested, *ECHO, *TIGHT)
    older = summaries(ingested)["u5"]
    # A sixth event makes two blocks, whose merge does not fit: the summary of five events stays, and counts as stale.
    ingest(raypipe, ingested, write_log(files / "more.csv", [("u5", "i1", START + 99 * DAY)]))
    ended = raypipe("summarize", "--workspace", ingested, *ECHO, *TIGHT)
    assert counted(ended)["rejected"] == 1
    assert ended.metrics["stale"] == 1
    assert summaries(ingested)["u5"] == older
    told = raypipe("status", "--workspace", ingested)
    assert told.metrics["stale"] == {"summarize-hierarchical": 1}
    assert "summarize-hierarchical: 1 older rows stand in for new ones" in told.stderr
    # With another recipe the older row would be a stale mix.
    changed = raypipe("summarize", "--workspace", ingested, *ECHO, *TIGHT, "--summaries.prompts.block", BLOCK)
    assert changed.metrics["stale"] == 0
    assert set(summaries(ingested)) == {"u1", "u2", "u3", "u4"}


def test_a_cap_leaves_no_summary_of_another_recipe(raypipe: Run, ingested: str) -> None:
    raypipe("summarize", "--workspace", ingested, *ECHO)
    assert summaries(ingested)
    other = ("--summaries.prompts.block", BLOCK)
    capped = raypipe("summarize", "--workspace", ingested, *ECHO, *other, "--max_calls", 0)
    assert (capped.code, counted(capped)) == (0, {"capped": len(LENGTHS)})
    assert summaries(ingested) == {}


@pytest.mark.parametrize("table", ["block_summaries", "summaries"])
def test_a_publish_that_was_interrupted_is_completed_by_the_next_job_of_any_kind(
    raypipe: Run, ingested: str, files: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    publish = Table.publish

    def fail(self: Table, *args: Any, **options: Any) -> int:
        if self.spec.name == table:
            raise RaypipeError("The network is gone.", "Wait.")
        return publish(self, *args, **options)

    monkeypatch.setattr(Table, "publish", fail)
    killed = raypipe("summarize", "--workspace", ingested, *ECHO)
    assert (killed.code, killed.status) == (1, "failed")
    monkeypatch.undo()
    status = raypipe("status", "--workspace", ingested)
    assert [(run["job"], run["state"]) for run in status.metrics["open_runs"]] == [("summarize", "publishing")]

    ingest(raypipe, ingested, write_log(files / "more.csv", [("u2", "i1", START + 99 * DAY)]))
    assert len(summaries(ingested)) == 25
    assert newest(ingested, "block_summaries").num_rows > 25
    assert raypipe("status", "--workspace", ingested).metrics["open_runs"] == []
    assert counted(raypipe("summarize", "--workspace", ingested, *ECHO)) == {"computed": 1, "unchanged": 24}


def test_a_run_whose_staged_file_was_harmed_publishes_nothing_and_can_be_given_up(
    raypipe: Run, ingested: str, monkeypatch
) -> None:
    from raypipe.runtime.session import Session

    publish = Session.publish

    def harm(self: Session, run: Any, parts: Any, result: Any) -> Any:
        file = parts[0].files[0]
        path = Path(ingested) / "tables" / parts[0].table / file.path
        path.write_bytes(path.read_bytes()[:-10])
        return publish(self, run, parts, result)

    monkeypatch.setattr(Session, "publish", harm)
    failed = raypipe("summarize", "--workspace", ingested, *ECHO)
    assert (failed.code, failed.status) == (1, "failed")
    assert "missing or not" in failed.stderr
    monkeypatch.undo()
    assert Workspace(ingested).tables["summaries"].version() == ABSENT
    (open_run,) = raypipe("status", "--workspace", ingested).metrics["open_runs"]
    assert raypipe("status", "--workspace", ingested, "--discard", open_run["run_key"]).code == 0
    assert counted(raypipe("summarize", "--workspace", ingested, *ECHO)) == {"computed": 25}


def test_the_job_runs_on_an_object_store_just_the_same(raypipe: Run, s3_uri: str, ingested: str, files: Path) -> None:
    from tests.pipeline.small_logs import SMALL_ITEMS, write_catalogue

    log, catalogue = write_log(files / "log.csv", SMALL_LOG), write_catalogue(files / "items.csv", SMALL_ITEMS)
    raypipe(
        "ingest", "--workspace", s3_uri, "--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue
    )
    assert counted(raypipe("summarize", "--workspace", s3_uri, *ECHO)) == {"computed": 25}
    raypipe("summarize", "--workspace", ingested, *ECHO)
    assert summaries(s3_uri) == summaries(ingested)
