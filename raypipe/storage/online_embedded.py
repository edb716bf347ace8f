"""The online store of one machine: one folder with a SQLite file for each version.

A bucket is one transaction. Several processes may read while one writes; readers of a complete version take no locks.
Dropping a version removes its file; a reader that has the file open can read on.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.online import OnlineStoreDownError

_SUFFIX = ".sqlite"
_USERS_A_QUERY = 500
_WAIT_S = 60.0


class EmbeddedStore:
    """Implements `OnlineStore` in `folder`, which is created at the first load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = threading.local()

    def begin(self, version: str, buckets: int) -> set[int]:
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._writing(version) as db:
                db.execute("CREATE TABLE IF NOT EXISTS users (user_id TEXT PRIMARY KEY, record BLOB NOT NULL)")
                db.execute("CREATE TABLE IF NOT EXISTS buckets (bucket INTEGER PRIMARY KEY)")
                db.execute("CREATE TABLE IF NOT EXISTS facts (facts TEXT NOT NULL)")
                return {row[0] for row in db.execute("SELECT bucket FROM buckets")}

    def write(self, version: str, bucket: int, users: Sequence[str], records: Sequence[bytes]) -> None:
        with _told(self.folder), self._writing(version) as db:
            rows = zip(users, records, strict=True)
            db.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", rows)
            db.execute("INSERT OR REPLACE INTO buckets VALUES (?)", (bucket,))

    def complete(self, version: str, facts: Mapping[str, Any]) -> None:
        with _told(self.folder), self._writing(version) as db:
            db.execute("DELETE FROM facts")
            db.execute("INSERT INTO facts VALUES (?)", (canonical_json(dict(facts)),))

    def facts(self, version: str) -> dict[str, Any] | None:
        if not self._path(version).exists():
            return None
        with _told(self.folder), contextlib.closing(self._connect(version, "ro")) as db:
            try:
                row = db.execute("SELECT facts FROM facts").fetchone()
            except sqlite3.OperationalError as error:
                is_begun = "no such table" in str(error)
                # The writer was killed; the next writer rolls its transaction back.
                is_left = error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
                if is_begun or is_left:
                    return None
                raise
        return None if row is None else dict(json.loads(row[0]))

    def versions(self) -> list[str]:
        with _told(self.folder):
            paths = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_ctime_ns)
        return [path.name.removesuffix(_SUFFIX) for path in paths]

    def drop(self, version: str) -> None:
        with _told(self.folder):
            # If a rollback journal outlived its file, SQLite would apply it to the next file of that name.
            for path in (self._path(version), self._path(version).with_name(f"{version}{_SUFFIX}-journal")):
                path.unlink(missing_ok=True)

    def get(self, version: str, users: Sequence[str]) -> list[bytes | None]:
        with _told(self.folder):
            db = self._reading(version)
            found: dict[str, bytes] = {}
            for start in range(0, len(users), _USERS_A_QUERY):
                asked = list(users[start : start + _USERS_A_QUERY])
                marks = ",".join("?" * len(asked))
                found.update(db.execute(f"SELECT user_id, record FROM users WHERE user_id IN ({marks})", asked))
        return [found.get(user) for user in users]

    def size(self, version: str) -> int:
        with _told(self.folder):
            return self._path(version).stat().st_size

    def scrub(self) -> bool:
        return True  # a version is a file, and a dropped one is deleted

    def check_room(self) -> None:
        """Do nothing: a file evicts nothing."""

    def close(self) -> None:
        for db, _ in getattr(self._open, "read", {}).values():
            db.close()
        self._open.read = {}

    def _path(self, version: str) -> Path:
        return self.folder / f"{version}{_SUFFIX}"

    def _connect(self, version: str, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._path(version).absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT_S)

    @contextlib.contextmanager
    def _writing(self, version: str) -> Iterator[sqlite3.Connection]:
        """A write transaction. If the process is killed, the next writer rolls it back; power loss is not covered."""
        with contextlib.closing(self._connect(version, "rwc")) as db:
            db.execute("PRAGMA synchronous = OFF")
            with db:
                yield db

    def _reading(self, version: str) -> sqlite3.Connection:
        """This thread's connection to a complete version. A complete version never changes."""
        if not hasattr(self._open, "read"):
            self._open.read = {}
        known: dict[str, tuple[sqlite3.Connection, int]] = self._open.read
        path = self._path(version)
        inode = path.stat().st_ino if path.exists() else 0
        # A connection still reads a deleted file. A file is deleted when a user in it is forgotten, so the connection
        # is closed.
        if version in known and known[version][1] != inode:
            known.pop(version)[0].close()
        if version not in known:
            if self.facts(version) is None:
                raise OnlineStoreDownError(
                    f"The online store in {self.folder} does not hold the night in force.", "Run `raypipe online`."
                )
            for old in list(known):
                known.pop(old)[0].close()
            known[version] = (self._connect(version, "ro&immutable=1"), inode)
        return known[version][0]


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise OnlineStoreDownError(
            f"The online store in {folder} cannot be used: {error}.", "Check the folder, its disk and its owner."
        ) from error
