"""Leases that a job loses while it sleeps."""

from __future__ import annotations

import json
import time

from raypipe.storage.locks import Lock
from raypipe.storage.store import Store


def taken_over(store: Store, name: str) -> Lock:
    """Whoever holds the lock on an object store has slept through the lease, and this one, which is not entered yet, takes it."""
    lease = store.list(f"locks/{name}")[-1].path
    store.put(lease, json.dumps({**json.loads(store.read(lease)), "expires": time.time() - 1}).encode())
    return Lock(store, name, "successor")
