"""`extract` and `recommend` killed and submitted again: what was done is kept, what was not is computed once."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.chaos.conftest import CleanNights
from tests.chaos.kills import Kill, survive
from tests.chaos.nights import BUCKETS, USERS, Command, copy_workspace, unbalanced
from tests.untrained import store_untrained

pytestmark = pytest.mark.chaos

TABLES = {"extract": "hidden_states", "recommend": "recommendations"}
VECTORS = {"extract": "state", "recommend": "scores"}


def with_model(source: str, uri: str) -> str:
    """A copy of the workspace that holds a recommender."""
    copy_workspace(source, uri)
    store_untrained(uri, RecommenderConfig(width=16, max_length=20, hidden=16))
    return uri


def rows_of(uri: str, table: str) -> dict[str, dict[str, Any]]:
    found = Workspace(uri).tables[table]
    assert found.version() == 0, "published once"
    rows = found.read(0).to_pylist()
    assert len(rows) == USERS
    return {row["user_id"]: row for row in rows}


def receipts(uri: str, job: str) -> dict[str, str]:
    """The receipt of every finished unit, with the names and checksums of its files."""
    store = Store(uri)
    return {
        entry.path: store.read(entry.path).decode() for entry in store.list(f"ledger/{job}") if "/units/" in entry.path
    }


@pytest.fixture(scope="module")
def undisturbed(clean: CleanNights, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workspace with states and lists that nobody disturbed the making of."""
    folder = tmp_path_factory.mktemp("undisturbed")
    uri = with_model(clean.first.command.workspace, str(folder / "workspace"))
    for job in TABLES:
        assert survive(Command(uri, (job,), folder / job, ray_folder), [], random.Random(0)).codes == [0]
    return uri


@pytest.mark.parametrize(
    ("job", "kills", "codes"),
    [
        ("extract", [Kill("driver", 5, 0.0), "worker after ledger/extract/*/journal/* 2"], [-9, 0]),
        ("recommend", [Kill("driver", 5, 0.0), "driver after tables/recommendations"], [-9, -9, 0]),
    ],
)
def test_a_killed_encoding_is_resumed_and_equal(
    clean: CleanNights,
    undisturbed: str,
    ray_folder: Path,
    tmp_path: Path,
    job: str,
    kills: list[Kill | str],
    codes: list[int],
) -> None:
    uri = with_model(clean.first.command.workspace, str(tmp_path / "workspace"))
    command = Command(uri, (job, "--micro_batch_positions", "100"), tmp_path / "first", ray_folder)
    first = command.submit()
    assert kills[0].strike(command, first, random.Random(0))
    first.wait()
    done = receipts(uri, job)
    assert 5 <= len(done) < BUCKETS
    ordeal = survive(replace(command, output=tmp_path / "later"), kills[1:], random.Random(0))
    assert ordeal.struck == kills[1:]
    assert [first.wait(), *ordeal.codes] == codes
    assert unbalanced(uri) == []
    assert done.items() <= receipts(uri, job).items(), "a finished unit was computed again"
    found, expected = rows_of(uri, TABLES[job]), rows_of(undisturbed, TABLES[job])
    assert found.keys() == expected.keys()
    for user, row in expected.items():
        vector = VECTORS[job]
        np.testing.assert_allclose(found[user].pop(vector), row.pop(vector), rtol=1e-5, atol=1e-5)
        assert found[user] == row
