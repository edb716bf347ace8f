"""Tombstones of forgotten users. Two hashes of each id are kept, so that an old log cannot bring the user back.

Neither hash is keyed with a secret: anyone who can read the table and guesses an id can check that it was forgotten.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.storage.hashing import stable_hash


def digest(user_id: str) -> str:
    """64 hex digits that stand for a forgotten user."""
    return hashlib.sha256(b"raypipe tombstone\0" + user_id.encode("utf-8", "surrogatepass")).hexdigest()


def tombstone_rows(user_ids: list[str]) -> pa.Table:
    """Rows of the `tombstones` table for these users."""
    hashes = stable_hash(pa.array(user_ids, pa.string())).view(np.int64)
    return pa.table({"hash": hashes, "digest": [digest(user) for user in user_ids]})


def is_forgotten(users: pa.Array, tombstones: pa.Table) -> NDArray[np.bool_]:
    """Which of `users` (unique ids) have a tombstone: bool [users].

    The cheap hash is compared first, and the digest only where the hash matches.
    """
    forgotten = np.zeros(len(users), bool)
    if tombstones.num_rows == 0:
        return forgotten
    suspects = np.flatnonzero(np.isin(stable_hash(users).view(np.int64), tombstones["hash"].to_numpy()))
    digests = set(tombstones["digest"].to_pylist())
    for row in suspects:
        forgotten[row] = digest(users[int(row)].as_py()) in digests
    return forgotten
