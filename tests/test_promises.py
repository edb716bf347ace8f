"""The README's promises, one test of each name. Where processes have to die, see tests/chaos."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from raypipe.storage.tables import Table
from raypipe.storage.workspace import Workspace
from tests.conftest import Ended, Run
from tests.pipeline.small_logs import START, balanced, newest, random_events, write_catalogue, write_log

pytestmark = pytest.mark.usefixtures("ray_cluster")

WINDOW_BLOCKS = 10
TABLES = ("items", "histories", "block_summaries", "summaries")


class Night:
    """One workspace and the command that runs its nights with the echo engine."""

    def __init__(self, run: Run, uri: str, files: Path) -> None:
        self.run, self.uri = run, uri
        self.catalogue = write_catalogue(files / "items.csv", 40)

    def nightly(self, log: Path, *options: object) -> Ended:
        words = ("--ingest.log.path", log, "--ingest.log.columns.time", "time")
        return self.run(
            "nightly", *self._where(), *words, *self._catalogue(), "--summarize.engine.engine", "echo", *options
        )

    def summarize(self, *options: object) -> Ended:
        return self.run("summarize", *self._where(), "--engine.engine", "echo", *options)

    def plan(self) -> Ended:
        return self.run("plan", *self._where(), "--engine.engine", "echo")

    def _where(self) -> tuple[str, str]:
        return "--workspace", self.uri

    def _catalogue(self) -> tuple[object, ...]:
        return "--ingest.catalogue.path", self.catalogue

    def contents(self) -> dict[str, list[dict[str, object]]]:
        return {name: sorted(newest(self.uri, name).to_pylist(), key=str) for name in TABLES}


@pytest.fixture
def night(raypipe: Run, files: Path, tmp_path: Path) -> Night:
    return Night(raypipe, str(tmp_path / "workspace"), files)


def calls_of(lengths: list[int]) -> int:
    """Engine calls of first summaries: every block of the last 50 events, and a merge where there are two."""
    blocks = [math.ceil(length / 5) - max(0, math.ceil((length - 50) / 5)) for length in lengths]
    return sum(blocks) + sum(count > 1 for count in blocks)


def lengths(uri: str) -> dict[str, int]:
    rows = newest(uri, "histories")
    return {
        user: len(items) for user, items in zip(rows["user_id"].to_pylist(), rows["items"].to_pylist(), strict=True)
    }


def test_g1_resume(night: Night, raypipe: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_log(files / "log.csv", random_events(1, 30, 40, 600))
    clean = Night(raypipe, str(tmp_path / "clean"), files)
    assert clean.nightly(log).status == "ok"
    publish = Table.publish
    for fails_at in ("histories", "logs", "summaries"):

        def stopped(table: Table, *args: object, at: str = fails_at, **kwargs: object) -> int:
            if table.spec.name == at:
                raise KeyboardInterrupt
            return publish(table, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Table, "publish", stopped)
        ended = night.nightly(log)
        assert ended.code == 1
        assert "submit the same command again" in ended.stderr
    monkeypatch.setattr(Table, "publish", publish)
    assert night.nightly(log).status == "ok"
    assert night.contents() == clean.contents()


def test_g2_exactly_once(night: Night, files: Path) -> None:
    events = random_events(2, 30, 40, 600)
    log = write_log(files / "log.csv", events)
    night.nightly(log)
    before = night.contents()
    moved = log.rename(files / "the-same-log-elsewhere.csv")
    assert night.nightly(moved).status == "nothing_to_do"
    assert night.contents() == before
    users = [row["user_id"] for row in before["summaries"]]
    assert sorted(users) == sorted({user for user, _, _ in events})
    assert newest(night.uri, "logs").num_rows == 1


def test_g3_nothing_vanishes(night: Night, files: Path) -> None:
    events = random_events(3, 30, 40, 600)
    bad = [("u1", "no-such-item", START), ("", "i1", START), ("u2", "i2", "yesterday"), ("u3", "i3", -5)]
    ended = night.nightly(write_log(files / "log.csv", [*events, *bad]))
    metrics = {
        name.removeprefix("ingest."): value for name, value in ended.metrics.items() if name.startswith("ingest.")
    }
    assert metrics["rows_in"] == len(events) + len(bad)
    assert balanced(metrics)
    rejects = newest(night.uri, "rejects")
    assert sorted(rejects["reason"].to_pylist()) == ["bad_time", "impossible_time", "null_user", "unknown_item"]


def test_g4_incremental(night: Night, files: Path) -> None:
    first = night.nightly(write_log(files / "log.csv", random_events(4, 40, 40, 2_000)))
    before = lengths(night.uri)
    assert first.result["cost"]["calls"] == calls_of(list(before.values()))
    later = [("u7", "i1", START + 10**10), ("u9", "i2", START + 10**10), ("u9", "i3", START + 10**10 + 1)]
    second = night.nightly(write_log(files / "later.csv", later))
    assert second.metrics["summarize.computed"] == 2
    after = lengths(night.uri)
    new_blocks = sum(math.ceil(after[user] / 5) - before[user] // 5 for user in ("u7", "u9"))
    assert second.result["cost"]["calls"] == new_blocks + 2


def test_g5_no_stale_mix(night: Night, files: Path) -> None:
    night.nightly(write_log(files / "log.csv", random_events(5, 20, 40, 400)))
    counts = list(lengths(night.uri).values())
    merges = sum(count > 5 for count in counts)
    same = night.summarize("--cluster.workers", 2, "--micro_batch_users", 3, "--engine.batch_tokens", 999)
    assert same.status == "nothing_to_do"
    merged = night.summarize("--summaries.prompts.merge", "Say it shorter:\n{summaries}")
    assert merged.result["cost"]["calls"] == merges
    assert merged.metrics["computed"] == len(counts)
    anew = night.summarize("--summaries.prompts.block", "Say it better:\n{items}")
    assert anew.result["cost"]["calls"] == calls_of(counts)


def test_g6_told_before_spent(night: Night, files: Path) -> None:
    night.nightly(write_log(files / "log.csv", random_events(6, 20, 40, 400)))
    for name in ("summaries", "block_summaries"):
        Workspace(night.uri).store.delete_folder(f"tables/{name}")
    told = night.plan().metrics
    capped = night.summarize("--max_calls", 100, "--micro_batch_users", 4)
    assert 0 < capped.result["cost"]["calls"] <= 100
    assert capped.metrics["capped"] > 0
    assert capped.metrics["computed"] + capped.metrics["capped"] == told["users"]
    rest = night.summarize()
    assert capped.result["cost"]["calls"] + rest.result["cost"]["calls"] == told["calls"]
    canary = night.summarize("--sample", 5, "--summaries.window_events", 10)
    assert canary.metrics["computed"] == 5
    assert night.summarize().status == "nothing_to_do"
