"""Users and events that no training may see, so that what is measured on them is honest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Model

# Another order than that of buckets and canaries, which go by the hash itself.
_SALT = np.uint64(0x9E3779B97F4A7C15)


def are_held_out(users: pa.Array, share: float) -> NDArray[np.bool_]:
    """Which of the users are among the held-out `share`: by their ids alone, and whoever is in a smaller share is in a
    larger one."""
    mixed = (stable_hash(users).astype(np.uint64) ^ _SALT) * _SALT
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < share


@dataclass(frozen=True)
class Cut:
    """What no training sees: the last `hold_out` events of every user, and a share of the users."""

    hold_out: int
    held_out_share: float

    def check(self, model: Model) -> None:
        """Raises UsageError where the model may have seen more."""
        hold_out, share = int(model.lineage["hold_out"]), float(model.lineage.get("held_out_share", 0.0))
        if hold_out < self.hold_out or share < self.held_out_share:
            raise UsageError(
                f"{model.name}/{model.hash} may have read all but the last {hold_out} events of all but {share:.0%} of the users, "
                f"and here are held out {self.hold_out} events and {self.held_out_share:.0%} of the users.",
                f"Make it with --hold_out {self.hold_out} --held_out_share {self.held_out_share:g}.",
            )
