"""The long campaign, `make chaos SEEDS=50`: every seed draws a night, a store and its kills; one line each, then the sum.

One seed again: `CHAOS_SEEDS=50 pytest -m chaos -s 'tests/chaos/test_campaign.py::test_a_killed_night_equals_an_uninterrupted_one[17]'`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import CleanNights
from tests.chaos.kills import DRIVER_FAULTS, WORKER_FAULTS, Kill, survive
from tests.chaos.nights import BUCKETS, UNITS, Published, differences, unbalanced

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

SEEDS = int(os.environ["CHAOS_SEEDS"])


class Tally:
    """The campaign so far."""

    def __init__(self) -> None:
        self.seeds = self.equal = self.missed = self.submissions = 0
        self.killed: Counter[str] = Counter()
        self.started = time.monotonic()

    def __str__(self) -> str:
        killed = ", ".join(f"{target} {count}" for target, count in sorted(self.killed.items()))
        minutes = (time.monotonic() - self.started) / 60
        return (
            f"chaos: {self.seeds} seeds, {self.killed.total()} kills ({killed}; {self.missed} came too late), "
            f"{self.submissions} submissions, {self.equal} of {self.seeds} equal, {minutes:.1f} min"
        )


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print(f"\n{tally}", flush=True)


def draw(rng: random.Random, clean: CleanNights) -> tuple[int, str, list[Kill | str]]:
    """A night (0 or 1), where it runs, and one to three kills in the order they come."""
    night = int(rng.random() < 0.3)
    place = rng.choice(["folder", "s3"])
    return night, place, [_draw_kill(rng, clean.night(night).seconds) for _ in range(rng.choice([1, 1, 2, 3]))]


def _draw_kill(rng: random.Random, seconds: float) -> Kill | str:
    target = rng.choice(["driver", "driver", "worker", "raylet", "moment", "moment"])
    if target == "moment":
        return rng.choice([*DRIVER_FAULTS, *WORKER_FAULTS])
    if rng.random() < 0.6:
        # A resubmission has fewer units left, so few enough to be reached by most.
        return Kill(target, rng.randint(1, UNITS - BUCKETS), round(rng.uniform(0, 0.5), 2))
    return Kill(target, 0, round(rng.uniform(0, seconds), 2))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_killed_night_equals_an_uninterrupted_one(
    seed: int, clean: CleanNights, tally: Tally, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(seed)
    night, place, kills = draw(rng, clean)
    uri = str(tmp_path / "workspace") if place == "folder" else request.getfixturevalue("s3_uri")
    started = time.monotonic()
    again = clean.again(night, uri, tmp_path / "output")
    ordeal = survive(again, kills, rng)
    problems = differences(Published.of(uri), clean.night(night).published) + unbalanced(uri)
    if not any(text.startswith("worker") for text in ordeal.struck):
        problems += [f"rows under suspicion: {path}" for path in again.deaths()]
    problems += [f"left running: {orphan}" for orphan in ordeal.orphans]
    tally.seeds += 1
    tally.equal += not problems
    tally.missed += len(ordeal.missed)
    tally.submissions += ordeal.submissions
    for text in ordeal.struck:
        who, *rest = text.split()
        tally.killed[who if "+" in rest else f"{who} at a named moment"] += 1
    told = "; ".join([*ordeal.struck, *(f"(too late: {text})" for text in ordeal.missed)])
    print(
        f"\nseed {seed:3d}  {place:6s}  night {night + 1}  {told}  {ordeal.submissions} submissions  "
        f"{'EQUAL' if not problems else 'DIFFERENT'}  {time.monotonic() - started:.0f} s",
        flush=True,
    )
    assert problems == []
