"""A workspace: one URI, one format version, and everything below it.

workspace.json      format version, time or order kind, number of user buckets; fixed at the first ingest
tables/<name>       Delta tables (storage/schemas.py)
ledger/, locks/, staging/, models/, nights/
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json
from raypipe.storage.ledger import Ledger, Run
from raypipe.storage.schemas import TABLES
from raypipe.storage.store import Store
from raypipe.storage.tables import Table

FORMAT = 1
USERS_PER_BUCKET = 5_000
MIN_BUCKETS = 4
_INFO = "workspace.json"


@dataclass(frozen=True)
class WorkspaceInfo:
    """The workspace's format, its kind ("time" or "order") and its number of user buckets (a power of two).

    The kind never changes.
    """

    format: int
    kind: str
    buckets: int


class Workspace:
    """The tables, runs, models and nights under one URI. Nothing is created by opening it."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return Workspace, (self.store.uri,)

    @property
    def uri(self) -> str:
        return self.store.uri

    @cached_property
    def tables(self) -> dict[str, Table]:
        return {name: Table(self.store, spec) for name, spec in TABLES.items()}

    def ledger(self, job: str) -> Ledger:
        return Ledger(self.store, job)

    def info(self) -> WorkspaceInfo | None:
        """What was decided at the first ingest, or None before it. Raises UsageError for another format version."""
        if (raw := _read_info(self.store)) is None:
            return None
        if (found := int(raw["format"])) != FORMAT:
            raise UsageError(
                f"The workspace {self.uri} has format version {found}; this raypipe reads and writes version {FORMAT}.",
                f"Use the raypipe release of format {found}, or a new workspace, and ingest the logs again.",
            )
        return WorkspaceInfo(**raw)

    def require_info(self) -> WorkspaceInfo:
        """`info()`. Raises UsageError if nothing was ingested yet."""
        info = self.info()
        if info is None:
            raise UsageError(
                f"The workspace {self.uri} is empty.",
                "Run `raypipe ingest --workspace … --log.path … --catalogue.path …` first, or check the workspace's name.",
            )
        return info

    def decide(self, kind: str, buckets: int) -> WorkspaceInfo:
        """Fix the kind and the number of buckets at the first ingest.

        Later calls change nothing and return the first decision.
        """
        info = WorkspaceInfo(FORMAT, kind, buckets)
        self.store.create(_INFO, canonical_json(asdict(info)).encode())
        return self.require_info()

    def record_buckets(self, buckets: int) -> None:
        """Record that every table is split into this number of buckets from now on."""
        info = replace(self.require_info(), buckets=buckets)
        self.store.put(_INFO, canonical_json(asdict(info)).encode())

    def open_runs(self) -> list[Run]:
        """The runs of every job that began and have not ended; each job's runs are in the order of their numbers."""
        found = []
        for job in self.store.folders("ledger"):
            ledger = self.ledger(job)
            runs = [ledger.run(key) for _, key in sorted(ledger.numbers().items())]
            found += [run for run in runs if self.store.exists(f"{run.folder}/manifest.json") and run.result() is None]
        return found

    def training_locks(self) -> list[str]:
        """The names of the locks that trainings in this workspace have taken or may take."""
        taken = {
            entry.path.removeprefix("locks/").split("/")[0].removesuffix(".lock") for entry in self.store.list("locks")
        }
        stored = {f"models-{name}" for name in self.store.folders("models")}
        return sorted({name for name in taken if name.startswith("models-")} | stored)

    def check_kind(self, kind: str) -> None:
        """Raise UsageError if a log of `kind` cannot go into this workspace."""
        info = self.info()
        if info is not None and info.kind != kind:
            raise UsageError(
                f"The workspace {self.uri} holds {info.kind} logs, and this is a log of {kind} kind.",
                "Times and per-user order cannot be compared: use a workspace of its own for this log, or map the column "
                f"of the other kind (columns.{info.kind}).",
            )


def _read_info(store: Store) -> dict[str, Any] | None:
    data = store.get(_INFO)
    if data is None:
        return None
    try:
        raw = dict(json.loads(data))
        int(raw["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{store.uri}/{_INFO} is not a workspace description.",
            "Name another workspace, or restore the file from a backup.",
        ) from error
    return raw


def choose_buckets(users: int) -> int:
    """The number of buckets for so many users.

    It is a power of two and at least 4, with at most 5,000 users a bucket on average.
    """
    buckets = MIN_BUCKETS
    while buckets * USERS_PER_BUCKET < users:
        buckets *= 2
    return buckets
