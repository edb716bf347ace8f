"""The paired bootstrap: an interval that holds the truth as often as it says, and that pairing makes narrow."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.metrics.comparison import Difference, paired_bootstrap


def test_the_interval_of_many_users_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(4_000)
    better = base + rng.normal(0.02, 0.1, len(base))
    told = paired_bootstrap(better, base)
    half = 1.96 * (better - base).std() / len(base) ** 0.5
    assert told.value == pytest.approx((better - base).mean())
    assert (told.low, told.high) == pytest.approx((told.value - half, told.value + half), abs=0.15 * half)
    assert told.low > 0


def test_of_a_hundred_pairs_that_are_alike_about_five_are_said_to_differ() -> None:
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(100):
        one, other = rng.random((2, 60))
        told = paired_bootstrap(one, other, samples=400)
        outside += told.low > 0 or told.high < 0
    assert outside <= 12


def test_the_same_users_and_seed_give_the_same_interval() -> None:
    one, other = np.random.default_rng(0).random((2, 50))
    assert paired_bootstrap(one, other) == paired_bootstrap(one, other)
    assert paired_bootstrap(one, one) == paired_bootstrap(other, other)
    assert paired_bootstrap(one, one) == Difference(0, 0, 0)


def test_users_without_a_partner_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="no pairs"):
        paired_bootstrap(np.ones(0), np.ones(0))
