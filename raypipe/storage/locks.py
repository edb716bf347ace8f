"""One writer per table: `flock` on one machine's folder, a leased lock on an object store. Readers take none.

The leased lock is a row of numbered objects `locks/<name>/<generation>.json`. Holding the lock is having created the
highest generation, which needs only create-if-absent; the holder rewrites its own object to renew the lease, and anyone
may create the next generation once the lease has run out, or at once when the holder released it or is a dead process of
this machine. Before it commits, a holder checks that no later generation exists, so that a writer that slept through its
lease finds out. Leases are judged by the clocks of the machines that take part: keep them within a few seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from raypipe.errors import RaypipeError, UnavailableError, UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.store import Store

LEASE_S = 60.0


class Lock:
    """An exclusive lock by name; use it as a context manager. Raises UnavailableError while another job holds it."""

    def __init__(self, store: Store, name: str, owner: str, lease_s: float = LEASE_S) -> None:
        self.store = store
        self.name = name
        self.owner = owner
        self.lease_s = lease_s
        self._file: IO[str] | None = None
        self._generation = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        if self.store.is_local:
            self._enter_flock()
        else:
            self._enter_lease()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            with contextlib.suppress(RaypipeError):
                self.store.put(self._path(self._generation), self._record(released=True))
                self.store.delete(
                    self._path(generation) for generation in self._generations() if generation < self._generation
                )

    def check_held(self) -> None:
        """Raise RaypipeError where the lease was lost, before anything is committed under it."""
        if self._thread is not None and max(self._generations(), default=0) != self._generation:
            raise RaypipeError(
                f"This job's lease on {self.name} ran out while it was not running, and another job took the lock.",
                "Nothing more was published by this one; look at `raypipe status` before you submit again.",
            )

    def _enter_flock(self) -> None:
        path = self.store.local_path(f"locks/{self.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UsageError(
                f"The lock file {path} cannot be opened: {error.strerror}.",
                "Give this user write permission below the workspace's locks/ folder.",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            held_by = file.read().strip() or "another job"
            file.close()
            raise UnavailableError(
                f"{self.name} is being written by {held_by}.",
                "One job writes a table at a time: wait for it or stop it, then submit again. The lock goes with the process.",
            ) from None
        file.truncate(0)
        file.write(f"{self.owner}, process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def _enter_lease(self) -> None:
        newest = max(self._generations(), default=0)
        if newest:
            record = json.loads(self.store.get(self._path(newest)) or b"{}")
            left = record.get("expires", 0.0) - time.time()
            if not record.get("released") and left > 0 and not _is_dead_here(record):
                until = time.strftime("%H:%M:%S", time.localtime(record["expires"]))
                raise UnavailableError(
                    f"{self.name} is being written by {record['owner']}, process {record['pid']} on {record['host']}; "
                    f"its lease runs until {until} ({left:.0f} s from now) and is renewed while the process lives.",
                    "Wait for that job or stop it. If it was killed, submit again once the lease has run out.",
                )
        self._generation = newest + 1
        if not self.store.create(self._path(self._generation), self._record()):
            raise UnavailableError(
                f"{self.name} was locked by another job this very moment.", "Submit again when it is done."
            )
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{self.name}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(self.lease_s / 3):
            with contextlib.suppress(Exception):  # the next beat tries again; check_held has the last word
                self.store.put(self._path(self._generation), self._record())

    def _generations(self) -> list[int]:
        return [int(entry.path.rsplit("/", 1)[1].split(".")[0]) for entry in self.store.list(f"locks/{self.name}")]

    def _path(self, generation: int) -> str:
        return f"locks/{self.name}/{generation:012d}.json"

    def _record(self, released: bool = False) -> bytes:
        record = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": uuid.uuid4().hex,
            "expires": time.time() + self.lease_s,
            "released": released,
        }
        return canonical_json(record).encode()


@contextlib.contextmanager
def hold(
    store: Store, names: Sequence[str], owner: str, lease_s: float = LEASE_S, wait_s: float = 0.0
) -> Iterator[list[Lock]]:
    """Hold several locks, taken in name order so that two jobs never wait for each other.

    A lock that another job holds is asked for again until `wait_s` have passed; then UnavailableError.
    """
    deadline = time.monotonic() + wait_s
    with contextlib.ExitStack() as stack:
        locks = [Lock(store, name, owner, lease_s) for name in sorted(set(names))]
        for lock in locks:
            while True:
                try:
                    stack.enter_context(lock)
                    break
                except UnavailableError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
        yield locks


def check_held(locks: Iterable[Lock]) -> None:
    """Raise RaypipeError where the lease of one was lost."""
    for lock in locks:
        lock.check_held()


def run_lock(store: Store, run: str, lease_s: float = LEASE_S) -> Lock:
    """What the driver of a submitted run holds while it lives."""
    return Lock(store, f"run-{run}", run, lease_s)


def _is_dead_here(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine and boot that is no more."""
    if record.get("host") != socket.gethostname() or record.get("boot") != _boot_id():
        return False
    try:
        return abs(psutil.Process(record["pid"]).create_time() - record["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
