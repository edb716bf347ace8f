"""How the worker of a test's training dies, and what it waits for."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ray

# Workers cannot import a module of the tests, so that it travels whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
_WAITED_S = 60


def die_once(folder: Path, *, checkpointed: bool = True) -> None:
    """Kills the process that calls it, the first time; where a checkpoint is to be there, once that is counted."""
    if (folder / "died").exists():
        return
    (folder / "died").touch()
    if checkpointed:
        wait_for_checkpoint(folder)
    os._exit(1)


def wait_for_checkpoint(folder: Path) -> None:
    """Until Ray counts one of the training in `folder`: when its controller has polled it, seconds after the worker reported it."""
    deadline = time.monotonic() + _WAITED_S
    while time.monotonic() < deadline:
        snapshots = (folder / "training").glob("*/checkpoint_manager_snapshot.json")
        if any('"checkpoint_' in file.read_text() for file in snapshots):
            return
        time.sleep(0.1)
