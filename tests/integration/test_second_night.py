"""A second night of MovieLens 1M, after one in twenty users did something: what it costs, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pytest

from raypipe.storage.workspace import Workspace
from tests.conftest import Run

DATA = Path(__file__).parents[3] / "shared/data/ml-1m"
BLOCK, WINDOW = 5, 50


def night(raypipe: Run, uri: Path, log: Path) -> dict[str, float]:
    """One night over a log; its calls and tokens."""
    words = ["nightly", "--workspace", uri, "--cluster.workers", "2", "--summarize.engine.engine", "echo"]
    words += ["--summarize.summaries.prompts.text_characters", "200"]  # of the plots; without them it is 1.07 %
    words += ["--ingest.catalogue.path", DATA / "items.csv.gz", "--ingest.log.columns.order", "pos"]
    ended = raypipe(*words, "--ingest.log.path", log)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    return {
        "calls": ended.result["cost"]["calls"],
        "tokens": sum(ended.result["cost"][f"tokens_{way}"] for way in ("in", "out")),
    }


def rows(uri: Path, table: str) -> pa.Table:
    found = Workspace(str(uri)).tables[table]
    kept = found.read(found.version())
    kept = kept.select([name for name in kept.column_names if name not in {"calls", "tokens_in", "tokens_out"}])
    return kept.sort_by([(name, "ascending") for name in ("user_id", "level", "block") if name in kept.column_names])


def calls_of_one_more_event(events: int) -> int:
    """Of a user whose history has `events` now, one of them new: its block, and the merge of the window's blocks."""
    first = max(0, -(-(events - WINDOW) // BLOCK))
    return 1 + int(-(-events // BLOCK) - first > 1)


@pytest.mark.slow
def test_a_second_night_costs_what_changed_and_equals_a_full_one(
    raypipe: Run, ray_cluster: None, tmp_path: Path
) -> None:
    if not DATA.is_dir():
        pytest.skip(f"MovieLens 1M is not at {DATA}")
    log = arrow_csv.read_csv(DATA / "interactions.csv.gz")
    last = log.group_by("user_id").aggregate([("pos", "max")])
    # Every twentieth user's last event comes a night later.
    changed = last.filter(pc.equal(pc.subtract(last["user_id"], pc.multiply(pc.divide(last["user_id"], 20), 20)), 0))
    joined = log.join(changed, "user_id", join_type="left outer")
    is_later = pc.fill_null(pc.equal(joined["pos"], joined["pos_max"]), False)
    joined = joined.select(["user_id", "item_id", "pos"])
    parts = {"first": joined.filter(pc.invert(is_later)), "later": joined.filter(is_later), "whole": joined}
    for name, part in parts.items():
        arrow_csv.write_csv(part, tmp_path / f"{name}.csv")
    assert len(parts["later"]) == changed.num_rows == 302

    uri, at_once = tmp_path / "workspace", tmp_path / "at-once"
    first = night(raypipe, uri, tmp_path / "first.csv")
    second = night(raypipe, uri, tmp_path / "later.csv")
    full = night(raypipe, at_once, tmp_path / "whole.csv")
    assert second["calls"] == sum(calls_of_one_more_event(top + 1) for top in changed["pos_max"].to_pylist())
    assert second["tokens"] <= 0.01 * full["tokens"]
    assert first["calls"] > 50 * second["calls"]
    for table in ("histories", "summaries", "block_summaries"):
        assert rows(uri, table).equals(rows(at_once, table)), table
