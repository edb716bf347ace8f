"""The online store: what is known of a user, read by id during a request.

A store holds versions, and each version is made of one night's tables. A version is loaded bucket by bucket. Readers
see it once it is complete, which one last write records; the next load finishes what an interrupted load left. The
store does not decide which complete version is read: the night in force does (`nights/current.json`), so that putting
an earlier night back in force moves every reader back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
import numpy as np
from numpy.typing import NDArray

from raypipe.errors import RaypipeError, UsageError
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import content_digest
from raypipe.storage.nights import Night
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace

FORMAT = 4
"""Of what is in a version. Raised whenever the same night would give other records, or a state another recipe: what an older raypipe
loaded is then loaded anew."""
TABLES = ("histories", "hidden_states", "recommendations", "summaries")
"""What a version is made of; those a night does not have are left out."""
ADDRESS = "RAYPIPE_ONLINE_STORE"
"""The variable that names the store where no option does."""
EMBEDDED = "online"
"""The embedded store's folder in a local workspace."""


class OnlineStoreDownError(RaypipeError):
    """The store cannot be reached, or it has lost the version that was asked for.

    The request itself is not at fault.
    """


@dataclass(frozen=True)
class UserRecord:
    """What a night knows of a user.

    `items` int32 is the history in time order; `seed` seeds what is sampled for this user; `state` float32 [width] is
    of the night's recommender; `listed` int32 and `scores` float32 are the recommendations; `summaries` are by
    paradigm. What does not exist is None or empty.
    """

    items: NDArray[np.int32]
    seed: int
    state: NDArray[np.float32] | None = None
    listed: NDArray[np.int32] | None = None
    scores: NDArray[np.float32] | None = None
    summaries: Mapping[str, str] | None = None

    def pack(self) -> bytes:
        """The record as bytes, in a format that can hold only data. Numbers are little-endian."""
        values: dict[str, Any] = {"i": self.items.astype("<i4").tobytes(), "r": self.seed}
        if self.state is not None:
            values["s"] = self.state.astype("<f4").tobytes()
        if self.listed is not None and self.scores is not None:
            values["l"], values["c"] = self.listed.astype("<i4").tobytes(), self.scores.astype("<f4").tobytes()
        if self.summaries:
            values["t"] = dict(self.summaries)
        return bytes(msgpack.packb(values))

    @classmethod
    def unpack(cls, data: bytes) -> UserRecord:
        values = msgpack.unpackb(data)
        return cls(
            np.frombuffer(values["i"], "<i4"),
            values["r"],
            np.frombuffer(values["s"], "<f4") if "s" in values else None,
            np.frombuffer(values["l"], "<i4") if "l" in values else None,
            np.frombuffer(values["c"], "<f4") if "c" in values else None,
            values.get("t"),
        )


class OnlineStore(Protocol):
    """Versions of packed records by user id. Every method raises OnlineStoreDownError if the store does not answer."""

    def begin(self, version: str, buckets: int) -> set[int]:
        """Register the version, and return which of its buckets are already loaded."""
        ...

    def write(self, version: str, bucket: int, users: Sequence[str], records: Sequence[bytes]) -> None:
        """Write a whole bucket. It counts as loaded only once all of it is written."""
        ...

    def complete(self, version: str, facts: Mapping[str, Any]) -> None:
        """Make the version visible to readers; `facts` describe it."""
        ...

    def facts(self, version: str) -> dict[str, Any] | None:
        """The facts of a complete version, or None for any other version."""
        ...

    def versions(self) -> list[str]:
        """Every version, complete or not, in the order in which they were begun."""
        ...

    def drop(self, version: str) -> None:
        """Remove a version: first hide it from readers, then delete its records.

        A version that does not exist is no error.
        """
        ...

    def get(self, version: str, users: Sequence[str]) -> list[bytes | None]:
        """The records of users, with None for users that the version does not have.

        Raises OnlineStoreDownError if the version is not complete, because it then says nothing about any user.
        """
        ...

    def size(self, version: str) -> int:
        """The bytes that the version takes in the store, with overhead.

        The number is approximate where only the store itself knows.
        """
        ...

    def scrub(self) -> bool:
        """Remove dropped data from the store's files too. Returns False if the store does not allow that."""
        ...

    def check_room(self) -> None:
        """Raise UsageError if the store is configured so that it may evict records."""
        ...

    def close(self) -> None: ...


def version_of(workspace: Workspace, night: Night) -> str:
    """The version that a night is served from.

    It is equal for nights of the same tables, recommender and variant of summaries.
    """
    tables = {name: workspace.tables[name].commit_digest(night.tables[name]) for name in TABLES if name in night.tables}
    named = {"recommender": night.release.get("recommender", ""), "summaries": night.summaries}
    return fingerprint({"format": FORMAT, "tables": tables, **named})[:16]


def open_online_store(url: str | None, store: Store) -> OnlineStore:
    """The store at `redis://…` or `rediss://…`, or the embedded store in a folder.

    If `url` is None, `RAYPIPE_ONLINE_STORE` is used, which keeps a password out of the process list; without it, the
    embedded store of a local workspace.

    Raises UsageError if no store is named and the workspace is on an object store, if Redis's client is not installed,
    or if the URL is of another kind.
    """
    url = url or os.environ.get(ADDRESS)
    name = content_digest(store.uri)[:12]  # Two workspaces may share a store.
    if url is not None and url.startswith(("redis://", "rediss://")):
        try:
            from raypipe.storage.online_redis import RedisStore
        except ImportError:
            raise UsageError(
                "Redis is named as the online store, and its client is not installed.", "pip install 'raypipe[redis]'"
            ) from None
        return RedisStore(url, f"raypipe:{name}")
    from raypipe.storage.online_embedded import EmbeddedStore

    if url is None:
        if not store.is_local:
            raise UsageError(
                f"The workspace {store.uri} is on an object store, and no online store is named.",
                "Name a Redis that all machines reach with --store redis://HOST:6379/0 or in RAYPIPE_ONLINE_STORE.",
            )
        return EmbeddedStore(store.local_path(EMBEDDED))
    if "://" in url:
        raise UsageError(
            f"{url.split('://')[0]!r} is no kind of online store.", "Name redis://HOST:PORT/DB or a folder."
        )
    return EmbeddedStore(Store(url).local_path(name))
