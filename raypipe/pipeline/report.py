"""`raypipe report`: show every recommender and system that was measured, beside floors, controls and what is published.

It writes one HTML page that needs nothing else, and the same tables as Markdown, below `reports/` or in `--folder`. The
figures are those that `evaluate`, `align` and `judge` recorded in the workspace, those of `summarize` runs in the
ledger, and those of golden tables. Nothing is measured here, and no user is named. What a report says follows from
these figures alone, so that the same figures give the same bytes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from raypipe.config import shaping
from raypipe.errors import UsageError
from raypipe.metrics.published import DATA_SETS
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.report_drawings import plots_of, training_plots
from raypipe.pipeline.report_figures import Figure, figures_of, read_golden
from raypipe.pipeline.report_page import DataSet, Report, to_html, to_markdown
from raypipe.pipeline.report_tables import kind_of, published_systems, tables_of
from raypipe.pipeline.sequences import pinned_versions, read_histories
from raypipe.pipeline.summary_quality import QUALITY
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.storage.evaluations import Evaluation, Evaluations
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace

JOB = "report"
_FOLDER = "reports"


class ReportConfig(JobConfig):
    """Configuration of `report`."""

    golden: tuple[str, ...] = shaping((), "golden tables to be told too, as JSON or separated by commas")
    dataset: str | None = shaping(
        None, "what the workspace's data set is called; unset: its public name where it has one, else its folder's"
    )
    title: str = shaping("What was measured", "the page's heading")
    name: str = shaping("report", "of the two files: NAME.html and NAME.md", pattern=r"^[\w.-]+$")
    folder: str | None = shaping(None, "where they are written; unset: `reports` below the workspace")


def run_report(config: ReportConfig) -> JobResult:
    """Write both files. Raises UsageError if nothing was measured, or a golden table cannot be read."""
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    golden = [figure for path in config.golden for figure in read_golden(path)]
    evaluations: list[Evaluation] = []
    figures: list[Figure] = []
    spent: list[tuple[str, ...]] = []
    name = ""
    if workspace.info() is not None:
        evaluations = Evaluations(workspace.store).all()
        name = config.dataset or _data_set(workspace)
        figures = [*figures_of(evaluations, name), *_judged(workspace, name), *_summarised(workspace, name)]
        spent = _spent(workspace)
    if not figures and not golden:
        raise UsageError(
            f"Nothing was measured in {workspace.uri} yet.",
            "Run `raypipe evaluate`, `raypipe align` or `raypipe judge` first, or name golden tables with --golden.",
        )
    report = _report(config, [*figures, *golden], name, evaluations, spent)
    page, tables = to_html(report), to_markdown(report)
    key = fingerprint({"job": JOB, "page": page, "tables": tables})
    files = {f"{config.name}.html": page, f"{config.name}.md": tables}
    written = _write(config, workspace, files)
    told = [*figures, *golden]
    counts = {"figures": len(told), "models": _models(told)}
    metrics = {"page": written.places[0], "tables": written.places[1], **counts}
    say(f"{JOB}: {counts['figures']:,} figures of {counts['models']:,} models are told in {metrics['page']}")
    tracking.log_run(JOB, key, {"title": config.title}, counts, files)
    cost = cost_of(Usage(), time.monotonic() - started)
    return JobResult(JOB, "ok" if written.changed else "nothing_to_do", key, metrics=metrics, cost=cost)


def _report(
    config: ReportConfig,
    figures: list[Figure],
    own: str,
    evaluations: list[Evaluation],
    spent: list[tuple[str, ...]],
) -> Report:
    sets = []
    for name in dict.fromkeys(figure.dataset for figure in figures):
        mine = [figure for figure in figures if figure.dataset == name]
        training = training_plots(evaluations) if name == own else []
        commands = list(dict.fromkeys(figure.command for figure in mine if figure.command))
        sets.append(DataSet(name, tables_of(name, mine), plots_of(mine), training, commands))
    where = f"{len(sets)} data sets" if len(sets) > 1 else sets[0].name
    told = f"{_models(figures):,} models on {where}, with floors, controls and what others published."
    return Report(config.title, told, sets, published_systems(figures), spent)


def _models(figures: list[Figure]) -> int:
    """How many models there are, over all data sets, without floors and without what only stands beside a model."""
    return len({(figure.dataset, *figure.row) for figure in figures if kind_of(figure.model) == "model"})


def _data_set(workspace: Workspace) -> str:
    """A public data set's name, known by its users and events; else the last folder of the workspace's URI."""
    versions = pinned_versions(workspace)
    users, histories = read_histories(workspace, versions["histories"])
    return DATA_SETS.get((len(users), len(histories.items)), workspace.uri.rstrip("/").rsplit("/", 1)[-1])


def _judged(workspace: Workspace, dataset: str) -> list[Figure]:
    """The newest ratings of everything that was judged."""
    found: dict[tuple[str, str], Figure] = {}
    entries = workspace.store.list("judgements")
    reports = [json.loads(workspace.store.read(entry.path)) for entry in entries]
    for report in sorted(reports, key=lambda report: report["created"]):
        what = report["what"]
        for metric, value in report["metrics"].items():
            if value is not None and metric != "users":
                protocol = "samples of users chosen by hash"
                found[what, metric] = Figure(dataset, protocol, what, "", metric, float(value), 0)
    return list(found.values())


def _summarised(workspace: Workspace, dataset: str) -> list[Figure]:
    """The quality figures of the newest finished `summarize` run of each variant and engine.

    They are of the summaries that the run wrote.
    """
    found: dict[str, list[Figure]] = {}
    for run in reversed(list(workspace.ledger("summarize").finished())):
        result = run.result()
        if result is None or result["status"] != "ok":
            continue
        facts = run.manifest["facts"]
        model = f"{facts['variant']} by {facts['engine']}"
        found[model] = [
            Figure(dataset, "those the newest run wrote", model, "", metric, float(value), 0)
            for metric in QUALITY
            if (value := result["metrics"].get(metric)) is not None
        ]
    return [figure for mine in found.values() for figure in mine]


def _spent(workspace: Workspace) -> list[tuple[str, ...]]:
    """A row for every job with a ledger: its finished runs, and what they cost together; see `report_page.SPENT`."""
    rows = []
    for job in workspace.store.folders("ledger"):
        ledger = workspace.ledger(job)
        results = [ledger.run(key).result() for key in ledger.numbers().values()]
        costs = [result["cost"] for result in results if result is not None and result.get("cost")]
        if costs:
            totals = [
                sum(cost.get(name, 0) for cost in costs) for name in ("calls", "tokens_in", "tokens_out", "seconds")
            ]
            rows.append((job, f"{len(costs):,}", *(f"{total:,.0f}" for total in totals)))
    return rows


@dataclass(frozen=True)
class _Written:
    places: list[str]
    changed: bool


def _write(config: ReportConfig, workspace: Workspace, files: dict[str, str]) -> _Written:
    """Write the files that say something new. Returns where the files are, and whether one was written."""
    places, changed = [], False
    store = workspace.store if config.folder is None else Store(config.folder)
    for name, text in files.items():
        path = f"{_FOLDER}/{name}" if config.folder is None else name
        if store.get(path) != text.encode():
            store.put(path, text.encode())
            changed = True
        places.append(store.object_uri(path))
    return _Written(places, changed)
