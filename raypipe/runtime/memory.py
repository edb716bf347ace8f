"""Memory that long-lived workers no longer need."""

from __future__ import annotations

import contextlib
import ctypes


def return_memory() -> None:
    """What was freed goes back to the system: glibc would keep the gaps, and a worker grow from one piece of work to the
    next (measured: from 0.7 to 4.9 GB over 12,000 steps of one training)."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
