"""One writer per table: `flock` in a folder of one machine, a leased lock on an object store. Readers take no lock.

The leased lock is a series of numbered objects `locks/<name>/<generation>.json`. Whoever created the highest generation
holds the lock, which needs only create-if-absent. The holder rewrites its own object to renew the lease. Any job may
create the next generation once the lease has run out, or at once if the holder released it or was a process of this
machine that has died. Before it commits, a holder checks that no later generation exists: so a writer that slept
through its lease finds out. Leases are compared with the clocks of the machines that take part; keep the clocks within
a few seconds of each other.
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
    """An exclusive lock by name, used as a context manager.

    Raises UnavailableError while another job holds it, and UsageError if its lock file cannot be opened.
    """

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
        """Raise RaypipeError if the lease was lost. Call it before anything is committed under the lock."""
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
            with contextlib.suppress(Exception):  # the next renewal tries again, and check_held decides
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
    """Hold several locks. They are taken in name order, so that two jobs never wait for each other.

    If another job holds a lock, it is tried again for up to `wait_s` seconds. Raises UnavailableError after that.
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
    """Raise RaypipeError if the lease of any of the locks was lost."""
    for lock in locks:
        lock.check_held()


def run_lock(store: Store, run: str, lease_s: float = LEASE_S) -> Lock:
    """The lock that the driver of a submitted run holds while it lives."""
    return Lock(store, f"run-{run}", run, lease_s)


def _is_dead_here(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, since its last boot, that no longer exists."""
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
