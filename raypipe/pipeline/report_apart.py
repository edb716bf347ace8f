"""What tells models of one name apart in a report: everything that they were made with, except the seeds of trainings.

A model that others were made of is known by its settings, and not by the hash of its content, which differs by seed.
Models become seeds of one row only if nothing else is known to differ. If one seed would stand for two models that were
made of models of different seeds, those seeds tell them apart, and so does what they were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raypipe.storage.evaluations import Evaluation, Part
from raypipe.storage.fingerprint import fingerprint

_SHOWN_SETTINGS = 4
_HASH = re.compile(r"\b[0-9a-f]{32}([0-9a-f]{32})?\b")
_SEED = "trainer.seed"


@dataclass(frozen=True)
class Made:
    """How a model was made: `settings` are values by dotted names.

    Models of equal `rows`, which holds the name, may stand beside each other in a table. `of` has the names of the
    settings that are models. `seeds` are the seeds of these models, by setting. `data` is what they were trained on, by
    setting, and by "" what the model itself was trained on.
    """

    rows: Hashable
    seed: int
    settings: Mapping[str, str]
    of: frozenset[str] = frozenset()
    seeds: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by(
        cls,
        rows: Hashable,
        seed: int,
        settings: Mapping[str, Any],
        versions: Mapping[str, int],
        parts: Mapping[str, Part],
    ) -> Made:
        """A model of these settings. A setting that names one of `parts` is told by that part's name and settings."""
        told: dict[str, str] = {}
        seeds: dict[str, str] = {}
        data = {"": str(versions["histories"])} if "histories" in versions else {}
        unread = [("", settings)]
        while unread:
            prefix, values = unread.pop()
            for name, value in _flat(values, prefix).items():
                part = parts.get(value)
                told[name] = value if part is None else value.partition("/")[0]
                if part is not None:
                    seeds[name] = str(part.seed)
                    if "histories" in part.versions:
                        data[name] = str(part.versions["histories"])
                    unread.append((f"{name}.", part.settings))
        return cls(rows, seed, told, frozenset(seeds), seeds, data)


def parts_told_by(evaluations: Sequence[Evaluation]) -> dict[str, Part]:
    """What is known of models that others may be made of, by NAME/HASH.

    It comes from their own records, and from those of the models that were made of them.
    """
    found = {
        f"{one.name}/{one.hash}": Part(one.seed, one.settings, one.versions)
        for one in evaluations
        # The settings in records of other systems may also say how they were asked.
        if one.settings and (one.job == "evaluate" or one.name == "guided")
    }
    for one in evaluations:
        found |= one.parts
    return found


def told_apart(made: Sequence[Made]) -> list[str]:
    """What tells each model from the others of its `rows`, given oldest first; "" if nothing but the seed does."""
    settings = [dict(one.settings) for one in made]
    for members in _alike(made, settings):
        by_seed: dict[int, list[Made]] = {}
        for at in members:
            by_seed.setdefault(made[at].seed, []).append(made[at])
        clash = {name for mine in by_seed.values() for name in _differing([one.seeds for one in mine])}
        for at in members:
            settings[at] |= {f"{name}.{_SEED}": seed for name, seed in made[at].seeds.items() if name in clash}
    for members in _alike(made, settings):
        newest = {made[at].seed: made[at].data for at in members}
        clash = _differing(list(newest.values()))
        for at in members:
            told = {name: version for name, version in made[at].data.items() if name in clash}
            settings[at] |= {f"{name}.histories".lstrip("."): version for name, version in told.items()}
    return [_told(at, made, settings) for at in range(len(made))]


def _alike(made: Sequence[Made], settings: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Groups of models, by place, that have the same settings and may stand in one row."""
    found: dict[Hashable, list[int]] = {}
    for at, (one, mine) in enumerate(zip(made, settings, strict=True)):
        found.setdefault((one.rows, frozenset(mine.items())), []).append(at)
    return list(found.values())


def _differing(several: Sequence[Mapping[str, str]]) -> set[str]:
    """The names whose values are not the same in all."""
    names = {name for one in several for name in one}
    return {name for name in names if len({one.get(name) for one in several}) > 1}


def _told(at: int, made: Sequence[Made], settings: Sequence[Mapping[str, str]]) -> str:
    mine = settings[at]
    beside = [other for other, one in enumerate(made) if one.rows == made[at].rows]
    others = [settings[other] for other in beside]
    models = {name for other in beside for name in made[other].of}
    names = sorted({name for theirs in others for name in theirs})
    apart = [name for name in names if _tells(name, others, models)]
    differences = _differences(mine, apart)
    if any(theirs != mine and _differences(theirs, apart) == differences for theirs in others):
        # Labels that are cut short may read alike, and rows that read alike would take each other's place.
        differences = f"{differences}; settings {fingerprint(mine)[:8]}"
    return differences


def _tells(name: str, several: Sequence[Mapping[str, str]], models: set[str]) -> bool:
    """Whether the values of a setting differ.

    The setting of a model that others were made of counts only if it differs among those made of models of the same
    name.
    """
    model = max((one for one in models if name.startswith(f"{one}.")), key=len, default=None)
    found: dict[str | None, set[str | None]] = {}
    for one in several:
        found.setdefault(None if model is None else one.get(model), set()).add(one.get(name))
    return any(len(values) > 1 for values in found.values())


def _differences(settings: Mapping[str, str], names: Sequence[str]) -> str:
    told = [f"{name} {shortened(settings[name])}".lstrip() for name in names if name in settings]
    more = f" and {len(told) - _SHOWN_SETTINGS} more" if len(told) > _SHOWN_SETTINGS else ""
    return "; ".join(told[:_SHOWN_SETTINGS]) + more


def _flat(settings: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Values by dotted names, with `prefix` before each, without the seed of the training."""
    found: dict[str, str] = {}
    unread = [("", settings)]
    while unread:
        within, values = unread.pop()
        for name, value in values.items():
            if isinstance(value, Mapping):
                unread.append((f"{within}{name}.", value))
            elif within + name != _SEED:
                found[prefix + within + name] = json.dumps(value, ensure_ascii=False).strip('"')
    return found


def shortened(value: str) -> str:
    value = _HASH.sub(lambda found: found[0][:8], value).replace(",", " ")
    return value if len(value) <= 40 else f"{value[:39]}…"
