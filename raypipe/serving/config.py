"""What the online service serves, how much it takes from a request, and how it is deployed."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.engines.checks import AnswerChecks
from raypipe.engines.engine import Decoding, EngineConfig
from raypipe.runtime.job import ModelCache
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.trsr import Shown

OF_RELEASE = "release"
"""Stands for the language model of the release that is served."""


class LimitOptions(Config):
    """What a request may ask for; a request for more is refused before any work."""

    body_bytes: int = free(1_000_000, "of a request", ge=1)
    history: int = free(10_000, "items of a given history", ge=1)
    count: int = free(500, "items of a list, or to be scored", ge=1)
    ranked: int = free(50, "items that a language model puts in order", ge=1)
    queries: int = free(256, "queries of a batch", ge=1)
    blocks: int = free(100, "blocks of a history that is to be summarised", ge=1)
    batch_blocks: int = free(256, "blocks of all histories of a batch that are to be summarised", ge=1)
    deadline_s: float = free(10.0, "seconds until a request is given up with 503", gt=0)
    words_s: float = free(60.0, "as deadline_s, of a request that asks the language model", gt=0)


class BatchingOptions(Config):
    """How requests are batched for the model."""

    size: int = free(64, "most requests of a batch", ge=1)
    wait_ms: float = free(
        0.0, "how long the first of a batch waits for others; what comes while one is computed is the next", ge=0
    )


class ReplicaOptions(Config):
    """How many processes answer, and how many requests wait for them."""

    least: int = free(1, "replicas at any time", ge=1)
    most: int = free(1, "replicas under load", ge=1)
    cpus: float = free(1.0, "CPUs reserved for each", ge=0)
    threads: int = free(1, "torch threads of each", ge=1)
    ongoing: int = free(256, "requests a replica works on at a time; at least two batches", ge=1)
    queued: int = free(512, "requests that wait for a replica; more get 503 and Retry-After", ge=0)
    wait_s: float = free(
        1.0, "seconds a request waits before it is given to one, on one machine; then it gets 503", gt=0
    )
    busy: float = free(0.5, "share of `ongoing` in hand at which another replica is started", gt=0, le=1)
    calm_s: float = free(60.0, "seconds of less load until a replica is taken away", gt=0)
    drain_s: float = free(30.0, "seconds a replica that is to end has for the requests it has", gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"most is {self.most}, fewer replicas than the least, {self.least}")
        return self


class ReadingOptions(Config):
    """How titles are read from a recommender's states. Prompts and decoding are those of `align`."""

    max_new_tokens: int = shaping(256, "most tokens of one answer, as `align --answer_tokens`", ge=1)
    constrained: bool = shaping(
        True, "titles are decoded among the catalogue's, whatever the adapter was measured with"
    )


class LanguageOptions(Config):
    """The release's language model, which runs in processes of its own, and what it is asked for."""

    replicas: int = free(1, "processes that hold it; with none nothing is put into words", ge=0)
    cpus: float = free(1.0, "CPUs reserved for each", ge=0)
    gpus: float = free(0.0, "GPUs reserved for each", ge=0)
    batching: BatchingOptions = free(lambda: BatchingOptions(size=32, wait_ms=5), "how requests to it are put together")
    ongoing: int = free(64, "requests a process works on at a time; at least two batches", ge=1)
    queued: int = free(64, "requests of a recommending process that wait for one; more get 503 and Retry-After", ge=0)
    stall_s: float = free(
        600.0, "seconds after which a batch that has not ended counts as hung, and its process is replaced", gt=0
    )
    engine: EngineConfig = shaping(
        lambda: EngineConfig(lm=OF_RELEASE, threads=1), "what generates; lm `release` is that of the release"
    )
    explanation: Decoding = shaping(lambda: Decoding(max_new_tokens=150), "decoding of explanations, as of `explain`")
    checks: AnswerChecks = shaping(AnswerChecks, "when an explanation is none")
    reading: ReadingOptions = shaping(ReadingOptions, "of titles from a recommender's states")
    summaries: SummariesConfig = shaping(SummariesConfig, "of a given history, as of `summarize`")
    ranking: Shown = shaping("trained", "whose summaries of a user are shown to what ranks, as `rerank --summaries`")
    answer_tokens: int = shaping(96, "most tokens of an item's line that is written, as of `recommend`", ge=1)

    @property
    def at_once(self) -> int:
        """Most requests to it in flight for one HTTP request: the current batch and the next of every process."""
        return max(1, 2 * self.batching.size * self.replicas)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.ongoing < 2 * self.batching.size:
            raise ValueError(f"ongoing is {self.ongoing}, less than two batches of {self.batching.size}")
        if self.explanation.beams > 1:
            raise ValueError("explanations are told while they grow, which a search has no way to: leave beams at 1")
        return self


class ServiceConfig(ModelCache):
    """A service of one workspace. It serves the release and the night in force there, and follows when they change."""

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
    language: LanguageOptions = shaping(LanguageOptions, "what is put into words, and by how many processes")
    watch_s: float = free(
        2.0, "seconds between looks at what is in force: a new night, release or token is taken up this late", gt=0
    )
    audit: str | None = free(None, "folder for one line a request, a file a replica; unset: the replica's stderr")

    @model_validator(mode="after")
    def _two_batches_fit(self) -> Self:
        # One batch is computed while the next fills. With fewer requests at a time, batches could never be full.
        if self.replicas.ongoing < 2 * self.batching.size:
            raise ValueError(
                f"replicas.ongoing is {self.replicas.ongoing}, less than two batches of {self.batching.size}"
            )
        return self
