"""The online store: what is known of a user, read by id in a request.

A store holds versions, each made of one night's tables. A version is loaded bucket by bucket, and readers see it once it is
complete, which is one write, the last; what is left of an interrupted load is finished by the next one. Which complete version
is read is not the store's to say: the night in force decides (`nights/current.json`), so that pointing back to an earlier
night moves every reader back.
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
    """A store that cannot be reached, or has lost the version that was asked for: a matter of time, not of the request."""


@dataclass(frozen=True)
class UserRecord:
    """A user as a night left them.

    `items` int32, the history in time order; `seed` of what is sampled for this user; `state` float32 [width] of the night's
    recommender; `listed` int32 and `scores` float32, its recommendations; `summaries` by paradigm. What there is none of is
    None or empty.
    """

    items: NDArray[np.int32]
    seed: int
    state: NDArray[np.float32] | None = None
    listed: NDArray[np.int32] | None = None
    scores: NDArray[np.float32] | None = None
    summaries: Mapping[str, str] | None = None

    def pack(self) -> bytes:
        """As bytes, in a form that can hold nothing but data; numbers are little-endian."""
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
    """Versions of packed records by user id. Every method raises OnlineStoreDownError where the store does not answer."""

    def begin(self, version: str, buckets: int) -> set[int]:
        """Make the version known, and tell which of its buckets are there already."""
        ...

    def write(self, version: str, bucket: int, users: Sequence[str], records: Sequence[bytes]) -> None:
        """Put a whole bucket: afterwards it is there, or nothing of it counts."""
        ...

    def complete(self, version: str, facts: Mapping[str, Any]) -> None:
        """Let readers see the version; `facts` tell what it is."""
        ...

    def facts(self, version: str) -> dict[str, Any] | None:
        """The facts of a complete version, None of any other."""
        ...

    def versions(self) -> list[str]:
        """Every version, complete or not, the one begun last at the end."""
        ...

    def drop(self, version: str) -> None:
        """Take a version away: first from sight, then its records. One that is not there is no error."""
        ...

    def get(self, version: str, users: Sequence[str]) -> list[bytes | None]:
        """The records of users, None of those it does not have.

        Raises OnlineStoreDownError where the version is not complete: that is no answer about anybody.
        """
        ...

    def size(self, version: str) -> int:
        """Bytes the version takes in the store, its own upkeep included; about, where only the store knows."""
        ...

    def scrub(self) -> bool:
        """Have what was dropped leave the store's files too; False where the store does not let it be done."""
        ...

    def check_room(self) -> None:
        """Raises UsageError where the store is set up so that it may forget what it was given."""
        ...

    def close(self) -> None: ...


def version_of(workspace: Workspace, night: Night) -> str:
    """The version a night is served from: equal for nights of the same tables, recommender and variant of summaries."""
    tables = {name: workspace.tables[name].commit_digest(night.tables[name]) for name in TABLES if name in night.tables}
    named = {"recommender": night.release.get("recommender", ""), "summaries": night.summaries}
    return fingerprint({"format": FORMAT, "tables": tables, **named})[:16]


def open_online_store(url: str | None, store: Store) -> OnlineStore:
    """The store at `redis://…` or `rediss://…`, or the embedded one in a folder.

    Unset it is that of `RAYPIPE_ONLINE_STORE`, which keeps a password out of the list of processes, or else the embedded one of
    a local workspace.

    Raises UsageError where none is named and the workspace is on an object store, and where Redis's client is not installed.
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
