"""The online store of a cluster: a Redis server that every replica reaches.

The keys below one prefix are: a hash of the complete versions and their facts; a sorted set of all versions by start
time; for each version, its number of buckets, a set of the buckets that are loaded, and one hash a bucket, user id →
record. A user takes about 100 bytes in addition to the record (measured). Dropping a version unlinks its buckets.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.hashing import stable_hash
from raypipe.storage.online import OnlineStoreDownError

_USERS_A_COMMAND = 500
_CONNECT_S = 2.0
_ANSWER_S = 5.0
# Shorter limits during a request, because all other requests of its batch wait too.
_READER_CONNECT_S = 0.3
_READER_ANSWER_S = 0.5
_LONG_S = 0.1  # after a failed request that took longer, later requests fail at once
_REST_S = 2.0  # for this long
_POLL_S = 0.1


class RedisStore:
    """Implements `OnlineStore` below `prefix` on the server at `url`. Raises UsageError for an invalid address.

    Connections are opened at first use and shared by the threads of a process.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.host = urlsplit(url).hostname  # the rest may hold a password
        self.prefix = prefix
        try:
            self._redis = _client(url, _CONNECT_S, _ANSWER_S)
            self._reader = _client(url, _READER_CONNECT_S, _READER_ANSWER_S)
        except ValueError as error:
            raise UsageError(f"The online store's address is none: {error}.", "Write redis://HOST:PORT/DB.") from None
        self._buckets: dict[str, int] = {}
        self._rests_until = 0.0

    def begin(self, version: str, buckets: int) -> set[int]:
        with _told(self.host):
            self._redis.zadd(f"{self.prefix}:begun", {version: time.time()}, nx=True)
            self._redis.set(f"{self.prefix}:{version}:buckets", buckets)
            return {int(bucket) for bucket in self._redis.smembers(f"{self.prefix}:{version}:loaded")}

    def write(self, version: str, bucket: int, users: Sequence[str], records: Sequence[bytes]) -> None:
        key = self._key(version, bucket)
        with _told(self.host):
            self._redis.unlink(key)
            for start in range(0, len(users), _USERS_A_COMMAND):
                chunk = slice(start, start + _USERS_A_COMMAND)
                self._redis.hset(key, mapping=dict(zip(users[chunk], records[chunk], strict=True)))
            self._redis.sadd(f"{self.prefix}:{version}:loaded", bucket)

    def complete(self, version: str, facts: Mapping[str, Any]) -> None:
        with _told(self.host):
            self._redis.hset(f"{self.prefix}:complete", version, canonical_json(dict(facts)))

    def facts(self, version: str) -> dict[str, Any] | None:
        with _told(self.host):
            found = self._redis.hget(f"{self.prefix}:complete", version)
        return None if found is None else dict(json.loads(found))

    def versions(self) -> list[str]:
        with _told(self.host):
            return [version.decode() for version in self._redis.zrange(f"{self.prefix}:begun", 0, -1)]

    def drop(self, version: str) -> None:
        self._buckets.pop(version, None)
        with _told(self.host):
            self._redis.hdel(f"{self.prefix}:complete", version)
            # This goes before the buckets: a later load of a half-deleted version must not take its buckets for loaded.
            self._redis.unlink(f"{self.prefix}:{version}:loaded")
            # A bucket whose load was interrupted is in no set, but its key exists.
            buckets = int(self._redis.get(f"{self.prefix}:{version}:buckets") or 0)
            for start in range(0, buckets, _USERS_A_COMMAND):
                chunk = range(start, min(start + _USERS_A_COMMAND, buckets))
                self._redis.unlink(*(self._key(version, bucket) for bucket in chunk))
            self._redis.unlink(f"{self.prefix}:{version}:buckets")
            self._redis.zrem(f"{self.prefix}:begun", version)

    def get(self, version: str, users: Sequence[str]) -> list[bytes | None]:
        with self._in_time(), _told(self.host):
            # The number of buckets is cached only for a version that exists: another thread may read or remove the
            # entry meanwhile.
            if not (buckets := self._buckets.get(version)):
                if not (buckets := int(self._reader.get(f"{self.prefix}:{version}:buckets") or 0)):
                    raise self._gone()
                self._buckets[version] = buckets
            homes = (stable_hash(pa.array(users, pa.string())) % np.uint64(buckets)).tolist()
            asked: dict[int, list[int]] = {}
            for at, bucket in enumerate(homes):
                asked.setdefault(bucket, []).append(at)
            # Checked in the same round trip: a server that restarted empty knows no user, and that must not count as an
            # answer.
            pipeline = self._reader.pipeline(transaction=False)
            pipeline.hexists(f"{self.prefix}:complete", version)
            for bucket, places in asked.items():
                pipeline.hmget(self._key(version, bucket), [users[at] for at in places])
            is_complete, *answers = pipeline.execute()
        if not is_complete:
            raise self._gone()
        found: list[bytes | None] = [None] * len(users)
        for places, answer in zip(asked.values(), answers, strict=True):
            for at, record in zip(places, answer, strict=True):
                found[at] = record
        return found

    def size(self, version: str) -> int:
        with _told(self.host):
            pipeline = self._redis.pipeline(transaction=False)
            for bucket in range(int(self._redis.get(f"{self.prefix}:{version}:buckets") or 0)):
                pipeline.memory_usage(self._key(version, bucket))
            return sum(size or 0 for size in pipeline.execute())

    def scrub(self) -> bool:
        """Rewrite the append-only file and the snapshot, if the server keeps them.

        Until then both still hold dropped data.
        """
        with _told(self.host):
            try:
                kept = {**self._redis.config_get("appendonly"), **self._redis.config_get("save")}
                if kept["appendonly"] == "yes":
                    self._redis.bgrewriteaof()
                    self._wait_for("aof_rewrite_in_progress", "aof_rewrite_scheduled")
                if kept["save"]:
                    self._redis.bgsave()
                    self._wait_for("rdb_bgsave_in_progress")
            except redis.ResponseError:
                return False
            told = self._redis.info("persistence")
            return bool(told["aof_last_bgrewrite_status"] == told["rdb_last_bgsave_status"] == "ok")

    def _wait_for(self, *signs: str) -> None:
        while any(self._redis.info("persistence").get(sign) for sign in signs):
            time.sleep(_POLL_S)

    def check_room(self) -> None:
        with _told(self.host):
            memory = self._redis.info("memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory") and policy.startswith("allkeys"):
            raise UsageError(
                f"The Redis on {self.host} forgets keys when its memory is full (maxmemory-policy {policy}).",
                "Set maxmemory-policy to noeviction: users that vanish would be served as strangers.",
            )

    def close(self) -> None:
        self._redis.close()
        self._reader.close()

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Fail at once for a while after a request that failed slowly.

        So a hanging server delays one request only.
        """
        started = time.monotonic()
        if started < self._rests_until:
            raise OnlineStoreDownError(
                f"The Redis on {self.host} did not answer a moment ago.", "Check that it runs, and is not swapping."
            )
        try:
            yield
        except OnlineStoreDownError:
            if time.monotonic() - started > _LONG_S:
                self._rests_until = time.monotonic() + _REST_S
            raise

    def _key(self, version: str, bucket: int) -> str:
        return f"{self.prefix}:{version}:{bucket}"

    def _gone(self) -> OnlineStoreDownError:
        return OnlineStoreDownError(
            f"The Redis on {self.host} does not hold the night in force.",
            "Run `raypipe online`; a Redis without persistence forgets everything when it restarts.",
        )


def _client(url: str, connect_s: float, answer_s: float) -> Any:
    # One retry, in case the server closed the connection meanwhile. The client's default would wait for seconds.
    retry = Retry(NoBackoff(), 1, (redis.ConnectionError,))
    return redis.Redis.from_url(url, socket_connect_timeout=connect_s, socket_timeout=answer_s, retry=retry)


@contextlib.contextmanager
def _told(host: str | None) -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise OnlineStoreDownError(
            f"The Redis on {host} does not do as it is asked: {type(error).__name__}: {str(error)[:200]}.",
            "Check that it runs, its address and password, and its memory.",
        ) from error
