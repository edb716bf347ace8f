"""Whether one scorer is better than another for the same users: the bootstrap of paired differences (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raypipe.metrics.ranking import Values

_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Difference:
    """The mean over users of one scorer's metric minus the other's, with its 95 % interval.

    The interval is over bootstrap samples of the users.
    """

    value: float
    low: float
    high: float


def paired_bootstrap(one: Values, other: Values, samples: int = 2_000, seed: int = 0) -> Difference:
    """The difference of two metrics [n] of the same users, in the same order.

    Raises ValueError if there are no users, or if the two differ in length.
    """
    if len(one) != len(other) or not len(one):
        raise ValueError(f"{len(one)} and {len(other)} users are no pairs.")
    apart = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(apart))
    means = [
        apart[rng.integers(0, len(apart), (min(at_once, samples - start), len(apart)))].mean(1)
        for start in range(0, samples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(float(apart.mean()), float(low), float(high))
