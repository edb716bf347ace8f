"""Hard caps shared by all workers of a run: what is not granted is not spent.

A worker asks before each micro-batch with an upper bound (calls, prompt tokens, most generated tokens). Afterwards it
gives back what it did not use. When a worker dies, Ray Data ends the other workers too, and the driver releases
everything that they had reserved: earlier micro-batches are settled already, and nobody knows what the last ones used.
Without caps there is no actor, and nothing is asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from raypipe.storage.ledger import Usage


@dataclass(frozen=True)
class Limits:
    """Caps of one run; None means no cap. `deadline` is in Unix seconds, and prices are per million tokens."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    deadline: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    @property
    def any(self) -> bool:
        return any(limit is not None for limit in (self.calls, self.tokens, self.cost, self.deadline))

    def money(self, usage: Usage) -> float:
        """The price of this usage."""
        return (usage.tokens_in * self.price_in + usage.tokens_out * self.price_out) / 1e6

    def allows(self, spent: Usage) -> bool:
        return (
            (self.calls is None or spent.calls <= self.calls)
            and (self.tokens is None or spent.tokens_in + spent.tokens_out <= self.tokens)
            and (self.cost is None or self.money(spent) <= self.cost)
        )


class Budget:
    """What is left of the limits. `spent` is what earlier attempts of the run used (`Run.spent`). Picklable."""

    def __init__(self, limits: Limits, spent: Usage) -> None:
        self.limits = limits
        self._account: Any = None
        if limits.any:
            import ray

            self._account = ray.remote(num_cpus=0)(_Account).remote(limits, spent)

    def take(self, most: Usage) -> bool:
        """Reserve `most`. Returns False if that could exceed a cap or if the deadline has passed."""
        if self._account is None:
            return True
        if self.limits.deadline is not None and time.time() >= self.limits.deadline:
            return False
        import ray

        return bool(ray.get(self._account.take.remote(_worker(), most)))

    def give_back(self, most: Usage, used: Usage) -> None:
        """Release the reservation `most`, and count `used` as spent."""
        if self._account is not None:
            self._account.give_back.remote(_worker(), most, used)

    def release(self) -> None:
        """Release all reservations. Their workers have ended, or will end with their current micro-batch."""
        if self._account is not None:
            self._account.release.remote()


def _worker() -> str | None:
    """The id of the calling actor, or None in a process that is not an actor."""
    import ray

    return ray.get_runtime_context().get_actor_id()


class _Account:
    def __init__(self, limits: Limits, spent: Usage) -> None:
        self.limits = limits
        self.spent = spent
        self.reserved: dict[str | None, Usage] = {}

    def take(self, worker: str | None, most: Usage) -> bool:
        if not self.limits.allows(sum(self.reserved.values(), self.spent) + most):
            return False
        self.reserved[worker] = self.reserved.get(worker, Usage()) + most
        return True

    def give_back(self, worker: str | None, most: Usage, used: Usage) -> None:
        self.spent = self.spent + used
        # A worker whose execution has ended may still finish its micro-batch after `release`.
        if worker in self.reserved:
            self.reserved[worker] = self.reserved[worker] - most

    def release(self) -> None:
        self.reserved.clear()
