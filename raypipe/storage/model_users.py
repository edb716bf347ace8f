"""What a model keeps of single users.

It lies beside the checkpoint, so that `forget` can change it and the model keeps its name.

    models/<name>/<hash>/users.safetensors      arrays [users, ...]: `keys` and what is kept; rewritten by `forget`
    models/<name>/<hash>/checkpoint/users.json  the digest of the arrays as they were first stored; never changes

The code that makes a checkpoint writes the arrays with `write_users`, and `Models.add` moves them to their place. The
digest is part of the content that the model's hash covers, so models that differ only in their users have different
hashes. Readers read the arrays from the workspace each time, and no node keeps a copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.store import Store

USERS = "users.safetensors"
FIRST_STORED = "users.json"
_DIGEST = "digest"

Rows = Mapping[str, NDArray[Any]]
"""Arrays [users, ...] by name; `keys` int64 [users] are the stable hashes of the users' ids."""


def write_users(folder: Path, rows: Rows) -> None:
    """Write the rows of users into the folder of a checkpoint that will be stored."""
    (folder / USERS).write_bytes(pack(rows))


def read_users(folder: Path) -> Rows | None:
    """The rows of users in a checkpoint folder that is not stored yet; None if it keeps nothing of users."""
    path = folder / USERS
    return unpack(path.read_bytes(), str(path)) if path.exists() else None


def first_stored(rows: Rows) -> str:
    """The text of `users.json`: the digest of the rows and the number of users."""
    return canonical_json({_DIGEST: _digest(rows), "users": len(rows["keys"])})


def pack(rows: Rows) -> bytes:
    arrays = {name: np.ascontiguousarray(values) for name, values in rows.items()}
    return save(arrays, {_DIGEST: _digest(rows)})


def unpack(data: bytes, where: str) -> Rows:
    """The rows that `pack` wrote. Raises UsageError if the bytes are damaged; `where` names them in the message."""
    try:
        rows = load(data)
        is_whole = json.loads(data[8 : 8 + _header_bytes(data)])["__metadata__"][_DIGEST] == _digest(rows)
    except (SafetensorError, ValueError, KeyError):
        is_whole = False
    if not is_whole:
        raise UsageError(f"{where} is damaged.", "Restore it from a backup, or make the model again.")
    return rows


def without(rows: Rows, keys: NDArray[np.int64]) -> Rows:
    """The rows of all users whose key is not in `keys`."""
    stay = ~np.isin(rows["keys"], keys)
    return {name: values[stay] for name, values in rows.items()}


def forget_in_models(store: Store, keys: NDArray[np.int64]) -> int:
    """Remove users from what models keep beside their checkpoints. Returns how many rows were removed.

    Raises UsageError if the rows of a model are damaged.
    """
    gone = 0
    for entry in store.list("models"):
        if entry.path.endswith(f"/{USERS}"):
            rows = unpack(store.read(entry.path), store.object_uri(entry.path))
            if hers := int(np.isin(rows["keys"], keys).sum()):
                store.put(entry.path, pack(without(rows, keys)))
                gone += hers
    return gone


def _header_bytes(data: bytes) -> int:
    """The length in bytes of the header of a safetensors file, which the file begins with."""
    return int.from_bytes(data[:8], "little")


def _digest(rows: Rows) -> str:
    state = hashlib.sha256()
    for name, values in sorted(rows.items()):
        state.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        state.update(np.ascontiguousarray(values).tobytes())
    return state.hexdigest()
