"""Figures as a report compares them, with seeds reduced to mean and spread.

Each figure belongs to a data set, a protocol, a model and a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from raypipe.config import first_problem
from raypipe.errors import UsageError
from raypipe.pipeline.report_apart import Made, parts_told_by, told_apart
from raypipe.storage.evaluations import Evaluation, Measured, Part

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
_PROMPTS = {
    (True, False): "no reasoning prompt",
    (False, True): "no knowledge prompt",
    (False, False): "no prompts",
}
"""LANCER's ablations as its benchmark names them, by whether there is a knowledge prompt, and a reasoning prompt."""
_GAINED = "NDCG@10"


@dataclass(frozen=True)
class Figure:
    """One number of one seed.

    In `model`, what stands beside the model follows after a comma: "RecInterpreter, shuffled states".
    """

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
    """A figure over seeds: `value` is the mean.

    `spread` is the standard deviation, None for a single figure. `half_width` is the mean half-width of the intervals
    over users, None if there are none.
    """

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
    """The figures of a golden table.

    Raises UsageError for a file that cannot be read or is no golden table, with the first thing that is wrong.
    """
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
    """The figures of a workspace's records, which are given oldest first.

    Of two records with equal settings and seed the newer counts.
    """
    newest: dict[tuple[str, str, str, str, int], Figure] = {}
    alone = _Alone(evaluations)
    for evaluation, label in zip(evaluations, labels(evaluations), strict=True):
        how = "; ".join(f"{name}: {value}" for name, value in evaluation.switches.items())
        for scorer, mine in evaluation.figures.items():
            first, *beside = scorer.split(", ")
            own = first == evaluation.name
            itself = own and not beside
            more = _costs(evaluation) | _gain(evaluation, evaluations) if itself else {}
            if own:
                model, recommender, seed = ", ".join([label, *beside]), beside_of(evaluation), evaluation.seed
            else:
                recommender = proper(evaluation.recommender)
                model, seed = alone.of(scorer, evaluation)
            for metric, number in (more | dict(mine)).items():
                figure = Figure(
                    dataset,
                    evaluation.protocol,
                    model,
                    recommender,
                    metric,
                    number.value,
                    seed,
                    number.half_width,
                    how if itself else "",
                )
                newest[(figure.protocol, *figure.row, metric, figure.seed)] = figure
    return list(newest.values())


