"""Hard caps shared by all workers of a run: what is not granted is not spent.

A worker asks before each micro-batch with an upper bound (calls, prompt tokens, most generated tokens) and gives back
what it did not use. Where a worker died, its execution ends with all its workers, and the driver gives back what they had
reserved: what they answered before is settled, and what their last micro-batches took nobody knows. Without caps there is
no actor and nothing is asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from raypipe.storage.ledger import Usage


@dataclass(frozen=True)
class Limits:
    """Caps of one run; None is no cap. `deadline` in Unix seconds, prices per million tokens."""

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
        """What so much costs, by the prices."""
        return (usage.tokens_in * self.price_in + usage.tokens_out * self.price_out) / 1e6

    def allows(self, spent: Usage) -> bool:
        return (
            (self.calls is None or spent.calls <= self.calls)
            and (self.tokens is None or spent.tokens_in + spent.tokens_out <= self.tokens)
            and (self.cost is None or self.money(spent) <= self.cost)
        )


class Budget:
    """What is left of the limits; `spent` is what earlier attempts of the run already used (`Run.spent`). Picklable."""

    def __init__(self, limits: Limits, spent: Usage) -> None:
        self.limits = limits
        self._account: Any = None
        if limits.any:
            import ray

            self._account = ray.remote(num_cpus=0)(_Account).remote(limits, spent)

    def take(self, most: Usage) -> bool:
        """Reserve at most `most`; False where that could break a cap or the deadline has passed."""
        if self._account is None:
            return True
        if self.limits.deadline is not None and time.time() >= self.limits.deadline:
            return False
        import ray

        return bool(ray.get(self._account.take.remote(_worker(), most)))

    def give_back(self, most: Usage, used: Usage) -> None:
        """Return what was reserved and not used."""
        if self._account is not None:
            self._account.give_back.remote(_worker(), most, used)

    def release(self) -> None:
        """Return all that is reserved: its workers have ended, or end with the micro-batch that they have."""
        if self._account is not None:
            self._account.release.remote()


def _worker() -> str | None:
    """The id of the actor that asks; None in a process that is none."""
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
        # One whose execution ended may still end its micro-batch.
        if worker in self.reserved:
            self.reserved[worker] = self.reserved[worker] - most

    def release(self) -> None:
        self.reserved.clear()
