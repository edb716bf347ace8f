"""Training's progress lines on the driver's stderr, wherever the workers run.

The workers' own output goes to Ray's log files. So rank 0 posts its lines to an actor, and the driver fetches them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from raypipe.runtime.progress import say

_EVERY_S = 2.0


class Board:
    """Lines that a worker posted and the driver has not taken yet."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def post(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


@contextmanager
def shown_on_stderr() -> Iterator[Any]:
    """The actor handle of a `Board`. Lines posted there are printed here until the block ends."""
    board = ray.remote(num_cpus=0)(Board).remote()
    over = threading.Event()

    def show() -> None:
        while not over.wait(_EVERY_S):
            _print(board)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        over.set()
        thread.join()
        _print(board)
        ray.kill(board)


def _print(board: Any) -> None:
    try:
        lines = ray.get(board.take.remote(), timeout=_EVERY_S)
    except ray.exceptions.RayError:
        return  # progress is a courtesy: a lost board must not end the training
    for line in lines:
        say(f"train  {line}")
