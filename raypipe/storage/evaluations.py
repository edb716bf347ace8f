"""Measurements of models: `evaluations/<model hash>/<key>.json`, one record for each model and way to measure it.

A record holds everything that a report needs, so that a report can still show a model that `vacuum` has deleted. It
names no user.
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
    """One number: its value and, where it is a mean over users, the half-width of its 95 % interval."""

    value: float
    half_width: float | None = None


@dataclass(frozen=True)
class Part:
    """How one of the models was made from which the measured model was built. The fields are as in `Evaluation`."""

    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What `job` measured of the model `name`/`hash`.

    `figures` is scorer → metric → number. The model's own figures are under its name; the floors and other scorers
    measured beside it are under theirs.
    `recommender` is the one that an adapter reads ("" for a recommender itself).
    `protocol` says in words what was asked; it is the same for all evaluations that can be compared.
    `switches` says in words how the model was trained, and `settings` says the same as values, except for the seed.
    `training` is the `TrainingResult.curve()` of the model.
    `versions` are the versions of the tables that the model was trained on.
    `parts` says how each model that `settings` name (as NAME/HASH) was made, as far as that is known.
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
        """Store a record. It replaces an older record of the same model that was `asked` the same way."""
        key = fingerprint({"job": evaluation.job, "recommender": evaluation.recommender, "asked": dict(asked)})
        path = f"{_FOLDER}/{evaluation.hash}/{key}.json"
        self.store.put(path, canonical_json({**asdict(evaluation), "created": time.time()}).encode())

    def all(self) -> list[Evaluation]:
        """Every record, the oldest first."""
        entries = [entry for entry in self.store.list(_FOLDER) if entry.path.endswith(".json")]
        found = [(*_read(self.store.read(entry.path)), entry.path) for entry in entries]
        return [evaluation for evaluation, _, _ in sorted(found, key=lambda one: one[1:])]

    def page(self, content: str) -> str:
        """The path of the page that shows users of a model."""
        return f"{_FOLDER}/{content}/{PAGE}"

    def drop_pages(self) -> None:
        """Delete every page of users; they can be drawn again."""
        self.store.delete(entry.path for entry in self.store.list(_FOLDER) if entry.path.endswith(f"/{PAGE}"))


def _read(data: bytes) -> tuple[Evaluation, float]:
    """A record and when it was written."""
    raw = json.loads(data)
    created = raw.pop("created")
    figures = {
        scorer: {metric: Measured(**number) for metric, number in mine.items()}
        for scorer, mine in raw.pop("figures").items()
    }
    # Older records have no parts.
    parts = {named: Part(**part) for named, part in raw.pop("parts", {}).items()}
    return Evaluation(figures=figures, parts=parts, **raw), created
