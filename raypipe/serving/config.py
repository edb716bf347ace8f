"""What the online service serves, how much it takes from a request, and how it is deployed."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.runtime.job import ModelCache


class LimitOptions(Config):
    """What a request may ask for; more is refused before any work."""

    body_bytes: int = free(1_000_000, "of a request", ge=1)
    history: int = free(10_000, "items of a given history", ge=1)
    count: int = free(500, "items of a list, or to be scored", ge=1)
    queries: int = free(256, "queries of a batch", ge=1)
    deadline_s: float = free(10.0, "seconds until a request is given up with 503", gt=0)


class BatchingOptions(Config):
    """How requests are put together for the model."""

    size: int = free(64, "most requests of a batch", ge=1)
    wait_ms: float = free(2.0, "how long the first of a batch waits for others", ge=0)


class ReplicaOptions(Config):
    """How many processes answer, and how much waits for them."""

    least: int = free(1, "replicas at any time", ge=1)
    most: int = free(1, "replicas under load", ge=1)
    cpus: float = free(1.0, "CPUs reserved for each", ge=0)
    threads: int = free(1, "torch threads of each", ge=1)
    ongoing: int = free(256, "requests a replica works on at a time; at least two batches", ge=1)
    queued: int = free(512, "requests that wait for a replica; more get 503 and Retry-After", ge=0)
    drain_s: float = free(30.0, "seconds a replica that is to end has for the requests it has", gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"most is {self.most}, fewer replicas than the least, {self.least}")
        return self


class ServiceConfig(ModelCache):
    """A service of one workspace: the release and the night that are in force there, whichever these become."""

    workspace: str = free("./workspace", "workspace folder or s3:// URI")
    store: str | None = free(
        None,
        "online store, redis://HOST:PORT/DB or a folder; unset: RAYPIPE_ONLINE_STORE, else below a local workspace",
    )
    deny: str | None = shaping(None, "file of item ids that nobody is recommended, a line each")
    filter_seen: bool = shaping(True, "nothing of a user's own history, unless a request says otherwise")
    limits: LimitOptions = free(LimitOptions, "what a request may ask for")
    batching: BatchingOptions = free(BatchingOptions, "how requests are put together")
    replicas: ReplicaOptions = free(ReplicaOptions, "how many processes answer")
    watch_s: float = free(
        2.0, "seconds between looks at what is in force: a new night, release or token is taken up this late", gt=0
    )
    audit: str | None = free(None, "folder for one line a request, a file a replica; unset: the replica's stderr")

    @model_validator(mode="after")
    def _two_batches_fit(self) -> Self:
        # One is computed while the next fills: with fewer at a time, batches could never be full.
        if self.replicas.ongoing < 2 * self.batching.size:
            raise ValueError(
                f"replicas.ongoing is {self.replicas.ongoing}, less than two batches of {self.batching.size}"
            )
        return self
