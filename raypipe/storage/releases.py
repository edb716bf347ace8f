"""Releases: which recommender, language model and adapters belong together, and which release is in force.

A release is content-addressed (`releases/<hash>.json`) and never changes. An alias (`releases/aliases/<alias>.json`)
points to a release; moving it is one write. Batch jobs and serving read `champion`. `candidate` is the release to be
judged. `served` is the release that the online service loaded last and found fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from raypipe.errors import UsageError
from raypipe.storage.fingerprint import canonical_json, fingerprint
from raypipe.storage.store import Store

Alias = Literal["champion", "candidate", "served"]


@dataclass(frozen=True)
class Release:
    """The models that belong together, by name and content.

    `recommender` is NAME/HASH and `lm` a hash or hub name; each is empty if there is none. `adapters` are by name, and
    `catalogue` is the version of the items.
    """

    recommender: str = ""
    lm: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    catalogue: int = 0

    @property
    def hash(self) -> str:
        return fingerprint(asdict(self))


@dataclass(frozen=True)
class Verdict:
    """What a quality gate said of a recommender. `gate` are the options of the gate.

    `refusal` is the problem and the remedy, and empty if the recommender passed. `told` says whether a night has ended
    with this refusal.
    """

    passed: bool
    metrics: Mapping[str, float]
    gate: Mapping[str, Any]
    refusal: Sequence[str] = ()
    told: bool = False


class Releases:
    """The releases of a workspace and their aliases."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, release: Release) -> Release:
        """Store a release as the newest one."""
        told = {**asdict(release), "created": time.time()}
        self.store.put(f"releases/{release.hash}.json", canonical_json(told).encode())
        return release

    def get(self, start: str) -> Release:
        """The release whose hash starts with `start`. Raises UsageError if there is none or more than one."""
        stored = self._stored()
        found = [release for name, release in stored.items() if name.startswith(start)]
        if len(found) != 1:
            known = ", ".join(name[:12] for name in stored) or "none"
            raise UsageError(f"{len(found)} releases start with {start!r}.", f"There are: {known}.")
        return found[0]

    def hashes(self) -> list[str]:
        """The hashes of all releases, oldest first."""
        return list(self._stored())

    def remove(self, name: str) -> None:
        """Delete the release of this hash."""
        self.store.delete([f"releases/{name}.json"])

    def judge(self, recommender: str, verdict: Verdict) -> None:
        """Store the gate's verdict on a recommender (NAME/HASH). It replaces an earlier verdict."""
        self.store.put(_verdict(recommender), canonical_json(asdict(verdict)).encode())

    def verdict(self, recommender: str) -> Verdict | None:
        """The last verdict on a recommender, or None if it was not judged."""
        data = self.store.get(_verdict(recommender))
        return None if data is None else Verdict(**json.loads(data))

    def tell(self, recommender: str) -> None:
        """Note that a night has ended with this recommender's refusal."""
        verdict = self.verdict(recommender)
        assert verdict is not None, f"{recommender} was never judged"
        self.judge(recommender, replace(verdict, told=True))

    def all(self) -> list[Release]:
        """All releases, oldest first."""
        return list(self._stored().values())

    def _stored(self) -> dict[str, Release]:
        """All releases by hash, oldest first."""
        found = []
        for entry in self.store.list("releases"):
            name = entry.path.removeprefix("releases/").removesuffix(".json")
            if "/" not in name:
                release, created = _read(self.store.read(entry.path))
                found.append((created, name, release))
        return {name: release for _, name, release in sorted(found, key=lambda one: one[:2])}

    def named(self, alias: Alias) -> Release | None:
        """The release that an alias points to; None if it points to none, or to one that no longer exists."""
        data = self.store.get(f"releases/aliases/{alias}.json")
        found = None if data is None else self.store.get(f"releases/{json.loads(data)['release']}.json")
        return None if found is None else _read(found)[0]

    def point(self, alias: Alias, release: Release) -> None:
        """Move an alias to `release`. Readers see the old release or the new one."""
        self.store.put(f"releases/aliases/{alias}.json", canonical_json({"release": release.hash}).encode())


def _read(data: bytes) -> tuple[Release, float]:
    """A release, and the time at which it was last added."""
    told = json.loads(data)
    created = told.pop("created")
    return Release(**told), created


def _verdict(recommender: str) -> str:
    return f"releases/verdicts/{recommender.replace('/', '-')}.json"
