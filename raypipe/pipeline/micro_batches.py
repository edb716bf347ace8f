"""Running the rows of a unit through an engine, in micro-batches.

A poison row, a death or a cap costs the same in every job:

* Before a micro-batch runs, the unit's journal names its rows and no others: a death makes them suspects. What is built
  or read for all rows comes before (`read`, `most`), as no single row is to blame for it.
* Suspects run alone and before the other rows, those that died alone most often first: a death ends the attempt, and
  costs what was answered before it in this unit. A row that died alone `MAX_DEATHS` times is rejected as `WORKER_DIED`,
  and is neither named nor run.
* A micro-batch runs once the budget has granted an upper bound of what it may take. Afterwards the budget gets back
  what was not used, and the ledger is told what was used.
* A micro-batch that does not fit a cap is halved, down to single rows. A single row that does not fit is refused. As
  much work as was refused is not asked for again in this unit. Smaller micro-batches go on for as long as the caps
  leave room for anything at all.
* No row runs twice. A row that the caps left out has no result.

The job decides how a row is asked, how its answer is checked, and what becomes of it in a table.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from raypipe.pipeline.rejects import WORKER_DIED
from raypipe.runtime.budget import Budget
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import MAX_DEATHS, Usage


class Result(Protocol):
    """The result of a row: what it took, and a reason and a message if it is rejected."""

    @property
    def reason(self) -> str: ...

    @property
    def message(self) -> str: ...

    @property
    def calls(self) -> int: ...

    @property
    def tokens_in(self) -> int: ...

    @property
    def tokens_out(self) -> int: ...


B = TypeVar("B")
R = TypeVar("R", bound=Result)


def run_micro_batches(
    names: Sequence[str],
    size: int,
    context: UnitContext,
    budget: Budget,
    *,
    read: Callable[[list[int]], B],
    weigh: Callable[[B], int],
    most: Callable[[int], Usage],
    run: Callable[[B], Sequence[R]],
    rejected: Callable[[int, str, str], R],
    alike: Callable[[int], int] = lambda row: 0,
) -> dict[int, R]:
    """The results of rows by their place in `names`, in the order in which they ran.

    `names` are the rows' names in the journal. `read` makes a micro-batch of at most `size` rows, and `run` answers it
    with one result a row. Rows share a micro-batch if `alike` gives them the same number; the smallest number comes
    first. `weigh` tells how much work a micro-batch is, at least 1; only caps need it. `most` returns an upper bound of
    what so much work takes, and grows with it. It is called before the journal is written, with or without caps, and so
    builds what `run` needs. `rejected` makes the result of a row from a reason and a message.
    """
    results: dict[int, R] = {}
    batches = deque(_cut(names, context.deaths, size, alike))
    refused = sys.maxsize  # as much work, or more, is not asked for again
    while batches:
        rows = batches.popleft()
        if context.deaths.get(names[rows[0]], 0) >= MAX_DEATHS:
            results[rows[0]] = rejected(rows[0], *WORKER_DIED)
            continue
        batch = read(rows)
        weight = weigh(batch) if budget.limits.any else 0
        reserved = most(weight)
        if weight >= refused or not budget.take(reserved):
            if weight < refused and not _leaves_room(budget, most(1)):
                break
            # What is left of a cap may not be enough for all of these rows, but for some.
            refused = min(refused, weight)
            if len(rows) > 1:
                half = len(rows) // 2
                batches.extendleft([rows[half:], rows[:half]])
            continue
        context.journal([names[row] for row in rows])
        done = run(batch)
        budget.give_back(reserved, taken := used(done))
        context.spent(taken)
        results.update(zip(rows, done, strict=True))
    return results


def used(results: Iterable[Result]) -> Usage:
    """What all results took together."""
    results = list(results)
    return Usage(
        sum(result.calls for result in results),
        sum(result.tokens_in for result in results),
        sum(result.tokens_out for result in results),
    )


def _leaves_room(budget: Budget, least: Usage) -> bool:
    """Whether the caps leave room for anything at all."""
    if not budget.take(least):
        return False
    budget.give_back(least, Usage())
    return True


def _cut(
    names: Sequence[str], suspects: Mapping[str, int], size: int, alike: Callable[[int], int]
) -> Iterator[list[int]]:
    alone = [row for row, name in enumerate(names) if name in suspects]
    yield from ([row] for row in sorted(alone, key=lambda row: -suspects[names[row]]))
    rest = [row for row, name in enumerate(names) if name not in suspects]
    for _, group in groupby(sorted(rest, key=alike), alike):
        mine = list(group)
        yield from (mine[start : start + size] for start in range(0, len(mine), size))