class _Alone:
    """Names what ranks beside models by itself: floors, and recommenders. Several recommenders may have one name."""

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self._parts = parts_told_by(evaluations)
        stored = dict.fromkeys(one.settings["recommender"] for one in evaluations if _beside(one))
        by_name: dict[str, list[str]] = {}
        for named in stored:
            by_name.setdefault(named.partition("/")[0], []).append(named)
        self._names = {named: told for mine in by_name.values() for named, told in self._named(mine)}

    def of(self, scorer: str, evaluation: Evaluation) -> tuple[str, int]:
        """A scorer's name and its seed.

        The seed is 0 for a floor, which learns from what all models learn from, and if none is known.
        """
        named = _beside(evaluation)
        if named is None or named.partition("/")[0] != scorer:
            return proper(scorer), 0
        return self._names[named], self._parts[named].seed if named in self._parts else 0

    def _named(self, stored: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Stored models of one name, each with what tells it apart.

        That is how it was made if this is known of all of them, else its hash.
        """
        names = [proper(named.partition("/")[0]) for named in stored]
        if all(named in self._parts for named in stored):
            parts = [self._parts[named] for named in stored]
            names = [name_of(name, part.settings, self._parts) for name, part in zip(names, parts, strict=True)]
            made = [
                Made.by(name, part.seed, part.settings, part.versions, self._parts)
                for name, part in zip(names, parts, strict=True)
            ]
        else:
            made = [Made("", 0, {"": named}) for named in stored]
        for named, name, told in zip(stored, names, told_apart(made), strict=True):
            yield named, _with(name, told)


def _beside(evaluation: Evaluation) -> str | None:
    """NAME/HASH of the recommender that a system stands beside, if there is one."""
    named = evaluation.settings.get("recommender")
    return named if isinstance(named, str) else None


def _costs(evaluation: Evaluation) -> dict[str, Measured]:
    """Seconds and steps of the training, if its curve is stored."""
    told = {"train_seconds": "seconds", "steps": "steps"}
    return {
        metric: Measured(float(evaluation.training[name]))
        for metric, name in told.items()
        if name in evaluation.training
    }


def _gain(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> dict[str, Measured]:
    """The relative gain of a guided recommender over the very base it started from.

    It is there only if the base is of the same seed and width, and was asked the same.
    """
    guided = _guided(evaluation.settings)
    mine = evaluation.figures.get(evaluation.name, {}).get(_GAINED)
    if guided is None or mine is None:
        return {}
    bases = [
        one.figures[one.name][_GAINED].value
        for one in evaluations
        if f"{one.name}/{one.hash}" == guided.get("base")
        and (one.job, one.protocol, one.seed) == (evaluation.job, evaluation.protocol, evaluation.seed)
        and one.settings["recommender"].get("width") == evaluation.settings["recommender"].get("width")
        if _GAINED in one.figures.get(one.name, {})
    ]
    return {f"relative {_GAINED} gain": Measured(mine.value / bases[-1] - 1)} if bases and bases[-1] else {}


def _guided(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a recommender's vectors were refined by; None for other models."""
    recommender = settings.get("recommender")
    guided = recommender.get("guided") if isinstance(recommender, Mapping) else None
    return guided if guided and (guided.get("scores") or guided.get("base")) else None


def name_of(name: str, settings: Mapping[str, Any], parts: Mapping[str, Part]) -> str:
    """The name under which a model stands in a report.

    A guided recommender stands under the system's name, with that of the control that it is. LANCER without one of its
    prompts and LLM-TRSR without summaries bear the names of these ablations.
    """
    guided = _guided(settings)
    if guided is None:
        return " ".join(filter(None, [proper(name), _ablation(name, settings)]))
    if not guided.get("scores"):
        return "Guided again"
    scores = parts.get(guided["scores"])
    as_it_is = scores is not None and scores.settings.get("tuned") is False
    block = str(guided.get("block", "scores"))
    apart = [{"none": "reduced", "scores": "zero-shot" if as_it_is else ""}.get(block, block)]
    apart += ["items trained"] if guided.get("items") == "trained" else []
    apart += [f"users {guided['users']}"] if guided.get("users") in ("frozen", "absent") else []
    return " ".join(["Guided", ", ".join(filter(None, apart))]).strip()


def _ablation(name: str, settings: Mapping[str, Any]) -> str:
    """What a system goes without, in the words of its benchmark; "" if it is whole."""
    if name == "lancer":
        return _PROMPTS.get((settings.get("knowledge", True), settings.get("reasoning", True)), "")
    return "no summary" if name == "trsr" and settings.get("summaries", "") is None else ""


def beside_of(evaluation: Evaluation) -> str:
    """The recommender that a system stands beside, or the kind of recommender that a guided one is; else ""."""
    return proper(evaluation.recommender if _guided(evaluation.settings) is None else evaluation.name)


def labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Each model's name, with what tells it apart if models of one name were made in several ways."""
    parts = parts_told_by(evaluations)
    names = [name_of(one.name, one.settings, parts) for one in evaluations]
    made = [
        Made.by((one.job, name, beside_of(one)), one.seed, one.settings, one.versions, parts)
        for one, name in zip(evaluations, names, strict=True)
    ]
    return [_with(name, told) for name, told in zip(names, told_apart(made), strict=True)]


def _with(name: str, told: str) -> str:
    return f"{name} ({told})" if told else name


def proper(name: str) -> str:
    """A model's name as its paper spells it: `recexplainer-h` is RecExplainer-H, `sasrec-sampled` SASRec sampled."""
    head, separator, rest = name.partition("-")
    if head not in _NAMES:
        first, comma, beside = name.partition(", ")
        return f"{proper(first)}, {beside}" if comma and first != name else name
    rest, comma, beside = rest.partition(", ")
    variant = f"-{rest.upper()}" if separator and len(rest) == 1 else f" {rest}" if separator else ""
    return f"{_NAMES[head]}{variant}{comma}{beside}"
