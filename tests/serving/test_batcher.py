"""What comes while a batch is computed is the next one, and everybody gets an answer of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raypipe.serving.batcher import Batcher
from raypipe.serving.config import BatchingOptions

Handler = Callable[[str, list[int]], Awaitable[list[int]]]


def batcher(handler: Handler, size: int = 32, wait_ms: float = 5) -> Batcher[int, int]:
    return Batcher(handler, BatchingOptions(size=size, wait_ms=wait_ms))


def recorded(seconds: float = 0.0) -> tuple[list[tuple[str, list[int]]], Handler]:
    """Answers tenfold, some time later; and what it was asked."""
    asked: list[tuple[str, list[int]]] = []

    async def handler(key: str, queries: list[int]) -> list[int]:
        asked.append((key, queries))
        await asyncio.sleep(seconds)
        return [10 * query for query in queries]

    return asked, handler


@pytest.mark.parametrize("aside", [True, False], ids=["aside", "where requests are taken"])
def test_queries_that_come_during_a_batch_are_the_next(aside: bool) -> None:
    """24 of them, 20 ms apart, of what takes .5 s for any batch: one alone, and then all that came meanwhile."""
    batches: list[list[int]] = []

    async def handler(key: str, queries: list[int]) -> list[int]:
        batches.append(queries)
        if aside:
            await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.5)
        else:
            time.sleep(0.5)
        return [10 * query for query in queries]

    async def ask(of: Batcher[int, int], number: int) -> int:
        await asyncio.sleep(0.02 * number)
        return await of.ask(number)

    async def all_of_them() -> list[int]:
        of = batcher(handler)
        return await asyncio.gather(*(ask(of, number) for number in range(24)))

    assert asyncio.run(all_of_them()) == [10 * number for number in range(24)]
    assert len(batches) <= 3
    assert [number for batch in batches for number in batch] == list(range(24))


def test_a_batch_is_of_one_key_the_oldest_s_and_no_larger_than_it_may_be() -> None:
    asked, handler = recorded()

    async def all_of_them() -> list[int]:
        of = batcher(handler, size=3)
        return await asyncio.gather(*(of.ask(number, "ab"[number % 2]) for number in range(9)))

    assert asyncio.run(all_of_them()) == [10 * number for number in range(9)]
    assert asked == [("a", [0, 2, 4]), ("b", [1, 3, 5]), ("a", [6, 8]), ("b", [7])]


def test_a_full_batch_waits_no_longer_and_another_as_long_as_it_may() -> None:
    asked, handler = recorded()

    async def all_of_them() -> None:
        of = batcher(handler, size=2, wait_ms=60_000)
        await asyncio.wait_for(asyncio.gather(of.ask(1), of.ask(2)), 30)
        slow = batcher(handler, size=3, wait_ms=100)
        first = asyncio.ensure_future(slow.ask(3))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, slow.ask(4))

    asyncio.run(all_of_them())
    assert asked == [("", [1, 2]), ("", [3, 4])]


def test_what_fails_fails_for_its_own_batch_alone_and_who_has_gone_is_not_asked_for() -> None:
    asked: list[list[int]] = []

    async def handler(key: str, queries: list[int]) -> list[int]:
        asked.append(queries)
        await asyncio.sleep(0.05)
        if key == "short":
            return []
        if key == "bad":
            raise ValueError("never")
        return queries

    async def all_of_them() -> list[Any]:
        of = batcher(handler)
        tasks = [asyncio.ensure_future(of.ask(n, key)) for n, key in enumerate(["good", "bad", "bad", "short", "good"])]
        gone = asyncio.ensure_future(of.ask(9, "bad"))
        during = asyncio.ensure_future(of.ask(7, "good"))
        await asyncio.sleep(0.02)
        gone.cancel()
        during.cancel()
        found = await asyncio.gather(*tasks, gone, during, return_exceptions=True)
        return [*found, await of.ask(5)]

    *found, last = asyncio.run(all_of_them())
    assert [found[0], found[4], last] == [0, 4, 5]
    assert [type(error) for error in found[1:4]] == [ValueError] * 3
    assert [type(error) for error in found[5:]] == [asyncio.CancelledError] * 2
    assert asked == [[0, 4, 7], [1, 2], [3], [5]]


def test_an_event_loop_that_ends_leaves_nobody_waiting() -> None:
    _, handler = recorded(60)

    async def begun() -> list[asyncio.Future[int]]:
        of = batcher(handler)
        tasks = [asyncio.ensure_future(of.ask(1)), asyncio.ensure_future(of.ask(2, "other"))]
        await asyncio.sleep(0.05)
        return tasks

    assert [task.cancelled() for task in asyncio.run(begun())] == [True, True]
