"""The plots of a report: training, recall by history length, recovery by position, projection losses, attributes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raypipe.pipeline.report_figures import Cell, Figure, beside_of, labels, proper
from raypipe.pipeline.report_plots import Bar, Plot, Point, Series, bars, lines
from raypipe.pipeline.report_tables import BY_LENGTH, BY_PLACE, SHARE, is_control, rows_of
from raypipe.storage.evaluations import Evaluation

_PROBES = ("probe of states", "probe of tokens", "probe of hidden states")


def plots_of(figures: Sequence[Figure]) -> list[Plot]:
    """The plots of one data set that there are numbers for."""
    return [*_by_length(figures), *_by_place(figures), *_projection(figures), *_attributes(figures)]


def _by_length(figures: Sequence[Figure]) -> list[Plot]:
    found = []
    for metric, protocol in _groups(figures, BY_LENGTH, 1):
        mine = [f for f in figures if f.protocol == protocol and (m := BY_LENGTH.match(f.metric)) and m[1] == metric]
        named = {str(BY_LENGTH.match(f.metric)[2]): f.metric for f in mine}  # type: ignore[index]
        lengths = sorted(named, key=_first_number)
        series = _series(mine, [named[one] for one in lengths])
        if len(lengths) > 1 and series:
            told = f"{protocol}. Vertical lines are 95 % intervals over users, where they are known."
            found.append(
                lines(f"{metric} by history length", told, "events before the held-out one", metric, series, lengths)
            )
    return found


def _by_place(figures: Sequence[Figure]) -> list[Plot]:
    found = []
    for _, protocol in _groups(figures, BY_PLACE, 0):
        mine = [f for f in figures if f.protocol == protocol and BY_PLACE.match(f.metric)]
        places = sorted({int(BY_PLACE.match(f.metric)[1]) for f in mine})  # type: ignore[index]
        series = _series(mine, [f"recovery by place {place}" for place in places])
        told = (
            f"{protocol}. The share of users whose answer names the event so many places from the end of their history."
        )
        found.append(
            lines(
                "Recovery by position",
                told,
                "place from the end of the history",
                "recovery",
                series,
                [*map(str, places)],
            )
        )
    return found


def _groups(figures: Iterable[Figure], pattern: re.Pattern[str], group: int) -> list[tuple[str, str]]:
    """The distinct pairs (group of the metric's name, protocol). With group 0 the first of a pair is ""."""
    found = [(m[group] if group else "", f.protocol) for f in figures if (m := pattern.match(f.metric))]
    return list(dict.fromkeys(found))


def _series(figures: Sequence[Figure], metrics: Sequence[str]) -> list[Series]:
    """A line over `metrics` for each row: models come first, each before what stands beside it."""
    found = []
    for row in rows_of(figures):
        points = [
            Point(at, cell.value, cell.half_width)
            for at, metric in enumerate(metrics)
            if (cell := row.cells.get(metric)) is not None
        ]
        name = f"{row.model}, {row.recommender}" if row.recommender else row.model
        if points:
            found.append(Series(name, points, aside=row.kind != "model"))
    return found


def _projection(figures: Sequence[Figure]) -> list[Plot]:
    """Plots of what probes read on the way from a state to words, beside the words."""
    found = []
    for metric in ("recovery", "T1 HR@5", "T1 HR@5 unseen"):
        rows = rows_of(figure for figure in figures if figure.metric == metric)
        for own in (row for row in rows if row.kind == "model"):
            cells: dict[str, Cell] = {
                row.model.removeprefix(f"{own.model}, "): row.cells[metric]
                for row in rows
                if row.model.startswith(f"{own.model}, ") and row.recommender == own.recommender
            }
            if not set(_PROBES) & set(cells):
                continue
            steps = [(probe, cells[probe]) for probe in _PROBES if probe in cells]
            steps += [("what the answers tell", own.cells[metric])]
            steps += [(name, cell) for name, cell in cells.items() if is_control(name)]
            told = "The same probe on raw states, on the tokens projected from them, and on the language model's hidden states."
            values = [Bar(name, cell.value, cell.half_width, aside=is_control(name)) for name, cell in steps]
            found.append(bars(f"What projection loses: {metric} of {own.named}", told, "read from", values))
    return found


def _attributes(figures: Sequence[Figure]) -> list[Plot]:
    """Plots of which attributes decide on what a guided recommender recommends."""
    found = []
    for row in rows_of(figure for figure in figures if SHARE.match(figure.metric)):
        cells = sorted(row.cells.items(), key=lambda pair: -pair[1].value)
        values = [Bar(SHARE.match(name)[1], cell.value, cell.half_width) for name, cell in cells]  # type: ignore[index]
        told = "The mean size of each part of the first recommendations' scores, among all parts."
        found.append(bars(f"What decides on recommendations of {row.named}", told, "part of the score", values))
    return found


def training_plots(evaluations: Sequence[Evaluation]) -> list[Plot]:
    """Plots of loss and validation of every training whose curve is stored."""
    found = []
    newest = {
        (label, beside_of(one), one.seed): one for label, one in zip(labels(evaluations), evaluations, strict=True)
    }
    drawn: set[str] = set()
    for (label, recommender, seed), one in newest.items():
        curve = one.training
        if one.hash in drawn or not curve.get("losses"):
            continue
        drawn.add(one.hash)
        named = f"{label} beside {recommender}, seed {seed}" if recommender else f"{label}, seed {seed}"
        told = f"{curve['steps']:,} steps in {curve['seconds']:,.0f} s; each point is the mean since the one before."
        points = [Point(step, loss) for step, loss in curve["losses"]]
        found.append(
            lines(f"Training loss of {named}", told, "step", "loss", [Series(proper(one.name), points)], zero=False)
        )
        if len(curve["validations"]) > 1:
            points = [Point(step, value) for step, value in curve["validations"]]
            told = "The weights kept are those of the best validation."
            series = [Series(proper(one.name), points)]
            found.append(lines(f"Validation of {named}", told, "step", "metric", series, zero=False))
    return found


def _first_number(length: str) -> tuple[int, bool]:
    numbers = re.findall(r"\d+", length)
    return (int(numbers[0]) if numbers else 0, length.startswith(">"))
