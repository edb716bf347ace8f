"""Plots as inline SVG. Text stays text, colours come from the page, and every plot has its numbers in a table."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

COLOURS = 8
"""Series that have a colour, a dash and a marker of their own; more are left to the table."""
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 210, 12, 46
_LABEL_GAP = 15
_BAR, _BAR_GAP, _BAR_LEFT, _BAR_RIGHT = 18, 8, 270, 70
_LETTERS_OF_A_LABEL = 22
_TICKS = 5


@dataclass(frozen=True)
class Point:
    """One value. `x` is a number, or the place of a category; `half_width` is that of the value's interval."""

    x: float
    y: float
    half_width: float | None = None


@dataclass(frozen=True)
class Series:
    """The line of one model. With `aside` it is drawn in grey: a control, or what is there for orientation."""

    name: str
    points: Sequence[Point]
    aside: bool = False


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    half_width: float | None = None
    aside: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawing, its title, what it tells, and its numbers: column names and rows."""

    title: str
    told: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def lines(
    title: str,
    told: str,
    x: str,
    y: str,
    series: Sequence[Series],
    categories: Sequence[str] = (),
    *,
    zero: bool = True,
) -> Plot:
    """Draw lines over numbers, or over `categories`. `x` and `y` are the names of the axes.

    The axis of `y` includes zero unless `zero` is False.
    """
    shown = sorted(series, key=lambda one: one.aside)[:COLOURS]
    points = [point for one in shown for point in one.points]
    lows = [point.y - (point.half_width or 0) for point in points]
    highs = [point.y + (point.half_width or 0) for point in points]
    y_ticks = ticks(min(0.0, *lows) if zero else min(lows), max(highs))
    if categories:
        x_ticks, x_low, x_high = [float(at) for at in range(len(categories))], -0.3, len(categories) - 0.7
    else:
        x_ticks = ticks(min(p.x for p in points), max(p.x for p in points))
        x_low, x_high = x_ticks[0], x_ticks[-1]

    def across(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, down(tick) + 4, _number(tick), "end"))
    for at, tick in enumerate(x_ticks):
        parts.append(
            _text(across(tick), _HEIGHT - _BOTTOM + 18, categories[at] if categories else _number(tick), "middle")
        )
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x, "middle", "axis"))
    ends = _apart([down(one.points[-1].y) for one in shown])
    for at, (one, end) in enumerate(zip(shown, ends, strict=True)):
        parts.append(_line(one, at, across, down))
        parts.append(_text(_WIDTH - _RIGHT + 12, end + 4, _cut(one.name), "start", "aside" if one.aside else f"s{at}"))
    rows = []
    for place in sorted({point.x for one in series for point in one.points}):
        values = [next((point for point in one.points if point.x == place), None) for one in series]
        rows.append((categories[int(place)] if categories else _number(place), *map(_told, values)))
    return Plot(
        title, told, _svg(title, told, parts, _HEIGHT), (x, *(one.name for one in series)), tuple(map(tuple, rows))
    )


def bars(title: str, told: str, what: str, values: Sequence[Bar]) -> Plot:
    """Draw bars to the right from zero, in the order given. `what` heads the column of their names."""
    most = ticks(0.0, max((bar.value + (bar.half_width or 0) for bar in values), default=1.0))[-1]
    width = _WIDTH - _BAR_LEFT - _BAR_RIGHT
    parts = []
    for at, bar in enumerate(values):
        top = _TOP + at * (_BAR + _BAR_GAP)
        length = max(0.0, bar.value) / most * width
        colour = "aside" if bar.aside else "s0"
        parts.append(_text(_BAR_LEFT - 8, top + 13, _cut(bar.name, 30), "end"))
        parts.append(f'<rect class="{colour}" x="{_BAR_LEFT}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2"/>')
        end = length
        if bar.half_width:
            left, right = ((bar.value + side * bar.half_width) / most * width for side in (-1, 1))
            middle = top + _BAR / 2
            parts.append(
                f'<line class="interval" x1="{_BAR_LEFT + left:.1f}" x2="{_BAR_LEFT + right:.1f}" y1="{middle}" y2="{middle}"/>'
            )
            end = max(end, right)
        parts.append(_text(_BAR_LEFT + end + 6, top + 13, f"{bar.value:.3f}", "start"))
    height = _TOP + len(values) * (_BAR + _BAR_GAP)
    rows = tuple((bar.name, _told(Point(0, bar.value, bar.half_width))) for bar in values)
    return Plot(title, told, _svg(title, told, parts, height), (what, "value"), rows)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, from at most `low` to at least `high`."""
    span = high - low if high > low else abs(high) or 1.0
    raw = span / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def _line(one: Series, at: int, across: object, down: object) -> str:
    assert callable(across)
    assert callable(down)
    colour = "aside" if one.aside else f"s{at}"
    places = [(across(point.x), down(point.y)) for point in one.points]
    path = " ".join(f"{'M' if not number else 'L'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(places))
    drawn = [f'<path class="line {colour}" d="{path}"/>']
    if len(places) <= 20:
        drawn += [_marker(x, y, at, colour) for x, y in places]
    for point, (x, _) in zip(one.points, places, strict=True):
        if point.half_width:
            low, high = down(point.y - point.half_width), down(point.y + point.half_width)
            drawn.append(f'<line class="interval {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>')
    return "".join(drawn)


def _marker(x: float, y: float, at: int, colour: str) -> str:
    shapes = (
        f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>',
        f'<rect class="{colour}" x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"/>',
        f'<path class="{colour}" d="M{x:.1f} {y - 4:.1f}l4 7h-8z"/>',
        f'<path class="{colour}" d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>',
    )
    return shapes[at % len(shapes)]


def _apart(places: Sequence[float]) -> list[float]:
    """The places of labels, moved apart so that none covers another, within the drawing."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    for before, at in pairwise(order):
        moved[at] = max(moved[at], moved[before] + _LABEL_GAP)
    over = max(0.0, max(moved, default=0.0) - (_HEIGHT - _BOTTOM))
    for at in reversed(order):
        if over:
            moved[at] = min(moved[at], _HEIGHT - _BOTTOM - _LABEL_GAP * (len(order) - 1 - order.index(at)))
    return moved


def _svg(title: str, told: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img"><title>{html.escape(title)}</title>'
        f"<desc>{html.escape(told)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _cut(name: str, letters: int = _LETTERS_OF_A_LABEL) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.4f}".rstrip("0")


def _told(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point.y:.4f}" + (f" ± {point.half_width:.4f}" if point.half_width else "")
