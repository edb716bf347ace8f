"""G1 resume: a killed night, submitted again, equals an uninterrupted one, row for row. The few kills of `make test`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from raypipe.storage.store import Store
from tests.chaos.conftest import CleanNight, CleanNights
from tests.chaos.kills import Kill, Ordeal, survive
from tests.chaos.nights import SPLITS, USERS, Published, differences, unbalanced

pytestmark = pytest.mark.chaos

Attack = Callable[..., Ordeal]


@pytest.fixture
def attack(clean: CleanNights, tmp_path: Path) -> Attack:
    """Kills a night as told, submits it again until it ends well, and compares all it published with the clean one."""

    def run(*kills: Kill | str, night: int = 0, workspace: str = "", seed: int = 0) -> Ordeal:
        uri = workspace or str(tmp_path / "workspace")
        again = clean.again(night, uri, tmp_path / "output")
        ordeal = survive(again, list(kills), random.Random(seed))
        assert ordeal.struck == [str(kill) for kill in kills]
        assert differences(Published.of(uri), clean.night(night).published) == []
        assert unbalanced(uri) == []
        assert ordeal.orphans == []
        assert Store(uri).list("staging") == []
        # Only the death of a worker's own process makes rows suspects.
        assert again.deaths() == [] or any(kill.startswith("worker") for kill in ordeal.struck)
        return ordeal

    return run


def test_a_clean_night_accounts_for_every_row(clean: CleanNights) -> None:
    check_sums(clean.first.published, [clean.first])


@pytest.mark.slow
def test_a_clean_second_night_accounts_for_every_row(clean: CleanNights) -> None:
    check_sums(clean.second.published, [clean.first, clean.second])


def check_sums(published: Published, nights: list[CleanNight]) -> None:
    logs = [night.log for night in nights]
    rows = sorted(published.tables["logs"].values(), key=lambda row: row["ingest"])
    assert [row["rows_in"] for row in rows] == [log.rows for log in logs]
    assert [row["rows_rejected"] for row in rows] == [log.rejected for log in logs]
    assert [row["rows_duplicate"] for row in rows] == [log.duplicates for log in logs]
    assert len(published.tables["rejects"]) == sum(log.rejected for log in logs)
    events = sum(len(row["items"]) for row in published.tables["histories"].values())
    assert events == sum(log.rows - log.rejected - log.duplicates for log in logs)
    assert published.users("histories") == published.users("summaries") == {f"user {n}" for n in range(USERS)}
    assert published.versions["histories"] == published.versions["summaries"] == len(nights) - 1


def test_a_killed_worker_is_replaced_and_a_killed_raylet_survived(attack: Attack) -> None:
    ordeal = attack(Kill("worker", 3, 0.0), Kill("raylet", SPLITS, 0.1), seed=2)
    assert ordeal.submissions == 2
    assert ordeal.codes[1] == 0


def test_a_night_killed_in_its_work_and_between_its_commits_is_published_once(attack: Attack) -> None:
    ordeal = attack(
        Kill("driver", SPLITS - 2, 0.0),
        "driver after ledger/ingest/*/publish.json",
        "driver after tables/histories",
        "driver after tables/block_summaries",
        "driver before nights/current.json",
        seed=1,
    )
    assert ordeal.codes == [-9, -9, -9, -9, -9, 0]


@pytest.mark.slow
def test_a_second_night_killed_in_the_middle_equals_the_clean_one(attack: Attack) -> None:
    ordeal = attack(Kill("driver", SPLITS, 0.1), "worker before ledger/*/units/users-*", night=1, seed=5)
    assert ordeal.codes == [-9, 0]


def test_a_night_on_s3_resumes_after_the_driver_was_killed(attack: Attack, s3_uri: str) -> None:
    ordeal = attack(Kill("driver", 5, 0.3), "driver after tables/histories", workspace=s3_uri, seed=6)
    assert ordeal.codes == [-9, -9, 0]
