"""A workspace that was copied and put back as the runbook says is the one that it was copied from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tests.conftest import Run
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, START, newest, write_catalogue, write_log
from tests.pipeline.two_nights import USER, USERS

RUNBOOK = (Path(__file__).parents[2] / "cluster/RUNBOOK.md").read_text()
LEFT_OUT = tuple(re.search(r"rsync -a --exclude=/\{([a-z,]+)\}/ W/", RUNBOOK)[1].split(","))  # type: ignore[index]
TABLES = ("histories", "hidden_states", "recommendations", "summaries", "block_summaries")


def backed_up(uri: str, target: Path) -> str:
    """A copy as the runbook's command makes it."""
    top = Path(uri)
    return str(shutil.copytree(top, target, ignore=lambda folder, _: LEFT_OUT if Path(folder) == top else ()))


def answers(raypipe: Run, uri: str) -> list[object]:
    """What `status` and `night` tell of a workspace, and of each of its nights."""
    nights = raypipe("night", "--workspace", uri)
    asked = [("status",), ("night",), *(("night", "--date", date) for date in nights.metrics["nights"])]
    ended = [raypipe(*words, "--workspace", uri) for words in asked]
    assert [one.code for one in ended] == [0] * len(asked)
    return [one.result for one in ended]


def rows_but_of(user: str, uri: str, table: str) -> pa.Table:
    rows = newest(uri, table)
    order = [
        (column, "ascending")
        for column in ("variant", "user_id", "position", "level", "block")
        if column in rows.column_names
    ]
    return rows.filter(pc.not_equal(rows["user_id"], user)).sort_by(order)


def test_both_commands_and_the_table_leave_the_same_folders_out() -> None:
    on_s3 = re.search(r"aws s3 sync .* --exclude=\{([a-z,]+)\}/'\*'", RUNBOOK)
    assert on_s3 is not None
    assert tuple(on_s3[1].split(",")) == LEFT_OUT
    section = RUNBOOK[RUNBOOK.index("## A backup") : RUNBOOK.index("## A restore")]
    rows = re.findall(r"^\| (`.*`) \|", section, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)/`", row)) == sorted(LEFT_OUT)


def test_a_copy_answers_as_the_workspace_does_and_its_next_night_computes_what_is_new(
    raypipe: Run, two_nights: str, tmp_path: Path, files: Path
) -> None:
    there = {path.name for path in Path(two_nights).iterdir()}
    assert there >= set(LEFT_OUT) - {"reports"}
    copy = backed_up(two_nights, tmp_path / "backup")
    assert {path.name for path in Path(copy).iterdir()} == there - set(LEFT_OUT)
    assert answers(raypipe, copy) == answers(raypipe, two_nights)
    kept, loaded = (raypipe("online", "--workspace", uri) for uri in (two_nights, copy))
    assert (kept.status, loaded.status, loaded.metrics["users"]) == ("nothing_to_do", "ok", USERS)
    for name in ("version", "users", "states", "lists", "summaries"):
        assert loaded.metrics[name] == kept.metrics[name]
    # A night of one user who came back: the block with the new event is read, and one merge, and nobody else is touched.
    log = write_log(files / "wednesday.csv", [("u9", "i2", START + 120 * DAY)])
    words = ("--ingest.log.path", log, "--ingest.log.columns.time", "time", "--summarize.engine.engine", "echo")
    words += ("--ingest.catalogue.path", write_catalogue(files / "items.csv", SMALL_ITEMS), "--date", "2026-01-07")
    night = raypipe("nightly", "--workspace", copy, *words)
    assert (night.status, night.metrics["ingest.events_added"], night.metrics["summarize.computed"]) == ("ok", 1, 1)
    assert night.result["cost"]["calls"] == 2
    for name in TABLES:
        assert rows_but_of("u9", copy, name).equals(rows_but_of("u9", two_nights, name))


def test_who_was_forgotten_since_comes_back_with_a_backup_and_is_forgotten_again(
    raypipe: Run, two_nights: str, tmp_path: Path, files: Path
) -> None:
    copy = backed_up(two_nights, tmp_path / "backup")
    (files / "forgotten-since.txt").write_text(f"{USER}\n")
    forget = ("forget", "--workspace", two_nights, "--users", files / "forgotten-since.txt", "--grace_s", 0)
    assert raypipe(*forget).status == "ok"
    without = answers(raypipe, two_nights)
    Path(two_nights).rename(tmp_path / "aside")
    shutil.copytree(copy, two_nights)
    assert USER in newest(two_nights, "summaries")["user_id"].to_pylist()
    again = raypipe(*forget)
    assert (again.status, again.metrics["tombstones_added"]) == ("ok", 1)
    assert USER not in newest(two_nights, "summaries")["user_id"].to_pylist()
    assert answers(raypipe, two_nights) == without
    online = raypipe("online", "--workspace", two_nights)
    assert (online.status, online.metrics["users"]) == ("ok", USERS - 1)
