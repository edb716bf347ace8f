"""`raypipe online`: load the night in force into the online store, bucket by bucket, for requests to read.

Loading is deterministic, and an interrupted load continues where it stopped. What requests read changes when the load
is complete, at once and as a whole. The night before stays loaded, so that `raypipe night --restore DATE` goes back in
a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.config import Config, free
from raypipe.errors import UsageError
from raypipe.pipeline.extract import state_recipe
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.sampling_seeds import user_seeds
from raypipe.pipeline.user_rows import are_standing, change_keys
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import Progress, say
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import hold
from raypipe.storage.nights import Night, Nights
from raypipe.storage.online import OnlineStore, UserRecord, open_online_store, version_of
from raypipe.storage.workspace import Workspace

JOB = "online"
_SUMMARIES = "summarize-"


class OnlineOptions(Config):
    """Which store requests read users from, and how many nights stay loaded in it."""

    store: str | None = free(
        None, "redis://HOST:PORT/DB or a folder; unset: RAYPIPE_ONLINE_STORE, else below a local workspace"
    )
    keep: int = free(
        1,
        "earlier nights that stay loaded, to go back to; unless 0 also what this one was before it was published again",
        ge=0,
    )
    grace_s: float = free(
        10.0,
        "seconds until older nights are dropped, in which every replica sees the new one: more than its watch_s",
        ge=0,
    )


class OnlineConfig(OnlineOptions, JobConfig):
    """Configuration of `online`."""


def run_online(config: OnlineConfig) -> JobResult:
    """Load the night in force, then drop what is older than the nights to keep.

    Raises UsageError if no night is in force or the store may evict records, and OnlineStoreDownError if it does not
    answer.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    store = open_online_store(config.store, workspace.store)
    try:
        with hold(workspace.store, [JOB], JOB, config.lock_lease_s):
            night = _in_force(workspace)
            store.check_room()
            version = version_of(workspace, night)
            was_there = store.facts(version) is not None
            if not was_there:
                _load(store, workspace, night, version)
            old = _old_versions(store, version, night.date, config.keep)
            if old and not was_there:
                time.sleep(config.grace_s)
            for name in old:
                store.drop(name)
            facts = store.facts(version)
            assert facts is not None
            size = store.size(version)
    finally:
        store.close()
    users = facts["users"]
    metrics = {
        "night": night.date,
        "version": version,
        **{name: facts[name] for name in ("users", "states", "lists", "summaries")},
        "bytes": size,
        "bytes_per_user": round(size / users, 1) if users else None,
        "dropped": len(old),
    }
    say(f"{JOB}: the night of {night.date} is served, {users:,} users in {size / 2**20:,.1f} MiB")
    status = "nothing_to_do" if was_there and not old else "ok"
    return JobResult(JOB, status, version, metrics=metrics, cost=cost_of(Usage(), time.monotonic() - started))


def _in_force(workspace: Workspace) -> Night:
    night = Nights(workspace.store).current()
    if night is None:
        raise UsageError(
            "No night is in force, and so there is nothing to load.", "Publish one with `raypipe nightly`."
        )
    return night


def _load(store: OnlineStore, workspace: Workspace, night: Night, version: str) -> None:
    night_rows = NightRows.of(workspace, night)
    buckets = night_rows.buckets()
    done = store.begin(version, buckets)
    progress = Progress(JOB, buckets, "users")
    progress.resume(len(done))
    if done:
        say(f"{JOB}: {len(done)} of {buckets} buckets were loaded before")
    for bucket in range(buckets):
        if bucket in done:
            continue
        rows = night_rows.read(bucket)
        store.write(version, bucket, rows.users, rows.records)
        progress.step(len(rows.users))
    store.complete(version, {"night": night.date, **night_rows.counts()})


def _old_versions(store: OnlineStore, current: str, date: str, keep: int) -> list[str]:
    """The versions to drop: all but the current one, and the `keep` complete ones of other nights that were begun last.

    The current version is of the night of `date`. A version that never became complete is dropped too. Of a night that
    was published several times only the last version is kept. The last earlier version of the night of `date` is kept
    too: nobody can go back to it, but replicas serve it until they have taken up the current one, which may take long
    or be refused. With `keep` 0 it is dropped as well, for those who want it gone.
    """
    others = [version for version in store.versions() if version != current]
    newest: dict[str, str] = {}  # by night; one may have been published several times
    for version in others:
        if (facts := store.facts(version)) is not None:
            newest.pop(facts["night"], None)
            newest[facts["night"]] = version
    again = newest.pop(date, current)
    kept = {*list(newest.values())[-keep:], again} if keep else set()
    return [version for version in others if version not in kept]


def _paradigms(workspace: Workspace, night: Night) -> tuple[str, ...]:
    """The paradigm of the night's own summaries; none if they cannot be served.

    Summaries of another variant may stay in the table for ever, after somebody asked for them once. Summaries before a
    cut are of less than is known, and only for evaluations.
    """
    if "summaries" not in night.tables or "-cut" in night.summaries:
        return ()
    files = workspace.tables["summaries"].files(night.tables["summaries"], variant=night.summaries)
    return (night.summaries.removeprefix(_SUMMARIES),) if files else ()


@dataclass(frozen=True)
class BucketRows:
    """Users and their packed records, in the same order."""

    users: list[str]
    records: list[bytes]


