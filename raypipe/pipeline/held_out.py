"""Users and events that no training may see, so that what is measured on them is honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Model

# Makes the order another than that of buckets and canaries, which go by the hash itself.
_SALT = np.uint64(0x9E3779B97F4A7C15)


def are_held_out(users: pa.Array, share: float) -> NDArray[np.bool_]:
    """Which users are among the held-out `share`: bool [users].

    It depends on their ids alone, and a user who is in a smaller share is also in every larger one.
    """
    mixed = (stable_hash(users).astype(np.uint64) ^ _SALT) * _SALT
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < share


def some_of(users: pa.Array, among: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """At most `most` of the users `among` [users], as good as drawn: bool [users].

    They are chosen by the hashes of their ids, in another order than that of `are_held_out`.
    """
    places = np.flatnonzero(among)
    if len(places) <= most:
        return among
    chosen = np.zeros_like(among)
    chosen[places[np.argsort(stable_hash(users).astype(np.uint64)[places], kind="stable")[:most]]] = True
    return chosen


@dataclass(frozen=True)
class Cut:
    """What no training sees: the last `hold_out` events of every user, and a share of the users."""

    hold_out: int
    held_out_share: float

    @property
    def words(self) -> str:
        """The cut in words, for the protocol of figures.

        It says what was left to counts and trainings, and so whose figures can be compared.
        """
        last = "last event" if self.hold_out == 1 else f"last {self.hold_out} events"
        seen = f"trained before everybody's {last}" if self.hold_out else "trained on all events"
        return f"{seen} without {100 * self.held_out_share:g}% of the users" if self.held_out_share else seen

    def check(self, model: Model) -> None:
        """Raise UsageError if the model may have seen more events or users than the cut leaves."""
        self.check_events(model)
        if (share := share_of(model)) < self.held_out_share:
            raise UsageError(
                f"{model.name}/{model.hash} may have read all but {share:.0%} of the users, and {self.held_out_share:.0%} of them "
                "are held out here.",
                f"Make it with --held_out_share {self.held_out_share:g}.",
            )

    def check_events(self, model: Model) -> None:
        """Raise UsageError if the model may have seen an event that is held out, of any user."""
        if (hold_out := int(model.lineage["hold_out"])) < self.hold_out:
            raise UsageError(
                f"{model.name}/{model.hash} may have read all but the last {hold_out} events of every user, and {self.hold_out} "
                "are held out here.",
                f"Make it with --hold_out {self.hold_out}.",
            )

    def least_share(self, models: Sequence[Model]) -> float:
        """The share of the users whom neither the models nor a training by this cut has seen."""
        return min([self.held_out_share, *map(share_of, models)])


def share_of(model: Model) -> float:
    """The share of the users whom the model has not seen."""
    return float(model.lineage["held_out_share"])
