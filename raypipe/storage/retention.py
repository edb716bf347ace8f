"""What may be deleted: nights, releases, models and runs to which nothing that is kept refers. Nothing is deleted here.

A release is kept while a kept night or an alias names it. A model is kept while a kept release or a kept model names
it. A run is kept while rows that it made are published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import get_args

from raypipe.storage.ledger import Ledger
from raypipe.storage.makers import all_makers
from raypipe.storage.models import Model, Models
from raypipe.storage.nights import Night, Nights
from raypipe.storage.releases import Alias, Release, Releases
from raypipe.storage.schemas import ITEMS

_LM = "lm"
_NAMED = re.compile(r"[\w.-]+/[0-9a-f]{32}")
_CONTENT = re.compile(r"\b[0-9a-f]{64}\b")


def nights_to_keep(nights: Nights, newest: int) -> list[Night]:
    """The `newest` nights, and the night in force."""
    dates = nights.dates()
    current = nights.current()
    kept = {*dates[-newest:], *([current.date] if current is not None else [])}
    return [night for date in dates if date in kept and (night := nights.get(date)) is not None]


def versions_to_keep(nights: Iterable[Night], releases: Iterable[Release], table: str) -> set[int]:
    """The versions of a table that nights read.

    For the items table, also the versions that releases are served with.
    """
    of_nights = {int(night.tables[table]) for night in nights if table in night.tables}
    return of_nights | ({release.catalogue for release in releases} if table == ITEMS.name else set())


def releases_to_keep(releases: Releases, nights: Iterable[Night], newest: int) -> set[str]:
    """The hashes of the newest releases, of releases with an alias, and of releases that nights were computed with."""
    found = set(releases.hashes()[-newest:])
    found |= {str(night.release["release"]) for night in nights if "release" in night.release}
    for alias in get_args(Alias):
        if (release := releases.named(alias)) is not None:
            found.add(release.hash)
    return found


def models_to_drop(
    models: Models, releases: Iterable[Release], newest: int, lm_content: Callable[[Model], str]
) -> list[Model]:
    """The models that are not among the newest of their name and that no release and no kept model names.

    `lm_content` returns the checkpoint hash of a stored language model. Some adapters name their language model by this
    hash only.
    """
    known = {f"{model.name}/{model.hash}": model for name in models.names() for model in models.all(name)}

    @cache
    def by_content() -> dict[str, str]:
        return {lm_content(model): named for named, model in known.items() if model.name == _LM}

    def mentioned(text: str) -> set[str]:
        found = set(_NAMED.findall(text)) & known.keys()
        if any(known[named].name == _LM for named in found) or not (contents := _CONTENT.findall(text)):
            return found
        return found | {named for content in contents if (named := by_content().get(content)) is not None}

    kept: set[str] = set()
    for name in models.names():
        kept |= {f"{model.name}/{model.hash}" for model in models.all(name)[-newest:]}
    for release in releases:
        kept.add(release.recommender)
        kept |= {f"{name}/{content}" for name, content in release.adapters.items()}
        kept |= {named for named, model in known.items() if model.hash == release.lm}
    left = [named for named in kept if named in known]
    while left:
        fresh = mentioned(models.mentions(known[left.pop()])) - kept
        left += fresh
        kept |= fresh
    return [model for named, model in known.items() if named not in kept]


def runs_to_drop(ledger: Ledger, newest: int) -> list[tuple[int, str]]:
    """The numbers and keys of finished runs that are older than the `newest` ones.

    Those that made what is published are left out: only they tell by which model it was made.
    """
    numbers = sorted(ledger.numbers().items())
    kept = {key for _, key in numbers[-newest:]} | {run.run_key for run in all_makers(ledger)}
    return [(number, key) for number, key in numbers[:-newest] if key not in kept and _is_over(ledger, key)]


def _is_over(ledger: Ledger, run_key: str) -> bool:
    run = ledger.run(run_key)
    return run.result() is not None or not ledger.store.exists(f"{run.folder}/manifest.json")
