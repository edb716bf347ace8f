"""`extract` and `recommend`: every user whose history, model or options changed, and nobody else."""

from __future__ import annotations

import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypipe.cli.main import main
from raypipe.pipeline.encode_units import list_column
from raypipe.pipeline.extract import state_recipe
from raypipe.pipeline.recommender_rows import Recommendations
from raypipe.pipeline.rejects import WORKER_DIED, stage_rejected
from raypipe.pipeline.user_rows import change_keys
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import WHOLE, Ledger, Unit
from raypipe.storage.models import Models
from raypipe.storage.schemas import HISTORIES
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Ended, Run
from tests.ground import one_paragraph
from tests.pipeline.small_logs import CHAIN_ITEMS as ITEMS
from tests.pipeline.small_logs import CHAIN_LENGTH as LENGTH
from tests.pipeline.small_logs import CHAIN_USERS as USERS
from tests.pipeline.small_logs import DAY, START, newest, write_catalogue, write_log
from tests.untrained import store_untrained


def model_of(uri: str, name: str = "sasrec") -> Recommender:
    store = Store(uri)
    model = Models(store).newest(name)
    assert model is not None
    return load_recommender(store.local_path(f"{model.folder}/checkpoint"))[0]


def histories(uri: str) -> dict[str, list[int]]:
    table = Workspace(uri).tables["histories"]
    rows = table.read(table.version(), HISTORIES.columns.names)
    return dict(zip(rows["user_id"].to_pylist(), rows["items"].to_pylist(), strict=True))


def rows_of(uri: str, table: str) -> dict[Any, dict[str, Any]]:
    rows = newest(uri, table).to_pylist()
    keyed = {(row["user_id"], row.get("position")): row for row in rows}
    assert len(keyed) == len(rows), "a row is there twice"
    return keyed


def counted(ended: Ended) -> dict[str, int]:
    assert ended.code == 0, ended.stderr
    names = ("users", "computed", "rejected", "unchanged", "blocked", "cold")
    counts = {name: ended.metrics[name] for name in names}
    assert counts["users"] == sum(counts[name] for name in names[1:])
    return {name: count for name, count in counts.items() if count and name != "users"}


