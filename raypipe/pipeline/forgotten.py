"""Users who are forgotten while a job that has read their data still runs: what the job then writes is without them.

`forget` publishes tombstones first, and then takes users out of models and files under locks. A writer looks at the
tombstones under the same lock. If it comes before the sweep, what it writes is swept; if it comes after, it leaves the
users out itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.storage.locks import hold
from raypipe.storage.model_users import read_users, without, write_users
from raypipe.storage.tombstones import is_forgotten
from raypipe.storage.workspace import Workspace

_LOCK = "traces"
# Both sides hold it only for a write or a sweep. What waits to be written has cost model calls, so it waits long.
_WAIT_S = 600.0


@contextmanager
def locked_traces(workspace: Workspace, job: str, lease_s: float) -> Iterator[None]:
    """Hold the lock of what names users beside tables and models. Waits for another job that holds it."""
    with hold(workspace.store, [_LOCK], job, lease_s, wait_s=_WAIT_S):
        yield


def forgotten_users(workspace: Workspace, users: Sequence[str]) -> set[str]:
    """Those of the users who have a tombstone by now."""
    ids = pa.array(sorted(set(users)), pa.string())
    return set(ids.filter(pa.array(is_forgotten(ids, _tombstones(workspace)))).to_pylist())


def forgotten_keys(workspace: Workspace) -> NDArray[np.int64]:
    """The stable hashes of the ids of all users who have a tombstone by now."""
    return _tombstones(workspace)["hash"].to_numpy()


def leave_out_forgotten(workspace: Workspace, checkpoint: Path) -> None:
    """Remove users who have a tombstone by now from the user rows of a checkpoint that is about to be stored.

    The caller holds the model's lock.
    """
    if (rows := read_users(checkpoint)) is not None:
        write_users(checkpoint, without(rows, forgotten_keys(workspace)))


def _tombstones(workspace: Workspace) -> pa.Table:
    table = workspace.tables["tombstones"]
    return table.read(table.version())
