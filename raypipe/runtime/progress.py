"""Progress on stderr: how far, how fast, how long still. One line every few seconds, none for what ends at once."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

_EVERY_S = 5.0


@dataclass
class Progress:
    """Counts towards `total` steps of `what`; `amount` is the real work (rows, calls) behind them, in `unit`."""

    what: str
    total: int
    unit: str = "rows"
    done: int = 0
    amount: int = 0
    _started: float = field(default_factory=time.monotonic)
    _base: int = 0
    _shown: float = field(default_factory=time.monotonic)

    def resume(self, done: int) -> None:
        """Steps that were done before this process began; they do not count towards the rate."""
        self.done = self._base = done

    def step(self, amount: int) -> None:
        self.done += 1
        self.amount += amount
        now = time.monotonic()
        if now - self._shown >= _EVERY_S:
            self._shown = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        fresh = max(self.done - self._base, 1)
        left = (self.total - self.done) * seconds / fresh
        rate = self.amount / seconds
        return f"{self.what}: {self.done}/{self.total}  {rate:,.0f} {self.unit}/s  {_clock(left)} left"


def say(message: str) -> None:
    """One line for the person who watches."""
    print(message, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
