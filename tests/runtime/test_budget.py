"""Caps are hard: with any number of workers nothing is spent that was not granted."""

from __future__ import annotations

import time

import pytest
import ray

from raypipe.runtime.budget import Budget, Limits
from raypipe.storage.ledger import Usage

pytestmark = pytest.mark.usefixtures("ray_cluster")


@ray.remote(num_cpus=1)
def spend(budget: Budget, most: Usage, used: Usage, times: int) -> int:
    granted = 0
    for _ in range(times):
        if budget.take(most):
            granted += 1
            budget.give_back(most, used)
    return granted


@pytest.mark.parametrize(
    ("limits", "most", "granted"),
    [
        (Limits(calls=100), Usage(7, 0, 0), 14),
        (Limits(tokens=1000), Usage(1, 90, 10), 10),
        (Limits(cost=1.0, price_in=1000.0, price_out=5000.0), Usage(1, 100, 20), 5),
        (Limits(calls=0), Usage(1, 0, 0), 0),
    ],
)
def test_two_workers_never_get_more_than_the_cap(limits: Limits, most: Usage, granted: int) -> None:
    budget = Budget(limits, Usage())
    assert sum(ray.get([spend.remote(budget, most, most, 30) for _ in range(2)])) == granted


def test_what_was_reserved_and_not_used_can_be_granted_again() -> None:
    budget = Budget(Limits(calls=10), Usage())
    assert budget.take(Usage(8, 0, 0))
    assert not budget.take(Usage(3, 0, 0))
    budget.give_back(Usage(8, 0, 0), Usage(2, 0, 0))
    assert budget.take(Usage(8, 0, 0))
    assert not budget.take(Usage(1, 0, 0))


@ray.remote(num_cpus=1)
class Worker:
    def take(self, budget: Budget, most: Usage) -> bool:
        return budget.take(most)

    def give_back(self, budget: Budget, most: Usage, used: Usage) -> None:
        budget.give_back(most, used)


def test_what_workers_that_ended_had_reserved_is_granted_again_and_what_they_spent_is_not() -> None:
    budget, worker, other = Budget(Limits(calls=10), Usage()), Worker.remote(), Worker.options(num_cpus=0).remote()
    assert ray.get(worker.take.remote(budget, Usage(4)))
    ray.get(worker.give_back.remote(budget, Usage(4), Usage(1)))
    assert ray.get(worker.take.remote(budget, Usage(5)))
    assert ray.get(other.take.remote(budget, Usage(4)))
    assert not budget.take(Usage(1))
    ray.kill(worker)
    budget.release()
    assert not budget.take(Usage(10))
    assert budget.take(Usage(9))


def test_who_was_taken_for_dead_and_still_answers_is_counted_with_what_it_took() -> None:
    budget, worker = Budget(Limits(calls=10), Usage()), Worker.remote()
    assert ray.get(worker.take.remote(budget, Usage(8)))
    budget.release()
    ray.get(worker.give_back.remote(budget, Usage(8), Usage(3)))
    assert not budget.take(Usage(8))
    assert budget.take(Usage(7))


def test_what_earlier_attempts_spent_is_not_granted_again() -> None:
    budget = Budget(Limits(calls=10), Usage(calls=9))
    assert not budget.take(Usage(2, 0, 0))
    assert budget.take(Usage(1, 0, 0))


def test_nothing_is_granted_after_the_deadline() -> None:
    assert Budget(Limits(deadline=time.time() + 60), Usage()).take(Usage(1, 1, 1))
    assert not Budget(Limits(deadline=time.time() - 1), Usage()).take(Usage(1, 1, 1))


def test_without_caps_nothing_is_asked_and_all_is_granted() -> None:
    budget = Budget(Limits(), Usage())
    assert budget._account is None
    assert budget.take(Usage(10**9, 10**9, 10**9))
