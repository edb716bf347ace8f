"""Summaries for an honest evaluation: what is held out is in none, and they stand beside those of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.pipeline.small_logs import SMALL_ITEMS, SMALL_LOG, newest, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")
ECHO = ("--engine.engine", "echo")


def texts(uri: str, variant: str) -> dict[str, str]:
    rows = [row for row in newest(uri, "summaries").to_pylist() if row["variant"] == variant]
    return {row["user_id"]: row["summary"] for row in rows}


@pytest.mark.parametrize("paradigm", ["hierarchical", "recurrent"])
def test_summaries_before_the_cut_are_those_of_a_log_that_ends_there(
    raypipe: Run, summarised: str, files: Path, paradigm: str
) -> None:
    asked = ("--summaries.paradigm", paradigm)
    cut = raypipe("summarize", "--workspace", summarised, *ECHO, *asked, "--summaries.hold_out", 2)
    assert (cut.code, cut.status) == (0, "ok"), cut.stderr
    whole = texts(summarised, "summarize-hierarchical")
    assert len(whole) == 25

    last = {user: [event for event in SMALL_LOG if event[0] == user][-2:] for user, *_ in SMALL_LOG}
    shorter = [event for event in SMALL_LOG if event not in last[event[0]]]
    other = str(files / "shorter")
    words = ("--log.path", write_log(files / "shorter.csv", shorter), "--log.columns.time", "time")
    catalogue = ("--catalogue.path", write_catalogue(files / "items.csv", SMALL_ITEMS))
    assert raypipe("ingest", "--workspace", other, *words, *catalogue).code == 0
    assert raypipe("summarize", "--workspace", other, *ECHO, *asked).code == 0
    expected = texts(other, f"summarize-{paradigm}")
    assert len(expected) == 23  # all but those with one event and with two
    assert texts(summarised, f"summarize-{paradigm}-cut2") == expected

    again = raypipe("summarize", "--workspace", summarised, *ECHO, *asked, "--summaries.hold_out", 2)
    assert again.result["cost"]["calls"] == 0
    assert texts(summarised, "summarize-hierarchical") == whole
