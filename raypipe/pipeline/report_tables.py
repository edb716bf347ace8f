"""Figures in tables: one table for each kind of metric and each protocol.

Floors come first, then models, each with what stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from raypipe.metrics.published import CHANCE, PUBLISHED_BY, SYSTEMS, chance_among, published_on
from raypipe.pipeline.report_figures import FLOORS, Cell, Figure

Kind = Literal["floor", "model", "beside", "published"]
_PLACES: dict[Kind, int] = {"floor": 0, "model": 1, "beside": 1, "published": 2}
_CONTROLS = re.compile(
    r"\b(shuffled|random|reduced|zero-shot|again\b|base\b(?! LM)|constant|another user's|most frequent"
    r"|no (states|users|summary|summaries|prompt|knowledge|reasoning))"
)
_SURROGATES = re.compile(r"\b(surrogate|student)$")
_CEILINGS = ("exact count",)
_PUBLISHED_PROTOCOL = "whole catalogue, seen items filtered"
_CANDIDATES = re.compile(r"\b(\d+) candidates\b")
_NOT_BETTER_WHEN_HIGHER = re.compile(r"untouched|users$")


@dataclass(frozen=True)
class Section:
    """A kind of metrics: those whose names match `metrics`. `judged` says that a higher value is a better model."""

    title: str
    told: str
    metrics: re.Pattern[str]
    judged: bool = True


SECTIONS = (
    Section(
        "Ranking",
        "The held-out item among all candidates; of one relevant item HR and Recall are the same.",
        re.compile(r"(HR|Recall|NDCG|MRR)@\d+$|relative NDCG"),
    ),
    Section(
        "Compared user by user",
        "By how much a model ranks the same candidates of the same users higher than another: low and high are the ends of the 95 % "
        "interval of a paired bootstrap.",
        re.compile(r"above "),
        judged=False,
    ),
    Section(
        "States in words",
        "Recovery: the share of the last titles that an answer names from a state. Residual: the title between two states. Valid: "
        "the share of what is named that the catalogue has. A probe reads vectors without words: of states it bounds what words "
        "can tell, of tokens and hidden states it tells what is lost on the way.",
        re.compile(r"(recovery|residual|oracle|order|valid|rouge_l)\b"),
    ),
    Section(
        "Agreement with the recommender",
        "T1 the recommender's next item, T2 its order of five candidates, T3 whether it would recommend an item, T6 the history "
        "behind a user's vector.",
        re.compile(r"T[1-6]\b"),
    ),
    Section(
        "Summaries",
        "By the catalogue's attribute values: which of those named are in the history, how much of it they are, and what changed.",
        re.compile(r"attribute_(precision|coverage)|untouched_share|shift_precision|stability|distinctness|users$"),
    ),
    Section(
        "Judged",
        "Means are of ratings from 0 to 3; agreement is Cohen's kappa with quadratic weights; coherence is the squared error with "
        "which the recommender's score is read from the words, beside that of its mean.",
        re.compile(r".*\.(mean|rated|share_\d)$|agreement\.|coherence\.|distinction\."),
        judged=False,
    ),
    Section(
        "Grounding",
        "Of answers that are matched to the catalogue: the share among the first that are one of its lines to the letter, the share "
        "that had to be guessed, and by how much the nearest line is nearer than the next then.",
        re.compile(r"grounding"),
        judged=False,
    ),
    Section(
        "Beyond accuracy",
        "Of lists of ten: the share of the catalogue that is in some list, bits of self-information, mean cosine distance within a "
        "list. Collapse: how much of the item vectors is one direction. Cold items have fewer than 5 training events, cold users "
        "short histories.",
        re.compile(r"coverage@|novelty@|diversity@|collapse$|.*(cold (users|items)|unseen users)$"),
        judged=False,
    ),
    Section(
        "Cost",
        "Of training and of asking; seconds are wall clock.",
        re.compile(r"(.*_)?(seconds|tokens|steps|examples|calls|weights)\b|(.*_)?tokens_|summary_users|latency"),
        judged=False,
    ),
)
BY_LENGTH = re.compile(r"((?:HR|Recall|NDCG|MRR)@\d+) (?:length|after) (.+?)(?: events)?$")
BY_PLACE = re.compile(r"recovery by place (\d+)$")
SHARE = re.compile(r"attribute share: (.+)$")
_DRAWN = (BY_LENGTH, BY_PLACE, SHARE)
_REST = Section("Other figures", "What fits nowhere else.", re.compile(""), judged=False)


@dataclass(frozen=True)
class Row:
    """One model beside one recommender. `note` says how it was trained, or who published it."""

    model: str
    recommender: str
    kind: Kind
    cells: dict[str, Cell]
    note: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for cell in self.cells.values() for seed in cell.seeds}))

    @property
    def named(self) -> str:
        return f"{self.model} beside {self.recommender}" if self.recommender else self.model


@dataclass(frozen=True)
class ReportTable:
    """The rows of one protocol. `best` is the best value of a model, by metric."""

    section: Section
    protocol: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    best: dict[str, float] = field(default_factory=dict)

    @property
    def recommenders(self) -> bool:
        return any(row.recommender for row in self.rows)


def tables_of(dataset: str, figures: Sequence[Figure]) -> list[ReportTable]:
    """Every figure of a data set, except those that plots show alone, in tables by kind of metric and protocol."""
    found: dict[tuple[int, str], list[Figure]] = {}
    for figure in figures:
        if any(pattern.match(figure.metric) for pattern in _DRAWN):
            continue
        found.setdefault((_section(figure.metric), figure.protocol), []).append(figure)
    order = sorted(found, key=lambda key: key[0])
    return [
        _table(dataset, (*SECTIONS, _REST)[section], protocol, found[section, protocol]) for section, protocol in order
    ]


def _section(metric: str) -> int:
    return next((at for at, section in enumerate(SECTIONS) if section.metrics.match(metric)), len(SECTIONS))


def _table(dataset: str, section: Section, protocol: str, figures: Sequence[Figure]) -> ReportTable:
    if any(figure.metric.startswith("Recall@") for figure in figures):
        figures = [replace(figure, metric=_as_recall(figure.metric)) for figure in figures]
    rows = rows_of(figures)
    metrics = sorted({figure.metric for figure in figures}, key=_metric_order)
    if section.judged:
        rows += _known(dataset, metrics, rows, protocol)
    rows.sort(key=lambda row: _PLACES[row.kind])
    best = {
        metric: max(values)
        for metric in metrics
        if section.judged and not _NOT_BETTER_WHEN_HIGHER.search(metric)
        if (values := [row.cells[metric].value for row in rows if row.kind == "model" and metric in row.cells])
    }
    return ReportTable(section, protocol, tuple(metrics), tuple(rows), best)


def _as_recall(metric: str) -> str:
    """The metric with HR called Recall: with one relevant item they are the same, so that one column compares all."""
    return re.sub(r"^HR@", "Recall@", metric)


def rows_of(figures: Iterable[Figure]) -> list[Row]:
    """Rows in the order of models' first figures, each model followed by what stands beside it.

    A figure that is there twice for one seed, as floors are beside several systems, counts once.
    """
    by_row: dict[tuple[str, str], dict[str, dict[int, Figure]]] = {}
    for figure in figures:
        by_row.setdefault(figure.row, {}).setdefault(figure.metric, {}).setdefault(figure.seed, figure)
    rows = []
    for (model, recommender), by_metric in by_row.items():
        first = next(iter(next(iter(by_metric.values())).values()))
        cells = {metric: Cell.of([*mine.values()]) for metric, mine in by_metric.items()}
        rows.append(Row(model, recommender, kind_of(model), cells, first.how))
    families = list(dict.fromkeys(_family(row) for row in rows))
    return sorted(rows, key=lambda row: (families.index(_family(row)), row.kind == "beside"))


def kind_of(model: str) -> Kind:
    if model.lower() in FLOORS:
        return "floor"
    if model in _CEILINGS:
        return "beside"
    return "beside" if ", " in _bare(model) or is_control(model) else "model"


def is_control(model: str) -> bool:
    """Whether this is a control: a model that really holds what it says it holds has to be better."""
    return _CONTROLS.search(_bare(model)) is not None


def own_name(model: str) -> str:
    """The name of the model that something stands beside."""
    return _CONTROLS.split(_bare(model).split(", ")[0])[0].strip()


def _bare(model: str) -> str:
    """The name without the settings in brackets."""
    return re.sub(r" \(.*?\)", "", model)


def _family(row: Row) -> tuple[str, str]:
    return _bare(row.model).split(", ")[0].split(" ")[0], row.recommender


def _known(dataset: str, metrics: Sequence[str], rows: Sequence[Row], protocol: str) -> list[Row]:
    """Rows of what others published of these models on this data by this protocol, and of what chance gives."""
    found = []
    drawn = _CANDIDATES.search(protocol)
    worth = {**CHANCE, **(chance_among(int(drawn[1])) if drawn else {})}
    chance = {metric: Cell(worth[metric], None, None, ()) for metric in metrics if metric in worth}
    if chance:
        found.append(Row("chance", "", "floor", chance))
    if _PUBLISHED_PROTOCOL not in protocol:
        return found
    names = dict.fromkeys(_bare(row.model).split(" ")[0] for row in rows if row.kind == "model")
    for name in names:
        figures = published_on(dataset, name.lower())
        values = figures.values if figures else {}
        cells = {
            metric if metric in metrics else _as_recall(metric): Cell(value, None, None, ())
            for metric, value in values.items()
        }
        if figures and not cells.keys().isdisjoint(metrics):
            found.append(Row(f"{name}, published", "", "published", cells, f"{figures.source}: {figures.training}"))
    return found


def published_systems(figures: Iterable[Figure]) -> list[ReportTable]:
    """Tables of what the papers of the reported systems say, on their own data."""
    ours = {_bare(figure.model).split(",")[0].split("-")[0].split(" ")[0] for figure in figures}
    found: dict[str, list[Row]] = {}
    for (system, dataset), known in SYSTEMS.items():
        if system.split("-")[0].split(" ")[0] in ours:
            cells = {metric: Cell(value, None, None, ()) for metric, value in known.values.items()}
            found.setdefault(known.source, []).append(
                Row(f"{system} on {dataset}", "", "published", cells, known.training)
            )
    return [
        ReportTable(
            Section("", "", re.compile("")),
            source,
            tuple(dict.fromkeys(metric for row in rows for metric in row.cells)),
            tuple(rows),
        )
        for source, rows in found.items()
    ]


def _metric_order(metric: str) -> tuple[int, int, str]:
    """The sort key of a metric: NDCG@10 after NDCG@5, and at one cut-off HR before NDCG before MRR."""
    name, at, cutoff = metric.partition("@")
    if at and cutoff.isdigit():
        place = ("HR", "Recall", "NDCG", "MRR").index(name) if name in ("HR", "Recall", "NDCG", "MRR") else 9
        return int(cutoff), place, metric
    return 10_000, 0, metric


def findings(tables: Iterable[ReportTable]) -> list[str]:
    """What should be read first, as sentences.

    They tell the best model beside its floor and what is published, models that are below a floor, and ablations,
    controls and surrogates that are as good as what they stand beside.
    """
    found = []
    for table in tables:
        if not table.section.judged:
            continue
        metrics = _headlines(table)
        for metric in metrics:
            found += _best(table, metric)
        found += _not_better(table, metrics)
    return list(dict.fromkeys(found))


def _headlines(table: ReportTable) -> list[str]:
    """The metrics that a system's paper reports, those of unseen titles included.

    If a model has none of these, the first of the usual metrics is added.
    """
    models = [row for row in table.rows if row.kind == "model"]
    published = {metric for row in models for metric in _published_by(row)}
    found = [metric for metric in table.metrics if metric.removesuffix(" unseen") in published]
    if found and all(any(metric in row.cells for metric in found) for row in models):
        return found
    wanted = ("NDCG@10", "NDCG@5", "MRR@3", "recovery", "T1 HR@5 unseen", "T1 HR@5", "attribute_precision")
    usual = [metric for metric in wanted if metric in table.metrics][:1]
    return [*found, *(metric for metric in usual if metric not in found)]


def _published_by(row: Row) -> tuple[str, ...]:
    name = _bare(row.model)
    return next((metrics for system, metrics in PUBLISHED_BY.items() if re.match(rf"{system}(?!\w)", name)), ())


def _best(table: ReportTable, metric: str) -> list[str]:
    models = [row for row in table.rows if row.kind == "model" and metric in row.cells]
    if not models:
        return []
    best = max(models, key=lambda row: row.cells[metric].value)
    value = best.cells[metric].value
    told = f"{metric}: {best.named} {'is best with' if len(models) > 1 else 'has'} {value:.4f}"
    floors = [row for row in table.rows if row.kind == "floor" and metric in row.cells]
    if floors:
        floor = max(floors, key=lambda row: row.cells[metric].value)
        told += f"; the best floor, {floor.model}, has {floor.cells[metric].value:.4f}"
    known = [row for row in table.rows if row.kind == "published" and metric in row.cells]
    if known:
        most = max(known, key=lambda row: row.cells[metric].value)
        told += f"; the best published is {most.cells[metric].value:.4f} ({most.model.removesuffix(', published')})"
    return [told + "."]


def _not_better(table: ReportTable, metrics: Sequence[str]) -> list[str]:
    """Sentences on rows that are not better than what they should beat, with all of the metrics by which it is so."""
    floors = [row for row in table.rows if row.kind == "floor"]
    found = []
    for row in table.rows:
        if row.kind == "model" and floors:
            floor = max(floors, key=lambda one: len(_as_good(one, row, metrics)))
            if above := _as_good(floor, row, metrics):
                found.append(f"{row.named} does not reach {floor.model}: {_against(row, floor, above)}.")
        role = "control" if is_control(row.model) else "surrogate" if _SURROGATES.search(_bare(row.model)) else ""
        if row.kind == "beside" and role:
            owners = [
                one
                for one in table.rows
                if one.kind == "model"
                and one.recommender == row.recommender
                and _bare(one.model) == own_name(row.model)
            ]
            found += [
                f"The {role} {row.named} is as good as {one.named}: {_against(row, one, reached)}."
                for one in owners
                if (reached := _as_good(row, one, metrics))
            ]
    return found


def _as_good(row: Row, other: Row, metrics: Sequence[str]) -> list[str]:
    """The metrics that both rows have and by which `row` is not below `other`."""
    both = [metric for metric in metrics if metric in row.cells and metric in other.cells]
    return [metric for metric in both if row.cells[metric].value >= other.cells[metric].value]


def _against(row: Row, other: Row, metrics: Sequence[str]) -> str:
    pairs = ((metric, row.cells[metric].value, other.cells[metric].value) for metric in metrics)
    return ", ".join(f"{metric} {value:.4f} against {others:.4f}" for metric, value, others in pairs)
