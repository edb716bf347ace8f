"""What was measured of models: `evaluations/<model hash>/<key>.json`, one record for each model and way to measure it.

A record says all that a report needs, so that it can be told of a model that vacuum took. It names no user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from raypipe.storage.fingerprint import canonical_json, fingerprint
from raypipe.storage.store import Store

_FOLDER = "evaluations"
PAGE = "attributes.html"
"""Beside the records of a model: users' histories and lists as `evaluate --cards` draws them, by number."""


@dataclass(frozen=True)
class Measured:
    """One number: its mean and, where it is one over users, the half-width of its 95 % interval."""

    value: float
    half_width: float | None = None


@dataclass(frozen=True)
class Part:
    """Of a stored model that another was made of, what an `Evaluation` tells of its own."""

    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What `job` measured of the model `name`/`hash`.

    `figures` is scorer → metric → number: the model's own under its name, those of floors and others beside it under theirs.
    `recommender` is the one that an adapter reads ("" for a recommender itself), `protocol` what was asked in words, the same
    for all that can be compared, `switches` how the model was trained, in words, `settings` the same as values, the seed apart,
    and `training` its `TrainingResult.curve()`. `versions` are those of the tables it was trained on, and `parts` has of each
    model that `settings` name, NAME/HASH, how that was made, as far as it is known.
    """

    job: str
    name: str
    hash: str
    recommender: str
    protocol: str
    seed: int
    figures: Mapping[str, Mapping[str, Measured]]
    switches: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)


class Evaluations:
    """The records of a workspace."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def put(self, evaluation: Evaluation, asked: Mapping[str, Any]) -> None:
        """Store a record in the place of an older one of the same model that was `asked` the same way."""
        key = fingerprint({"job": evaluation.job, "recommender": evaluation.recommender, "asked": dict(asked)})
        path = f"{_FOLDER}/{evaluation.hash}/{key}.json"
        self.store.put(path, canonical_json({**asdict(evaluation), "created": time.time()}).encode())

    def all(self) -> list[Evaluation]:
        """Every record, the oldest first."""
        entries = [entry for entry in self.store.list(_FOLDER) if entry.path.endswith(".json")]
        found = [(*_read(self.store.read(entry.path)), entry.path) for entry in entries]
        return [evaluation for evaluation, _, _ in sorted(found, key=lambda one: one[1:])]

    def page(self, content: str) -> str:
        """The path of a model's page of users."""
        return f"{_FOLDER}/{content}/{PAGE}"

    def drop_pages(self) -> None:
        """Deletes every page of users; it can be drawn again."""
        self.store.delete(entry.path for entry in self.store.list(_FOLDER) if entry.path.endswith(f"/{PAGE}"))


def _read(data: bytes) -> tuple[Evaluation, float]:
    """A record and when it was written."""
    raw = json.loads(data)
    created = raw.pop("created")
    figures = {
        scorer: {metric: Measured(**number) for metric, number in mine.items()}
        for scorer, mine in raw.pop("figures").items()
    }
    # Records of before this was told have none.
    parts = {named: Part(**part) for named, part in raw.pop("parts", {}).items()}
    return Evaluation(figures=figures, parts=parts, **raw), created
