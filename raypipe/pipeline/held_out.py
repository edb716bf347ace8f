"""Users that no training may see, so that what is measured on them is honest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.storage.hashing import stable_hash

# Another order than that of buckets and canaries, which go by the hash itself.
_SALT = np.uint64(0x9E3779B97F4A7C15)


def are_held_out(users: pa.Array, share: float) -> NDArray[np.bool_]:
    """Which of the users are among the held-out `share`: by their ids alone, and whoever is in a smaller share is in a
    larger one."""
    mixed = (stable_hash(users).astype(np.uint64) ^ _SALT) * _SALT
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
