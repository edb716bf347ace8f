"""The generated logs, and the uninterrupted nights that killed ones have to equal."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.chaos.nights import EVENTS, LATER_EVENTS, USERS, Night, Published, copy_workspace, write_catalogue, write_log

# The long campaign is not part of the suite: `make chaos SEEDS=50` asks for it.
collect_ignore = [] if os.environ.get("CHAOS_SEEDS") else ["test_campaign.py"]
_DAY_S = 86_400
_START = 1_600_000_000


@dataclass(frozen=True)
class CleanNights:
    """Two nights that nobody disturbed: how to submit them, what they published, how long they took."""

    nights: tuple[Night, Night]
    published: tuple[Published, Published]
    seconds: tuple[float, float]
    # The workspace between the two, for second nights to start from.
    between: str

    def again(self, which: int, workspace: str, output: Path) -> Night:
        """The same command on another workspace, brought to where that night begins."""
        if which == 1:
            copy_workspace(self.between, workspace)
        return replace(self.nights[which], workspace=workspace, output=output)


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
    folder = tmp_path_factory.mktemp("clean")
    catalogue = write_catalogue(folder / "items.csv")
    first = write_log(folder / "log.csv", 1, EVENTS, USERS, _START)
    later = write_log(folder / "later.csv", 2, LATER_EVENTS, USERS // 5, _START + 700 * _DAY_S)
    workspace = str(folder / "workspace")
    nights = (
        Night(workspace, first, catalogue, "2024-05-01", folder / "first", ray_folder),
        Night(workspace, later, catalogue, "2024-05-02", folder / "second", ray_folder),
    )
    published, seconds = [], []
    for night in nights:
        if published:
            copy_workspace(workspace, str(folder / "between"))
        started = time.monotonic()
        submission = night.submit()
        assert submission.wait() == 0, submission.log()
        assert submission.result()["status"] == "ok"
        seconds.append(time.monotonic() - started)
        published.append(Published.of(workspace))
    return CleanNights(nights, (published[0], published[1]), (seconds[0], seconds[1]), str(folder / "between"))
