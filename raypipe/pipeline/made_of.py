"""How a stored model was made, for the records of `report`: by its lineage and those of the models it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raypipe.errors import UsageError
from raypipe.storage.evaluations import Part
from raypipe.storage.models import Models, find_model

# Entries of a lineage: what was joined, and by whom it was judged, which no option of the system says.
_JOINED = ("lm", "recommender", "summaries", "replay", "tuned", "judges")
_NAMED = re.compile(r"[\w.-]+/[0-9a-f]{32}")


def settings_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """All that a model was made with, as values by name.

    What was joined takes the place of an option of the same name.
    """
    joined = {name: lineage[name] for name in _JOINED if name in lineage}
    options = lineage.get("options", {})
    named = {name: value for name, value in joined.items() if value is not None}
    return {**lineage.get("config", {}), **joined, **options, **named}


def parts_of(homes: Sequence[Models], settings: Mapping[str, Any]) -> dict[str, Part]:
    """The models that `settings` name, and those that these were made of, by NAME/HASH.

    A model is left out if none of `homes` has it any more, or if its lineage does not tell what it was made with.
    """
    found: dict[str, Part] = {}
    unread = [*_named(settings)]
    while unread:
        named = unread.pop()
        lineage = {} if named in found else _lineage(homes, named)
        if lineage.get("config") and "seed" in lineage:
            found[named] = Part(int(lineage["seed"]), settings_of(lineage), lineage.get("versions", {}))
            unread += _named(found[named].settings)
    return found


def _lineage(homes: Sequence[Models], named: str) -> Mapping[str, Any]:
    for models in homes:
        try:
            return find_model(models, named).lineage
        except UsageError:  # `vacuum` removed it
            continue
    return {}


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _named(one)
    elif isinstance(value, str) and _NAMED.fullmatch(value):
        yield value