@dataclass(frozen=True)
class NightRows:
    """A night's tables as records of users.

    `recommender` is the name of the night's recommender, `recipe` that of its states, and `paradigms` are those of its
    summaries if these are of whole histories.
    """

    workspace: Workspace
    night: Night
    recommender: str
    recipe: str
    paradigms: tuple[str, ...]

    @classmethod
    def of(cls, workspace: Workspace, night: Night) -> NightRows:
        if "histories" not in night.tables:
            raise UsageError(f"The night of {night.date} has no histories.", "Ingest a log, then run the night again.")
        recommender, _, model = str(night.release.get("recommender", "")).partition("/")
        return cls(workspace, night, recommender, state_recipe(model), _paradigms(workspace, night))

    def buckets(self) -> int:
        """How many buckets the night's users are in: a power of two.

        The workspace may have been split since. A user's bucket is the last bits of the hash. If nobody is in the upper
        half of the buckets, one bit less says the same.
        """
        files = self.workspace.tables["histories"].files(self.night.tables["histories"])
        return 1 << max((int(file.partition["bucket"]) for file in files), default=0).bit_length()

    def counts(self) -> dict[str, Any]:
        """How many users there are, and how many of them have states, lists and summaries."""
        found: dict[str, Any] = {
            "users": self._rows("histories"),
            "states": sum(self._state_count(bucket) for bucket in range(self.buckets())),
            "lists": self._rows("recommendations", variant=self._variant("recommend")),
        }
        found["summaries"] = {name: self._rows("summaries", variant=_SUMMARIES + name) for name in self.paradigms}
        return found

    def read(self, bucket: int) -> BucketRows:
        histories = self._read("histories", ["user_id", "items", "history_key"], bucket)
        assert histories is not None
        users = histories["user_id"].combine_chunks()
        seeds = user_seeds(users, histories["history_key"].combine_chunks()).tolist()
        states = self._states(bucket, histories, "state")
        lists = self._read("recommendations", ["user_id", "items", "scores"], bucket, self._variant("recommend"))
        texts = {
            name: self._read("summaries", ["user_id", "summary"], bucket, _SUMMARIES + name) for name in self.paradigms
        }
        columns = zip(
            _slices(histories, "items"),
            seeds,
            _slices(states, "state", users),
            _slices(lists, "items", users),
            _slices(lists, "scores", users),
            zip(*(_texts(rows, users) for rows in texts.values()), strict=True) if texts else [()] * len(users),
            strict=True,
        )
        records = [
            UserRecord(
                items, seed, state, listed, scores, {n: t for n, t in zip(self.paradigms, mine, strict=True) if t}
            ).pack()
            for items, seed, state, listed, scores, mine in columns
        ]
        return BucketRows(users.to_pylist(), records)

    def _states(self, bucket: int, histories: pa.Table, *columns: str) -> pa.Table | None:
        """The states that the night's recommender has of the night's histories; None if the night has no such table.

        Nights that extract something else leave an older night's rows as they are. Those would rank a user by an
        outdated history, while the service computes the state of a user who has none.
        """
        rows = self._read("hidden_states", ["user_id", "change_key", *columns], bucket, self._variant("extract"))
        if rows is None:
            return None
        keys = change_keys(histories["history_key"].combine_chunks(), self.recipe)
        return rows.filter(pa.array(are_standing(rows, histories["user_id"].combine_chunks(), keys)))

    def _state_count(self, bucket: int) -> int:
        histories = self._read("histories", ["user_id", "history_key"], bucket)
        assert histories is not None
        states = self._states(bucket, histories)
        return 0 if states is None else states.num_rows

    def _variant(self, job: str) -> str:
        return f"{job}-{self.recommender}" if self.recommender else ""

    def _rows(self, table: str, **partition: str) -> int:
        if table not in self.night.tables or partition.get("variant") == "":
            return 0
        files = self.workspace.tables[table].files(self.night.tables[table], **partition)
        return sum(file.rows for file in files)

    def _read(self, table: str, columns: list[str], bucket: int, variant: str | None = None) -> pa.Table | None:
        """A bucket of the table, as the night has it.

        None if the night has no such table, or no recommender that would have written this variant.
        """
        if table not in self.night.tables or variant == "":
            return None
        partition: dict[str, str | int] = {"bucket": bucket} | ({"variant": variant} if variant is not None else {})
        return self.workspace.tables[table].read(self.night.tables[table], columns, **partition)


def _slices(rows: pa.Table | None, column: str, users: pa.Array | None = None) -> Iterator[Any]:
    """A list column's values row by row, as views.

    With `users` they come in the order of these, with None for users without a row.
    """
    if rows is None:
        assert users is not None
        yield from [None] * len(users)
        return
    lists = rows[column].combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    ends = lists.value_lengths().to_numpy(zero_copy_only=False).cumsum().tolist()
    starts = [0, *ends][:-1]
    if users is None:
        yield from (values[start:end] for start, end in zip(starts, ends, strict=True))
        return
    for place in pc.index_in(users, value_set=rows["user_id"].combine_chunks()).to_pylist():
        yield None if place is None else values[starts[place] : ends[place]]


def _texts(rows: pa.Table | None, users: pa.Array) -> list[str | None]:
    assert rows is not None
    places = pc.index_in(users, value_set=rows["user_id"].combine_chunks())
    return rows["summary"].combine_chunks().take(places).to_pylist()
