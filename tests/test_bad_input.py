"""Every bad input of the platform's list: one clear paragraph with exit code 2 before work starts, or a row in `rejects`.

Never a traceback, never a lost or doubled row. A disk that fills up while work goes on ends with exit code 1, and the
same command goes on from there once there is room.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.cli.main import main
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import GOOD, TIME, Ground, one_paragraph, table_versions
from tests.pipeline.small_logs import START, histories_of, newest, write_catalogue, write_log


def _typed(ground: Ground) -> Path:
    times = pa.array([[START]] * 3, pa.list_(pa.int64()))
    pq.write_table(
        pa.table({"user_id": ["a", "b", "c"], "item_id": ["i1"] * 3, "time": times}), ground.folder / "l.parquet"
    )
    return ground.folder / "l.parquet"


def _order_log(ground: Ground) -> tuple[object, ...]:
    Workspace(ground.uri).decide("order", 4)
    return ground.words()


def _time_workspace(ground: Ground) -> tuple[object, ...]:
    Workspace(ground.uri).decide("time", 4)
    return ground.words("--log.columns.order", "time")


def _other_format(ground: Ground) -> tuple[object, ...]:
    Store(ground.uri).put("workspace.json", b'{"format":7,"kind":"time","buckets":4}')
    return ground.words()


def _yaml(text: str) -> Callable[[Ground], tuple[object, ...]]:
    return lambda ground: ("ingest", "--workspace", ground.uri, "--config", ground.write("job.yaml", text))


def _gone(ground: Ground) -> tuple[object, ...]:
    folder = ground.folder / "folder"
    folder.mkdir()
    return ground.words(log=folder)


Arrange = Callable[[Ground], tuple[object, ...]]
REFUSED: dict[str, tuple[Arrange, str]] = {
    "a log that is not there": (
        lambda g: g.words(log=g.folder / "none.csv"),
        r"There is nothing at .*none\.csv\. Check the path",
    ),
    "an empty folder for a log": (_gone, r"There is no file at"),
    "a catalogue that is not there": (
        lambda g: g.words(catalogue=g.folder / "none.csv"),
        r"There is nothing at .*none\.csv",
    ),
    "a log that is no parquet": (
        lambda g: g.words(log=g.write("l.parquet", b"PAR1 nonsense")),
        r"l\.parquet cannot be read.*Check that the file is whole",
    ),
    "a log cut short": (
        lambda g: g.words(log=g.write("l.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03cut")),
        r"l\.csv\.gz cannot be read",
    ),
    "a place that is none": (lambda g: g.words(log="ftp://host/log.csv"), r"cannot read ftp://host/log\.csv"),
    "a missing column": (
        lambda g: g.words("--log.columns.time", "tme"),
        r"has no column tme; it has: user_id, item_id, time\. The closest is time",
    ),
    "a missing user column": (
        lambda g: g.words(log=g.write("l.csv", "user,item_id,time\na,i1,5\n")),
        r"has no column user_id.*The closest is user",
    ),
    "a column of a wrong type": (
        lambda g: g.words(log=_typed(g)),
        r"Column time of .* is of type list.*It has to hold",
    ),
    "times that are none": (
        lambda g: g.words(log=g.write("l.csv", "user_id,item_id,time\na,i1,yesterday\n")),
        r"unit cannot be told",
    ),
    "neither time nor order": (
        lambda g: g.words("--log.columns.user", "user_id"),
        r"neither is set.*Set exactly one",
    ),
    "a log of no bytes": (lambda g: g.words(log=g.write("l.csv", "")), r"has no rows"),
    "a log of a header only": (lambda g: g.words(log=g.write("l.csv", "user_id,item_id,time\n")), r"has no rows"),
    "no catalogue": (
        lambda g: ("ingest", "--workspace", g.uri, "--log.path", g.log, *TIME),
        r"no items yet, and no catalogue was named. Add --catalogue\.path",
    ),
    "a catalogue without a title column": (
        lambda g: g.words(catalogue=g.write("c.csv", "item_id,name\ni1,One\n")),
        r"catalogue .* has no column title.*Set catalogue\.columns",
    ),
    "a catalogue of empty titles": (
        lambda g: g.words(catalogue=g.write("c.csv", "item_id,title\ni1,\ni2,  \n")),
        r"has no title: column title is empty in all of its rows",
    ),
    "an empty catalogue": (lambda g: g.words(catalogue=g.write("c.csv", "item_id,title\n")), r"has no rows"),
    "an unknown key on the command line": (
        lambda g: g.words(*TIME, "--log.colums.user", "x"),
        r"--log\.colums\.user.*Did you mean --log\.columns\.user\?",
    ),
    "an unknown key in the file": (
        _yaml("log: {pth: a.csv}\n"),
        r"Unknown config key 'log\.pth'. Did you mean 'path'\?",
    ),
    "a wrong type in the file": (_yaml("max_reject_rate: [1]\n"), r"'max_reject_rate' is \[1\].*Correct"),
    "a wrong type on the command line": (
        lambda g: g.words(*TIME, "--cluster.workers", "many"),
        r"'cluster\.workers' is 'many'.*Correct --cluster\.workers",
    ),
    "a value out of its range": (lambda g: g.words(*TIME, "--buckets", 2), r"'buckets'.*greater than or equal to 4"),
    "buckets that are no power of two": (lambda g: g.words(*TIME, "--buckets", 6), r"6, which is no power of two"),
    "a config file that is not there": (
        lambda g: ("ingest", "--config", g.folder / "none.yaml"),
        r"none\.yaml cannot be read",
    ),
    "a config file that is no YAML": (_yaml("log: {\n"), r"is not YAML"),
    "a workspace of another format version": (
        _other_format,
        r"has format version 7; this raypipe reads and writes version 1",
    ),
    "a workspace description that is none": (
        lambda g: (Store(g.uri).put("workspace.json", b"?"), g.words())[1],
        r"is not a workspace description",
    ),
    "a time log into an order workspace": (_order_log, r"holds order logs, and this is a log of time kind"),
    "an order log into a time workspace": (_time_workspace, r"holds time logs, and this is a log of order kind"),
    "summaries of an empty workspace": (
        lambda g: ("summarize", "--workspace", g.uri, "--engine.engine", "echo"),
        r"is empty. Run `raypipe ingest",
    ),
    "a workspace that is a file": (lambda g: (*g.words(), "--workspace", g.log), r"log\.csv"),
    "a folder where nobody may write": (lambda g: (*g.words(), "--workspace", "/proc/raypipe"), r"/proc/raypipe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_paragraph_before_work_starts(raypipe: Run, ground: Ground, case: str) -> None:
    arrange, message = REFUSED[case]
    ended = raypipe(*arrange(ground))
    assert ended.code == 2, ended.stderr
    assert ended.status == "failed"
    told = one_paragraph(ended.stderr)
    assert re.search(message, told), told
    assert told == f"raypipe: {ended.result['error']}".strip()
    assert table_versions(ground.uri) == {}


# Rows of one log, good and bad together. Ids as people really have them are no mistake and come through to the letter.
IDS = [
    "with space",
    'quo"te',
    "com,ma",
    "emoji 🎬",
    "日本",
    "tab\tbed",
    "' OR 1=1; --",
    "../../etc",
    "a=b/c",
    "x" * 1024,
]
BUSY = 100_000
REJECTED = {
    "unknown_item": ("a", "nowhere", START),
    "null_user": ("", "i1", START),
    "null_item": ("a", "", START),
    "bad_time": ("a", "i1", "yesterday"),
    "impossible_time": ("a", "i1", -5),
    "id_too_long": ("y" * 10_240, "i1", START),
}


@pytest.fixture(scope="module")
def mixed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed")
    busy = [("busy", f"i{n % 5 + 1}", START + n) for n in range(BUSY)]
    single = [("once", "i1", START)]
    far = [("far", "i1", 4_200_000_000_000)]
    rows = [
        *REJECTED.values(),
        *far,
        *((user, "i2", START) for user in IDS),
        *single,
        *busy,
        *GOOD,
        *GOOD[:10],
        single[0],
    ]
    log = write_log(folder / "log.csv", rows)
    catalogue = write_catalogue(folder / "items.csv", 5)
    uri = str(folder / "workspace")
    words = ["ingest", "--workspace", uri, "--log.path", str(log), *TIME, "--catalogue.path", str(catalogue)]
    patch = pytest.MonkeyPatch()
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        code = main([*words, "--tracking", "off", "--cluster.workers", "1"])
    finally:
        patch.undo()
    assert code == 0, printed
    return uri, json.loads(printed[-1])["metrics"]


@pytest.mark.parametrize("reason", REJECTED)
def test_a_row_that_cannot_be_used_is_in_rejects_with_its_reason(mixed: tuple[str, dict], reason: str) -> None:
    user, item, time = REJECTED[reason]
    rows = [row for row in newest(mixed[0], "rejects").to_pylist() if row["reason"] == reason]
    found = json.loads(rows[0]["row"])
    assert len(rows) == (2 if reason == "impossible_time" else 1)
    assert (found["user_id"] or "")[:2000] == user[:2000]
    assert ((found["item_id"] or ""), str(found["time"])) == (item, str(time))
    assert rows[0]["message"]


@pytest.mark.parametrize("user", IDS, ids=lambda user: user[:12])
def test_an_id_of_any_spelling_comes_through_to_the_letter(mixed: tuple[str, dict], user: str) -> None:
    assert histories_of(mixed[0])[user] == [("i2", START)]


def test_one_event_duplicates_and_a_hundred_thousand_events_are_neither_lost_nor_doubled(
    mixed: tuple[str, dict],
) -> None:
    uri, metrics = mixed
    histories = histories_of(uri)
    assert histories["once"] == [("i1", START)]
    assert histories["busy"] == [(f"i{n % 5 + 1}", START + n) for n in range(BUSY)]
    assert sum(map(len, histories.values())) == BUSY + len(GOOD) + len(IDS) + 1
    kinds = {
        kind: metrics[kind] for kind in ("rows_in", "events_added", "rejected", "duplicate", "filtered", "forgotten")
    }
    assert kinds == {
        "rows_in": BUSY + len(GOOD) + len(IDS) + 1 + 11 + 7,
        "events_added": BUSY + len(GOOD) + len(IDS) + 1,
        "rejected": 7,
        "duplicate": 11,
        "filtered": 0,
        "forgotten": 0,
    }
    assert newest(uri, "rejects").num_rows == 7


def test_users_of_any_id_and_length_get_their_summary(raypipe: Run, mixed: tuple[str, dict], tmp_path: Path) -> None:
    uri = str(shutil.copytree(mixed[0], tmp_path / "copy"))
    ended = raypipe("summarize", "--workspace", uri, "--engine.engine", "echo")
    assert (ended.code, ended.metrics["rejected"]) == (0, 0)
    rows = {row["user_id"]: row for row in newest(uri, "summaries").to_pylist()}
    assert set(rows) == set(histories_of(uri))
    assert (rows["busy"]["calls"], rows["busy"]["covered"]) == (11, BUSY // 5)
