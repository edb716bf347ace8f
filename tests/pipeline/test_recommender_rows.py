"""A recommender over users some of whom ended a worker: in which order, and with whom."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from raypipe.pipeline.recommender_rows import ByRecommender
from raypipe.pipeline.rejects import WORKER_DIED
from raypipe.pipeline.user_rows import UserRows
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.windows import Histories
from raypipe.runtime.budget import Budget, Limits
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import MAX_DEATHS, WHOLE, Ledger, Unit, Usage
from raypipe.storage.models import Models, find_model
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.made import make_ready


class Noted:
    """Implements `Rows`; `asked` tells of whom, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def warm(
        self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]
    ) -> pa.Table:
        self.asked.append(places.tolist())
        return pa.table({"place": places})

    def cold(self, places: NDArray[np.int64]) -> None:
        return None


@pytest.fixture
def context(tmp_path: Path) -> Iterator[UnitContext]:
    run = Ledger(Store(str(tmp_path / "elsewhere")), "recommend").start("r" * 32, {"scope": WHOLE})
    yield UnitContext(run, Unit("users", 0), 1, 60.0)
    faulthandler.cancel_dump_traceback_later()  # the clock that ends a worker which hangs, and would end this process


def test_suspects_are_computed_alone_and_before_the_others(tmp_path: Path, context: UnitContext) -> None:
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    workspace, noted = Workspace(uri), Noted()
    version = workspace.tables["histories"].version()
    state = UserRows(workspace, 0, "recommendations", "recommend-sasrec", "r" * 32, version, -1)
    names, work = state.users.to_pylist(), np.arange(len(state.users))
    assert len(work) > 6
    context.deaths = {names[5]: 0, names[2]: MAX_DEATHS, names[4]: 1}
    model = find_model(Models(workspace.store), "sasrec")
    makes = ByRecommender(workspace, model, noted, 20_000, tmp_path / "cache", "cpu")
    made = makes.make(state, work, names, context, Budget(Limits(), Usage()))
    assert made.failed == {2: WORKER_DIED}
    assert noted.asked[:2] == [[4], [5]]
    assert sorted(place for places in noted.asked for place in places) == [place for place in work if place != 2]
