"""A report as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raypipe.pipeline.report_plots import Plot
from raypipe.pipeline.report_tables import ReportTable, Row, findings

_INTERVALS = (
    "± is half of the 95 % interval over users, of some systems at most that; sd is the standard deviation over seeds; a figure of "
    "several seeds is their mean. Bold is the best model of a column."
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #566171; --line: #d5dae1; --band: #f4f6f9; --paper: #fff;
  --c0: #1f64a8; --c1: #b8470a; --c2: #00715a; --c3: #8d3f8a; --c4: #7a5d00; --c5: #2b7a94; --c6: #a32035; --c7: #4b5d16 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a4adba; --line: #3b434f; --band: #20262e; --paper: #161b21;
  --c0: #7db5f0; --c1: #f39a62; --c2: #4fc9a9; --c3: #dd9ada; --c4: #dcbb4f; --c5: #7fcbe3; --c6: #f28a9a; --c7: #b3cc72 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.35rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid var(--line) }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .25rem } p { max-width: 52rem; margin: .35rem 0 } small, .soft { color: var(--soft) }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none } a { color: var(--c0) }
ul.findings { max-width: 56rem; padding-left: 1.2rem }
.scroll { overflow-x: auto; margin: .5rem 0 1.25rem } .scroll:focus-visible { outline: 2px solid var(--c0) }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding: .25rem 0; max-width: 56rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; white-space: nowrap }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); white-space: normal; min-width: 4.5rem }
tbody th { font-weight: 400; white-space: normal; min-width: 13rem; max-width: 24rem } th:first-child, .word { text-align: left }
td small, th small { display: block } tr.floor, tr.published { background: var(--band) } tr.beside th { padding-left: 1.8rem }
tr.published th, tr.floor th { font-style: italic } td b { font-weight: 700 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 1rem 2rem }
figure { margin: .5rem 0; break-inside: avoid; min-width: 0 } figcaption { font-weight: 600 }
figcaption small { display: block; font-weight: 400 }
svg { width: 100%; max-width: 45rem; height: auto; display: block }
svg text { font-size: 13px; fill: var(--ink) } svg .axis { fill: var(--soft) }
.grid { stroke: var(--line) } .line { fill: none !important; stroke-width: 2 } .interval { stroke: var(--ink); stroke-width: 1.3 }
line.interval[class*=" "] { opacity: .6 }
svg text.aside { fill: var(--soft) } .aside { fill: var(--soft); stroke: var(--soft) } path.line.aside { stroke-dasharray: 4 4 }
text.aside, text[class^=s] { stroke: none !important; font-weight: 600 } rect.aside, rect.s0 { stroke: none }
SERIES
details { margin: .25rem 0 } summary { cursor: pointer; color: var(--soft) } code { font-size: .85em; overflow-wrap: anywhere }
@media print { body { margin: 0; max-width: none; font-size: 9pt } nav, summary { display: none }
  h1 { font-size: 16pt } h2 { font-size: 13pt } h3 { font-size: 11pt } h2, h3, caption { break-after: avoid }
  .scroll { overflow: visible } table, figcaption small { font-size: 7.5pt } th, td { padding: .15rem .4rem }
  tbody th { min-width: 8rem } tr { break-inside: avoid } thead { display: table-header-group }
  .plots { grid-template-columns: 1fr 1fr } @page { size: A4 landscape; margin: 12mm } }
""".replace(
    "SERIES",
    "\n".join(
        f".s{at} {{ fill: var(--c{at}); stroke: var(--c{at}) }} svg text.s{at} {{ fill: var(--c{at}) }} "
        f"path.line.s{at} {{ stroke-dasharray: {dashes} }}"
        for at, dashes in enumerate(("none", "7 3", "2 3", "9 3 2 3", "none", "7 3", "2 3", "9 3 2 3"))
    ),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><p class="soft">{told}</p></header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{parts}
</main></body></html>
"""


@dataclass(frozen=True)
class DataSet:
    """Everything a report shows of one data set. `commands` are those that made golden tables."""

    name: str
    tables: Sequence[ReportTable]
    plots: Sequence[Plot]
    training: Sequence[Plot] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """A report. `spent` has a row for each job: its name, finished runs, calls, tokens in and out, seconds."""

    title: str
    told: str
    sets: Sequence[DataSet]
    published: Sequence[ReportTable]
    spent: Sequence[tuple[str, ...]] = ()


SPENT = ("job", "finished runs", "model calls", "tokens in", "tokens out", "seconds")
_ELSEWHERE = "Published, on other data"
_SPENT = "What jobs spent"


def to_html(report: Report) -> str:
    """The report as one page, without scripts, and without fonts or pictures from anywhere else."""
    parts, contents = [], []
    for number, one in enumerate(report.sets):
        contents.append(f'<li><a href="#set-{number}">{html.escape(one.name)}</a></li>')
        parts.append(f'<section><h2 id="set-{number}">{html.escape(one.name)}</h2>')
        parts.append(_found(findings(one.tables)))
        parts.append(f'<p class="soft">{_INTERVALS}</p>')
        title = ""
        for table in one.tables:
            if table.section.title != title:
                title = table.section.title
                parts.append(f'<h3>{title}</h3><p class="soft">{html.escape(table.section.told)}</p>')
            parts.append(_table(table, table.protocol))
        for heading, plots in (("Plots", one.plots), ("Training", one.training)):
            if plots:
                parts.append(f'<h3>{heading}</h3><div class="plots">{"".join(map(_figure, plots))}</div>')
        if one.commands:
            listed = "".join(f"<li><code>{html.escape(command)}</code></li>" for command in one.commands)
            parts.append(f"<details><summary>Commands that made these figures</summary><ul>{listed}</ul></details>")
        parts.append("</section>")
    if report.published:
        contents.append(f'<li><a href="#published">{_ELSEWHERE}</a></li>')
        parts.append(
            f'<section><h2 id="published">{_ELSEWHERE}</h2>{"".join(_table(t, t.protocol) for t in report.published)}'
        )
        parts.append("</section>")
    if report.spent:
        contents.append(f'<li><a href="#spent">{_SPENT}</a></li>')
        parts.append(
            f'<section><h2 id="spent">{_SPENT}</h2>{_plain(SPENT, report.spent, "Runs in the ledger")}</section>'
        )
    return _PAGE.format(
        title=html.escape(report.title),
        style=_STYLE,
        told=html.escape(report.told),
        contents="".join(contents),
        parts="\n".join(parts),
    )


def to_markdown(report: Report) -> str:
    """The same tables, and the plots' numbers, as Markdown."""
    lines = [f"# {report.title}", "", report.told, ""]
    for one in report.sets:
        lines += [f"## {one.name}", "", *(f"- {finding}" for finding in findings(one.tables)), "", _INTERVALS, ""]
        for table in one.tables:
            lines += [
                f"### {table.section.title}: {table.protocol}".removesuffix(": "),
                "",
                *_markdown_table(table),
                "",
            ]
        for plot in (*one.plots, *one.training):
            lines += [f"### {plot.title}", "", plot.told, "", *_grid(plot.columns, plot.rows), ""]
    if report.published:
        lines += [f"## {_ELSEWHERE}", ""]
        for table in report.published:
            lines += [f"### {table.protocol}", "", *_markdown_table(table), ""]
    if report.spent:
        lines += [f"## {_SPENT}", "", *_grid(SPENT, report.spent), ""]
    return "\n".join(lines)


def number(value: float, metric: str) -> str:
    """A value as text, in the form of its metric.

    A share has four decimals, a count none, and seconds one. A gain is a percentage with its sign.
    """
    if metric.startswith("relative"):
        return f"{value:+.1%}"
    if metric.endswith("seconds"):
        return f"{value:,.1f}"
    if abs(value) >= 100 or (value == int(value) and metric.split("_")[0] in {"steps", "examples", "tokens", "calls"}):
        return f"{value:,.0f}"
    return f"{value:.4f}"


def _found(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f'<ul class="findings">{"".join(f"<li>{html.escape(one)}</li>" for one in sentences)}</ul>'


def _table(table: ReportTable, caption: str) -> str:
    head = ['<th scope="col">Model</th>']
    if table.recommenders:
        head.append('<th scope="col" class="word">Recommender</th>')
    head += [f'<th scope="col">{html.escape(metric)}</th>' for metric in table.metrics]
    seeds = any(row.seeds for row in table.rows)
    if seeds:
        head.append('<th scope="col">Seeds</th>')
    body = "".join(_row(table, row, seeds) for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{''.join(head)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(table: ReportTable, row: Row, seeds: bool) -> str:
    note = f"<small>{html.escape(row.note)}</small>" if row.note else ""
    cells = [f'<th scope="row">{html.escape(row.model)}{note}</th>']
    if table.recommenders:
        cells.append(f'<td class="word">{html.escape(row.recommender)}</td>')
    for metric in table.metrics:
        cell = row.cells.get(metric)
        if cell is None:
            cells.append("<td></td>")
            continue
        told = number(cell.value, metric)
        told = f"<b>{told}</b>" if row.kind == "model" and table.best.get(metric) == cell.value else told
        told += f"<small>± {number(cell.half_width, metric)}</small>" if cell.half_width else ""
        told += f"<small>sd {number(cell.spread, metric).lstrip('+')}</small>" if cell.spread is not None else ""
        cells.append(f"<td>{told}</td>")
    if seeds:
        cells.append(f"<td>{', '.join(map(str, row.seeds))}</td>")
    return f'<tr class="{row.kind}">{"".join(cells)}</tr>'


def _figure(plot: Plot) -> str:
    return (
        f"<figure><figcaption>{html.escape(plot.title)}<small>{html.escape(plot.told)}</small></figcaption>{plot.svg}"
        f"<details><summary>Numbers</summary>{_plain(plot.columns, plot.rows, plot.title)}</details></figure>"
    )


def _plain(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _markdown_table(table: ReportTable) -> list[str]:
    columns = ["Model", *(["Recommender"] if table.recommenders else []), *table.metrics, "Seeds"]
    rows = []
    for row in table.rows:
        cells = [f"{row.model} ({row.note})" if row.note else row.model]
        cells += [row.recommender] if table.recommenders else []
        for metric in table.metrics:
            cell = row.cells.get(metric)
            told = "" if cell is None else number(cell.value, metric)
            told += f" ± {number(cell.half_width, metric)}" if cell and cell.half_width else ""
            told += f" (sd {number(cell.spread, metric).lstrip('+')})" if cell and cell.spread is not None else ""
            cells.append(told)
        rows.append([*cells, ", ".join(map(str, row.seeds))])
    return _grid(columns, rows)


def _grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(columns), f"|---|{'---:|' * (len(columns) - 1)}", *map(line, rows)]
