"""Progress on stderr: how much is done, how fast, and how long it still takes.

One line every few seconds, and none for work that ends at once. Lines are text for a person, or JSON for a log
collector. A JSON line also carries its time, level, job, run key and unit.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_EVERY_S = 5.0

LogFormat = Literal["text", "json"]

_format: LogFormat = "text"
_facts: dict[str, Any] = {}


def speak(form: LogFormat, **facts: Any) -> None:
    """Set the format of this process's lines and replace the `facts` that each JSON line carries."""
    global _format
    _format = form
    _facts.clear()
    _facts.update(facts)


def note(**facts: Any) -> None:
    """Add facts that all later lines carry."""
    _facts.update(facts)


@contextlib.contextmanager
def about(**facts: Any) -> Iterator[None]:
    """Add facts to the lines within the block. After the block these facts, and those noted within it, are dropped."""
    before = dict(_facts)
    _facts.update(facts)
    try:
        yield
    finally:
        _facts.clear()
        _facts.update(before)


def say(message: str, level: Literal["info", "warning", "error"] = "info", **facts: Any) -> None:
    """Print one line to stderr: the message as text, or as JSON with the facts."""
    if _format == "json":
        message = _line(time.time(), level, message, {**_facts, **facts})
    print(message, file=sys.stderr, flush=True)


class JsonLines(logging.Formatter):
    """A logging formatter that writes records as JSON lines like `say` does, with `facts`.

    A traceback, if there is one, is one of the facts.
    """

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.facts = facts

    def format(self, record: logging.LogRecord) -> str:
        told = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return _line(record.created, record.levelname.lower(), record.getMessage(), {**self.facts, **told})


def _line(at: float, level: str, message: str, facts: Mapping[str, Any]) -> str:
    now = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **facts}, ensure_ascii=False)


@dataclass
class Progress:
    """Counts `done` towards `total` steps of `what`.

    `amount` is the real work (rows, calls) behind the steps, in `unit`.
    """

    what: str
    total: int
    unit: str = "rows"
    done: int = 0
    amount: int = 0
    _started: float = field(default_factory=time.monotonic)
    _base: int = 0
    _shown: float = field(default_factory=time.monotonic)

    def resume(self, done: int) -> None:
        """Set the steps that were done before this process began. They do not count towards the rate."""
        self.done = self._base = done

    def step(self, amount: int) -> None:
        self.done += 1
        self.amount += amount
        now = time.monotonic()
        if now - self._shown >= _EVERY_S:
            self._shown = now
            say(self.line(now), done=self.done, planned=self.total)

    def line(self, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        fresh = max(self.done - self._base, 1)
        left = (self.total - self.done) * seconds / fresh
        rate = self.amount / seconds
        return f"{self.what}: {self.done}/{self.total}  {rate:,.0f} {self.unit}/s  {clock(left)} left"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
