"""Users who are forgotten while a job works that has read of them before: what it then writes is without them.

`forget` publishes tombstones first, and then takes users out of models and files under locks. A writer that looks at the
tombstones under the same lock comes before it, and what it writes is swept, or after it, and leaves them out.
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
# Both sides hold it for the moment of a write or a sweep; what waits has cost somebody's calls.
_WAIT_S = 600.0


@contextmanager
def locked_traces(workspace: Workspace, job: str, lease_s: float) -> Iterator[None]:
    """The lock of what names users beside tables and models; waits for who holds it."""
    with hold(workspace.store, [_LOCK], job, lease_s, wait_s=_WAIT_S):
        yield


def forgotten_users(workspace: Workspace, users: Sequence[str]) -> set[str]:
    """Who of the users has a tombstone by now."""
    ids = pa.array(sorted(set(users)), pa.string())
    return set(ids.filter(pa.array(is_forgotten(ids, _tombstones(workspace)))).to_pylist())


def forgotten_keys(workspace: Workspace) -> NDArray[np.int64]:
    """The stable hashes of everybody's id who has a tombstone by now."""
    return _tombstones(workspace)["hash"].to_numpy()


def leave_out_forgotten(workspace: Workspace, checkpoint: Path) -> None:
    """Before a checkpoint is stored, its rows of users without who has a tombstone by now; the caller holds the model's lock."""
    if (rows := read_users(checkpoint)) is not None:
        write_users(checkpoint, without(rows, forgotten_keys(workspace)))


def _tombstones(workspace: Workspace) -> pa.Table:
    table = workspace.tables["tombstones"]
    return table.read(table.version())