def test_states_are_those_of_the_model(raypipe: Run, trained: str) -> None:
    assert counted(raypipe("extract", "--workspace", trained)) == {"computed": USERS}
    model, known = model_of(trained), histories(trained)
    rows = rows_of(trained, "hidden_states")
    assert {user for user, _ in rows} == set(known)
    for (user, position), row in rows.items():
        assert position == LENGTH - 1
        expected = model.encode(Sequences.of([known[user]]))[0]
        np.testing.assert_allclose(row["state"], expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    items = newest(trained, "item_states").sort_by("item_index")
    assert items["item_index"].to_pylist() == list(range(1, ITEMS + 1))
    assert np.array_equal(np.array(items["state"].to_pylist(), np.float32), model.item_states().detach().numpy()[1:])
    again = raypipe("extract", "--workspace", trained)
    assert again.status == "nothing_to_do"


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_all_positions_are_the_states_of_prefixes_whatever_follows(raypipe: Run, trained: str, name: str) -> None:
    """Of a window of six among the events; a model may read both ways, and the future is still not seen."""
    if name != "sasrec":
        options = {"model": name, "width": 8, "hidden": 8, "max_length": 6}
        store_untrained(trained, RecommenderConfig.model_validate(options))
    words = ("extract", "--workspace", trained, "--model", name, "--positions", "all")
    assert counted(raypipe(*words)) == {"computed": USERS}
    model, known = model_of(trained, name), histories(trained)
    rows = rows_of(trained, "hidden_states")
    assert {position for _, position in rows} == set(range(LENGTH))
    for user in ("u0", "u17"):
        for place in range(LENGTH):
            expected = model.encode(Sequences.of([known[user][: place + 1]]))[0].detach().numpy()
            np.testing.assert_allclose(rows[user, place]["state"], expected, rtol=1e-5, atol=1e-5)


def test_oracles_are_what_lists_are_ranked_by(raypipe: Run, trained: str) -> None:
    options = {"model": "dreamrec", "width": 8, "hidden": 8, "max_length": 6, "dreamrec": {"steps": 10}}
    store_untrained(trained, RecommenderConfig.model_validate(options))
    for positions in ("last", "all"):
        words = ("--model", "dreamrec", "--vectors", "queries", "--positions", positions)
        assert counted(raypipe("extract", "--workspace", trained, *words)) == {"computed": USERS}
    words = ("--model", "dreamrec", "--no-filter_seen", "--length", ITEMS)
    assert counted(raypipe("recommend", "--workspace", trained, *words)) == {"computed": USERS}
    items = [row for row in newest(trained, "item_states").to_pylist() if row["variant"] == "extract-dreamrec-queries"]
    vectors = np.array([row["state"] for row in sorted(items, key=itemgetter("item_index"))])
    lists = rows_of(trained, "recommendations")
    last, every = (rows_of_variant(trained, f"extract-dreamrec-queries{end}") for end in ("", "-all"))
    assert (len(last), len(every)) == (USERS, USERS * LENGTH)
    for (user, position), row in last.items():
        scores = vectors @ np.array(row["state"])
        listed = lists[user, None]
        np.testing.assert_allclose(scores[np.array(listed["items"]) - 1], listed["scores"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(every[user, position]["state"], row["state"], rtol=1e-4, atol=1e-4)


def test_only_changed_users_are_computed_and_both_kinds_of_states_live_side_by_side(
    raypipe: Run, trained: str, files: Path
) -> None:
    raypipe("extract", "--workspace", trained)
    raypipe("extract", "--workspace", trained, "--positions", "all")
    log = write_log(files / "more.csv", [("u3", "i1", START + DAY), ("new", "i2", START + DAY)])
    assert raypipe("ingest", "--workspace", trained, "--log.path", log, "--log.columns.time", "time").code == 0
    before = {key: row["state"] for key, row in rows_of_variant(trained, "extract-sasrec").items()}
    version = Workspace(trained).tables["item_states"].version()
    assert counted(raypipe("extract", "--workspace", trained)) == {"computed": 2, "unchanged": USERS - 1}
    assert Workspace(trained).tables["item_states"].version() == version, "the same item states are not written again"
    after = {key: row["state"] for key, row in rows_of_variant(trained, "extract-sasrec").items()}
    assert set(after) - set(before) == {("u3", LENGTH), ("new", 0)}
    assert set(before) - set(after) == {("u3", LENGTH - 1)}
    assert all(after[key] == before[key] for key in set(before) & set(after))
    assert len(rows_of_variant(trained, "extract-sasrec-all")) == USERS * LENGTH


def rows_of_variant(uri: str, variant: str) -> dict[Any, dict[str, Any]]:
    rows = [row for row in newest(uri, "hidden_states").to_pylist() if row["variant"] == variant]
    return {(row["user_id"], row["position"]): row for row in rows}


def test_lists_are_the_exact_best_and_hold_nothing_seen(raypipe: Run, trained: str) -> None:
    assert counted(raypipe("recommend", "--workspace", trained, "--length", 5)) == {"computed": USERS}
    model, known = model_of(trained), histories(trained)
    hits = 0
    for (user, _), row in rows_of(trained, "recommendations").items():
        scores = model.score(model.encode(Sequences.of([known[user]])))[0].detach()
        scores[[0, *known[user]]] = -torch.inf
        best = scores.topk(5)
        assert row["items"] == best.indices.tolist()
        np.testing.assert_allclose(row["scores"], best.values.numpy(), rtol=1e-5, atol=1e-5)
        hits += row["items"][0] == known[user][-1] % ITEMS + 1
    assert hits > 0.9 * USERS
    assert raypipe("recommend", "--workspace", trained, "--length", 5).status == "nothing_to_do"
    assert counted(raypipe("recommend", "--workspace", trained, "--length", 6)) == {"computed": USERS}


def test_after_the_deadline_nobody_is_worked_on_and_the_next_run_does_it(raypipe: Run, trained: str) -> None:
    words = ("recommend", "--workspace", trained, "--length", 5)
    late = raypipe(*words, "--deadline", "2020-01-01T00:00:00Z")
    assert (late.code, late.status, late.metrics["computed"]) == (0, "nothing_to_do", 0), late.stderr
    assert late.metrics["capped"] == late.metrics["users"] > 0
    assert f"left {late.metrics['users']} users for the next run" in late.stderr
    assert newest(trained, "recommendations").num_rows == 0
    ended = raypipe(*words)
    assert (ended.metrics["computed"], ended.metrics["capped"]) == (late.metrics["users"], 0)


def test_who_is_left_out_by_the_deadline_keeps_the_list_of_the_night_before(
    raypipe: Run, trained: str, files: Path
) -> None:
    words = ("recommend", "--workspace", trained, "--length", 5)
    raypipe(*words)
    before = rows_of(trained, "recommendations")
    changed = [f"u{n}" for n in range(0, USERS, 2)]
    events = [(user, "i1", START + DAY) for user in changed]
    log = write_log(files / "more.csv", [*events, ("new", "i2", START + DAY)])
    assert raypipe("ingest", "--workspace", trained, "--log.path", log, "--log.columns.time", "time").code == 0
    deadline = ("--deadline", "2020-01-01T00:00:00Z")
    late = raypipe(*words, *deadline)
    counts = ("computed", "unchanged", "capped", "stale")
    assert [late.metrics[name] for name in counts] == [0, USERS - len(changed), len(changed) + 1, len(changed)]
    assert rows_of(trained, "recommendations") == before
    ended = raypipe(*words)
    assert [ended.metrics[name] for name in counts] == [len(changed) + 1, USERS - len(changed), 0, 0]
    after = rows_of(trained, "recommendations")
    assert {user for user, _ in after if after[user, None] != before.get((user, None))} == {*changed, "new"}
    # Lists of another recipe may hold what is denied by now: nobody keeps one.
    denying = files / "deny.txt"
    denying.write_text("i5\n")
    other = raypipe(*words, *deadline, "--deny", denying)
    assert [other.metrics[name] for name in counts] == [0, 0, USERS + 1, 0]
    assert newest(trained, "recommendations").num_rows == 0


def test_who_is_blocked_keeps_all_older_states_or_none(raypipe: Run, trained: str, files: Path, tmp_path: Path) -> None:
    words = ("extract", "--workspace", trained, "--positions", "all")
    raypipe(*words)
    before = rows_of(trained, "hidden_states")
    log = write_log(files / "more.csv", [(user, "i1", START + DAY) for user in ("u1", "u2")])
    assert raypipe("ingest", "--workspace", trained, "--log.path", log, "--log.columns.time", "time").code == 0
    keys = {row["user_id"]: row["history_key"] for row in newest(trained, "histories").to_pylist()}
    model = Models(Store(trained)).newest("sasrec")
    assert model is not None
    (key,) = change_keys(pa.array([keys["u1"]]), state_recipe(model.hash, "all")).to_pylist()
    reject(trained, tmp_path, "hidden_states", "extract-sasrec-all", "u1", key)
    ended = raypipe(*words)
    assert counted(ended) == {"computed": 1, "unchanged": USERS - 2, "blocked": 1}
    assert ended.metrics["stale"] == 1
    after = rows_of(trained, "hidden_states")
    assert {row for row in after if row[0] == "u2"} == {("u2", place) for place in range(LENGTH + 1)}
    others = {place: row for place, row in before.items() if place[0] != "u2"}
    assert {place: row for place, row in after.items() if place[0] != "u2"} == others


def test_denied_unavailable_and_other_items_are_in_no_list(raypipe: Run, trained: str, files: Path) -> None:
    deny = files / "deny.txt"
    deny.write_text("i5\r\ni6\r\ni 7\r\n")
    catalogue = files / "fewer.csv"
    catalogue.write_text("".join(line for line in _catalogue_lines(files) if not line.startswith("i7,")))
    assert raypipe("ingest", "--workspace", trained, "--catalogue.path", catalogue).code == 0
    denied = raypipe("recommend", "--workspace", trained, "--length", 3, "--deny", deny)
    assert counted(denied) == {"computed": USERS}
    assert "recommend: 1 of 3 denied ids are no item's and deny nothing, for example 'i 7'" in denied.stderr
    listed = {item for row in newest(trained, "recommendations").to_pylist() for item in row["items"]}
    assert listed
    assert not listed & {5, 6, 7}
    only = raypipe("recommend", "--workspace", trained, "--length", 3, "--only", '{"genre": "War"}')
    assert counted(only) == {"computed": USERS}
    listed = {item for row in newest(trained, "recommendations").to_pylist() for item in row["items"]}
    assert {(item - 1) % 5 for item in listed - {0}} == {2}
    too_many = raypipe("recommend", "--workspace", trained, "--length", 20, "--only", '{"genre": "War"}')
    assert too_many.code == 2
    assert "Lists of 20 were asked for, and 6 of the model's 30 items" in one_paragraph(too_many.stderr)


def _catalogue_lines(files: Path) -> list[str]:
    return write_catalogue(files / "all.csv", ITEMS).read_text().splitlines(keepends=True)


def test_users_of_items_the_model_never_saw_are_cold(raypipe: Run, trained: str, files: Path) -> None:
    catalogue = files / "more.csv"
    catalogue.write_text("".join([*_catalogue_lines(files), "x1,Brand New,War\n", "x2,Brand Newer,War\n"]))
    log = write_log(files / "cold.csv", [("cold", "x1", START), ("half", "x2", START), ("half", "i4", START + 1)])
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", trained, *words).code == 0
    assert counted(raypipe("extract", "--workspace", trained)) == {"computed": USERS + 1, "cold": 1}
    assert counted(raypipe("recommend", "--workspace", trained, "--length", 4)) == {"computed": USERS + 2}
    rows = rows_of(trained, "recommendations")
    assert len(rows["cold", None]["items"]) == 4
    assert np.isnan(rows["cold", None]["scores"]).all()
    model = model_of(trained)
    expected = model.encode(Sequences.of([[4]]))[0].detach().numpy()
    states = rows_of(trained, "hidden_states")
    np.testing.assert_allclose(states["half", 1]["state"], expected, rtol=1e-5, atol=1e-5)
    # There stays nothing to say of who is cold, which is no reason to write everybody else of the bucket anew.
    written = files_of_bucket(trained, "cold")
    log = write_log(files / "one.csv", [(users_of_other_buckets(trained, "cold")[0], "i1", START + DAY)])
    assert raypipe("ingest", "--workspace", trained, "--log.path", log, "--log.columns.time", "time").code == 0
    assert counted(raypipe("extract", "--workspace", trained)) == {"computed": 1, "unchanged": USERS, "cold": 1}
    assert files_of_bucket(trained, "cold") == written


def files_of_bucket(uri: str, user: str) -> list[str]:
    """The files with the states of the user's bucket."""
    table, histories = (Workspace(uri).tables[name] for name in ("hidden_states", "histories"))
    rows = histories.read(histories.version(), ["user_id", "bucket"]).to_pylist()
    (bucket,) = (row["bucket"] for row in rows if row["user_id"] == user)
    return [file.path for file in table.files(table.version(), bucket=bucket)]


def users_of_other_buckets(uri: str, user: str) -> list[str]:
    histories = Workspace(uri).tables["histories"]
    rows = histories.read(histories.version(), ["user_id", "bucket"]).to_pylist()
    (bucket,) = (row["bucket"] for row in rows if row["user_id"] == user)
    return [row["user_id"] for row in rows if row["bucket"] != bucket]


def test_what_dreamrec_samples_is_the_same_in_every_batch() -> None:
    options = {"model": "dreamrec", "width": 8, "hidden": 8, "max_length": 6, "dreamrec": {"steps": 10}}
    model = RecommenderConfig.model_validate(options).build(ITEMS).eval()
    lists = [[1, 2, 3], [1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    known = Histories(np.array([item for items in lists for item in items], np.int32), np.cumsum(list(map(len, lists))))
    seeds = np.array([11, 12, 13, 14])
    rows = Recommendations(ITEMS, False, np.arange(ITEMS + 1) > 0, np.zeros(0, np.int32))
    together = rows.warm(model, known, np.arange(4), seeds).to_pylist()
    alone = [rows.warm(model, known, np.array([n]), seeds[n : n + 1]).to_pylist()[0] for n in range(4)]
    for row, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(row["scores"], single["scores"], rtol=1e-3, atol=1e-3)
    # The same history of two users: their own samples.
    assert not np.allclose(together[0]["scores"], together[1]["scores"], atol=1e-2)


def test_a_width_of_nothing_is_a_list_of_nothing() -> None:
    assert list_column(np.zeros((3, 0), np.int32)).to_pylist() == [[], [], []]
    assert list_column(np.arange(4, dtype=np.int32).reshape(2, 2)).to_pylist() == [[0, 1], [2, 3]]


def test_a_user_who_killed_his_workers_is_rejected_blocked_and_can_be_retried(
    raypipe: Run, trained: str, tmp_path: Path
) -> None:
    reject(trained, tmp_path, "recommendations", "recommend-sasrec", "u1", change_key(trained, "u1"))
    words = ("recommend", "--workspace", trained, "--length", 5)
    assert counted(raypipe(*words)) == {"computed": USERS - 1, "blocked": 1}
    assert raypipe("retry-rejected", "--workspace", trained, "--table", "recommendations").metrics["retried"] == 1
    assert counted(raypipe(*words)) == {"computed": 1, "unchanged": USERS - 1}


def reject(uri: str, tmp_path: Path, table: str, variant: str, user: str, key: str) -> None:
    """As if the user had ended three workers of a run that was published."""
    run = Ledger(Store(str(tmp_path / "elsewhere")), "test").start("r" * 32, {"scope": WHOLE})
    context, workspace = UnitContext(run, Unit("bucket", 0), 1, 60.0), Workspace(uri)
    staged = stage_rejected(workspace, WHOLE, context, table, variant, [user], [WORKER_DIED], [key])
    workspace.tables["rejects"].publish(staged, mode="append", app="rejects:test", number=1, replaces=[], metadata={})


def change_key(uri: str, user: str) -> str:
    """The key under which `user` is recommended lists of five."""
    copy = f"{uri}-copy"
    shutil.copytree(uri, copy)
    words = ["recommend", "--workspace", copy, "--tracking", "off", "--cluster.workers", "1", "--length", "5"]
    assert main(words) == 0
    return str(rows_of(copy, "recommendations")[user, None]["change_key"])


def test_a_canary_is_computed_and_never_published(raypipe: Run, trained: str) -> None:
    assert counted(raypipe("recommend", "--workspace", trained, "--sample", 7)) == {"computed": 7}
    assert Workspace(trained).tables["recommendations"].version() < 0


def test_what_cannot_be_done_is_one_paragraph(raypipe: Run, trained: str, tmp_path: Path) -> None:
    cases = {
        ("extract", "--model", "gru4rec"): "No model gru4rec is stored",
        ("recommend", "--length", 31): "Lists of 31 were asked for",
        ("recommend", "--deny", tmp_path / "none.txt"): "cannot be read",
        ("recommend", "--only", '{"genre": "Poetry"}'): "No item has 'Poetry' in its attribute 'genre'",
    }
    for (job, *options), told in cases.items():
        ended = raypipe(job, "--workspace", trained, *options)
        assert ended.code == 2
        assert told in one_paragraph(ended.stderr)
