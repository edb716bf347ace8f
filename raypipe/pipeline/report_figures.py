"""Figures as a report compares them: each belongs to a data set, a protocol, a model and a seed; seeds become mean and spread."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from raypipe.config import first_problem
from raypipe.errors import UsageError
from raypipe.storage.evaluations import Evaluation, Measured
from raypipe.storage.fingerprint import fingerprint

FLOORS = ("chance", "constant", "random", "popularity", "transitions")
_NAMES = {
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "bert4rec": "BERT4Rec",
    "dreamrec": "DreamRec",
    "mf": "MF",
    "recinterpreter": "RecInterpreter",
    "recexplainer": "RecExplainer",
    "trsr": "LLM-TRSR",
    "lancer": "LANCER",
    "guided": "Guided",
}
_SHOWN_SETTINGS = 4
_HASH = re.compile(r"\b[0-9a-f]{32}([0-9a-f]{32})?\b")


@dataclass(frozen=True)
class Figure:
    """One number of one seed. `model` is followed by what stands beside it after commas: "RecInterpreter, shuffled states"."""

    dataset: str
    protocol: str
    model: str
    recommender: str
    metric: str
    value: float
    seed: int
    half_width: float | None = None
    how: str = ""
    """How the model was trained, in words."""
    command: str = ""

    @property
    def row(self) -> tuple[str, str]:
        return self.model, self.recommender


@dataclass(frozen=True)
class Cell:
    """Over seeds: the mean, the standard deviation where there are several, and the mean half-width of the intervals over
    users where there are any."""

    value: float
    spread: float | None
    half_width: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, figures: Sequence[Figure]) -> Cell:
        values = [figure.value for figure in figures]
        widths = [figure.half_width for figure in figures if figure.half_width is not None]
        return cls(
            fmean(values),
            stdev(values) if len(values) > 1 else None,
            fmean(widths) if widths else None,
            tuple(sorted({figure.seed for figure in figures})),
        )


class GoldenRow(BaseModel):
    """One row of a golden table, as far as a report reads it."""

    dataset: str
    model: str
    recommender: str = ""
    metric: str
    value: float
    seed: int = 0
    protocol: str = ""
    command: str = ""


_ROWS = TypeAdapter(list[GoldenRow])


def read_golden(path: str) -> list[Figure]:
    """The figures of a golden table. Raises UsageError for a file that is none, with the first thing that is wrong."""
    try:
        rows = _ROWS.validate_python(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"The golden table {path} cannot be read: {error.strerror}.", "Check --golden.") from None
    except (ValidationError, ValueError) as error:
        told = first_problem(error) if isinstance(error, ValidationError) else f"it is no JSON ({error})"
        raise UsageError(
            f"{path} is no golden table: {told}.",
            "Name files of rows with dataset, model, metric and value, as the benchmarks write them.",
        ) from None
    return [
        Figure(
            row.dataset,
            row.protocol,
            proper(row.model),
            proper(row.recommender),
            row.metric,
            row.value,
            row.seed,
            command=row.command,
        )
        for row in rows
        if math.isfinite(row.value)
    ]


def figures_of(evaluations: Sequence[Evaluation], dataset: str) -> list[Figure]:
    """The figures of a workspace's records, given oldest first: of two with equal settings and seed the newer counts."""
    newest: dict[tuple[str, str, str, str, int], Figure] = {}
    for evaluation, label in zip(evaluations, labels(evaluations), strict=True):
        how = "; ".join(f"{name}: {value}" for name, value in evaluation.switches.items())
        for scorer, mine in evaluation.figures.items():
            first, *beside = scorer.split(", ")
            own = first == evaluation.name
            costs = _costs(evaluation) if own and not beside else {}
            for metric, number in (costs | dict(mine)).items():
                figure = Figure(
                    dataset,
                    evaluation.protocol,
                    ", ".join([label, *beside]) if own else _alone(scorer, evaluation, evaluations),
                    proper(evaluation.recommender),
                    metric,
                    number.value,
                    evaluation.seed if own else 0,  # a floor learns from what all models learn from
                    number.half_width,
                    how if own and not beside else "",
                )
                newest[(figure.protocol, *figure.row, metric, figure.seed)] = figure
    return list(newest.values())


def _alone(scorer: str, evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> str:
    """What ranks beside a model by itself; a recommender with its hash, where there are several of its name."""
    name, slash, _ = str(evaluation.settings.get("recommender")).partition("/")
    stored = {str(one.settings.get("recommender")) for one in evaluations}
    several = slash and name == scorer and len([one for one in stored if one.startswith(f"{name}/")]) > 1
    return f"{proper(scorer)} ({_short(evaluation.settings['recommender'])})" if several else proper(scorer)


def _costs(evaluation: Evaluation) -> dict[str, Measured]:
    """Of the training, where its curve is stored."""
    told = {"train_seconds": "seconds", "steps": "steps"}
    return {
        metric: Measured(float(evaluation.training[name]))
        for metric, name in told.items()
        if name in evaluation.training
    }


def labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Each model's name, and where models of one name were made in several ways what tells them apart."""
    flat = [_flat(evaluation.settings) for evaluation in evaluations]
    found = []
    for evaluation, mine in zip(evaluations, flat, strict=True):
        others = [
            theirs
            for other, theirs in zip(evaluations, flat, strict=True)
            if (other.job, other.name, other.recommender) == (evaluation.job, evaluation.name, evaluation.recommender)
        ]
        names = sorted({name for theirs in others for name in theirs})
        apart = [name for name in names if len({theirs.get(name) for theirs in others}) > 1]
        differences = _differences(mine, apart)
        if any(theirs != mine and _differences(theirs, apart) == differences for theirs in others):
            # What is cut short reads alike, and rows that read alike would take each other's place.
            differences = f"{differences}; settings {fingerprint(mine)[:8]}"
        found.append(f"{proper(evaluation.name)} ({differences})" if differences else proper(evaluation.name))
    return found


def _differences(settings: Mapping[str, str], names: Sequence[str]) -> str:
    told = [f"{name} {_short(settings[name])}" for name in names if name in settings]
    more = f" and {len(told) - _SHOWN_SETTINGS} more" if len(told) > _SHOWN_SETTINGS else ""
    return "; ".join(told[:_SHOWN_SETTINGS]) + more


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names of values, but for the seed's of the training."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix + name != "trainer.seed":
            found[prefix + name] = json.dumps(value, ensure_ascii=False).strip('"')
    return found


def _short(value: str) -> str:
    value = _HASH.sub(lambda found: found[0][:8], value).replace(",", " ")
    return value if len(value) <= 40 else f"{value[:39]}…"


def proper(name: str) -> str:
    """A model's name as its paper spells it: `recexplainer-h` is RecExplainer-H, `sasrec-sampled` SASRec sampled."""
    head, separator, rest = name.partition("-")
    if head not in _NAMES:
        first, comma, beside = name.partition(", ")
        return f"{proper(first)}, {beside}" if comma and first != name else name
    rest, comma, beside = rest.partition(", ")
    variant = f"-{rest.upper()}" if separator and len(rest) == 1 else f" {rest}" if separator else ""
    return f"{_NAMES[head]}{variant}{comma}{beside}"
