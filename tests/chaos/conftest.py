"""The generated logs, and the uninterrupted nights that killed ones have to equal."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos.nights import (
    EVENTS,
    LATER_EVENTS,
    USERS,
    Command,
    Log,
    Published,
    copy_workspace,
    night_of,
    write_catalogue,
    write_log,
)

# The long campaign is not part of the suite: `make chaos SEEDS=50` asks for it.
collect_ignore = [] if os.environ.get("CHAOS_SEEDS") else ["test_campaign.py"]
_DAY_S = 86_400
_START = 1_600_000_000


class CleanNight(NamedTuple):
    """A night that nobody disturbed: its log and command, what it published, how long it took."""

    log: Log
    command: Command
    published: Published
    seconds: float


class CleanNights:
    """Two nights in a row, each run when first asked for."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.folder = folder
        catalogue = write_catalogue(folder / "items.csv")
        first = write_log(folder / "log.csv", 1, EVENTS, USERS, _START)
        later = write_log(folder / "later.csv", 2, LATER_EVENTS, USERS // 5, _START + 700 * _DAY_S)
        self._logs = (first, later)
        self._commands = [
            night_of(
                log,
                catalogue,
                f"2024-05-0{number}",
                str(folder / f"workspace-{number}"),
                folder / str(number),
                ray_folder,
            )
            for number, log in enumerate(self._logs, start=1)
        ]

    @cached_property
    def first(self) -> CleanNight:
        return self._run(0)

    @cached_property
    def second(self) -> CleanNight:
        copy_workspace(self.first.command.workspace, self._commands[1].workspace)
        return self._run(1)

    def night(self, which: int) -> CleanNight:
        return self.second if which else self.first

    def again(self, which: int, workspace: str, output: Path) -> Command:
        """The same command on another workspace, brought to where that night begins."""
        if which == 1:
            copy_workspace(self.first.command.workspace, workspace)
        return replace(self._commands[which], workspace=workspace, output=output)

    def _run(self, which: int) -> CleanNight:
        command = self._commands[which]
        started = time.monotonic()
        submission = command.submit()
        assert submission.wait() == 0, submission.log()
        assert submission.result()["status"] == "ok"
        return CleanNight(self._logs[which], command, Published.of(command.workspace), time.monotonic() - started)


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sessions, with the address of a cluster in it that was killed: nobody may try to join that."""
    # A short path, because a Unix socket's is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        address = Path(folder, "ray", "ray_current_cluster")
        address.parent.mkdir()
        address.write_text("127.0.0.1:6399")
        yield Path(folder)


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> CleanNights:
    return CleanNights(tmp_path_factory.mktemp("clean"), ray_folder)
