"""What a death costs: the calls that have to be made again are those of units in flight, and no others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raypipe.storage.workspace import Workspace
from tests.chaos.conftest import CleanNights
from tests.chaos.kills import Kill, survive
from tests.chaos.nights import Command, copy_workspace
from tests.engines.chat_server import ChatServer

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
WORKERS = 2


@pytest.mark.parametrize("target", ["driver", "worker"])
def test_half_way_a_death_repeats_no_more_than_the_units_in_flight(
    clean: CleanNights, tmp_path: Path, ray_folder: Path, target: str
) -> None:
    workspace = str(tmp_path / "workspace")
    copy_workspace(clean.first.command.workspace, workspace)
    # Another paradigm than the night's: everybody is to be summarised.
    paradigm = ("--summaries.paradigm", "recurrent", "--micro_batch_users", "4")
    with ChatServer() as server:
        http = ("--engine.engine", "openai", "--engine.http.url", server.url, "--engine.http.model", "echo")
        command = Command(workspace, ("summarize", *http, *paradigm), tmp_path / "output", ray_folder)
        units = Workspace(workspace).require_info().buckets
        ordeal = survive(command, [Kill(target, units // 2, 0.05)], random.Random(0))
        requests = len(server.requests)
    assert (ordeal.missed, len(ordeal.struck)) == ([], 1)
    ledger = Workspace(workspace).ledger("summarize")
    (run_key,) = {key for key in ledger.numbers().values() if key != _night_run(clean)}
    calls = sorted(receipt.usage.calls for receipt in ledger.run(run_key).receipts().values())
    assert len(calls) == units
    # A worker's death ends the others' units too: Ray Data gives up an execution whole.
    assert sum(calls) <= requests <= sum(calls) + sum(calls[-WORKERS:])


def _night_run(clean: CleanNights) -> str:
    (run_key,) = set(Workspace(clean.first.command.workspace).ledger("summarize").numbers().values())
    return run_key
