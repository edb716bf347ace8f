"""`raypipe nightly`: ingest, language model, summaries, night manifest, user cards — each step only if it has to.

A step is skipped when nothing it reads and nothing of its recipe changed. The language model is trained once, when the
workspace has none, and never again by this job. The manifest is written last: until then readers see the night before.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

from raypipe.config import free, shaping
from raypipe.pipeline.cards import write_cards
from raypipe.pipeline.ingest import IngestConfig, IngestOptions, run_ingest
from raypipe.pipeline.job import JobConfig, JobResult
from raypipe.pipeline.lm import MODEL, LmConfig, LmOptions, run_lm
from raypipe.pipeline.summarize import BUILTIN, SummarizeConfig, SummarizeOptions, run_summarize
from raypipe.runtime.progress import say
from raypipe.storage.locks import hold
from raypipe.storage.models import Models
from raypipe.storage.nights import Night, Nights, check_date
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace

JOB = "nightly"


class NightlyConfig(JobConfig):
    """Configuration of `nightly`: its steps' options, and the night's date."""

    date: str | None = free(None, "the night's date, YYYY-MM-DD; unset: today")
    ingest: IngestOptions = shaping(IngestOptions, "the log and the catalogue; without a log this step reads none")
    lm: LmOptions = shaping(LmOptions, "the workspace's own language model")
    summarize: SummarizeOptions = shaping(SummarizeOptions, "the summaries")
    cards: int = free(12, "users shown in the night's cards", ge=0)

    def shared(self) -> dict[str, Any]:
        """What every step takes from the night."""
        return {name: getattr(self, name) for name in JobConfig.model_fields}


def run_nightly(config: NightlyConfig) -> JobResult:
    """Run the night; see the module. A step's UsageError or failure leaves the night before in force."""
    started = time.monotonic()
    date = check_date(config.date or datetime.date.today().isoformat())
    workspace = config.open_workspace()
    results: dict[str, JobResult] = {}
    for name, step in _steps(config, workspace).items():
        before = time.monotonic()
        results[name] = step()
        say(f"{name}: {results[name].status}, {time.monotonic() - before:.1f} s")
    tables = {name: table.version() for name, table in workspace.tables.items() if table.version() != ABSENT}
    uses_own = "lm" in results
    model = Models(workspace.store).newest(MODEL) if uses_own else None
    release = {"lm": model.hash if model is not None else config.summarize.engine.lm or config.summarize.engine.engine}
    nights = Nights(workspace.store)
    current = nights.current()
    is_new = current is None or dict(current.tables) != tables or dict(current.release) != release
    if is_new:
        metrics = {name: dict(result.metrics) for name, result in results.items()}
        write_cards(workspace, date, tables, config.cards, config.summarize.summaries)
        with hold(workspace.store, ["nights"], JOB, config.lock_lease_s):
            nights.publish(Night(date, tables, release, metrics))
        say(f"{JOB}: the night of {date} is in force")
    return _result(workspace, results, is_new, tables, release, time.monotonic() - started)


def _steps(config: NightlyConfig, workspace: Workspace) -> dict[str, Any]:
    shared = config.shared()
    steps: dict[str, Any] = {}
    if config.ingest.log is not None or config.ingest.catalogue is not None:
        steps["ingest"] = lambda: run_ingest(IngestConfig(**shared, **dict(config.ingest)))
    if config.summarize.engine.engine != "echo" and config.summarize.engine.lm == BUILTIN:
        steps["lm"] = lambda: _train_once(config, workspace, shared)
    steps["summarize"] = lambda: run_summarize(SummarizeConfig(**shared, **dict(config.summarize)))
    return steps


def _train_once(config: NightlyConfig, workspace: Workspace, shared: Mapping[str, Any]) -> JobResult:
    if (model := Models(workspace.store).newest(MODEL)) is not None:
        return JobResult("lm", "nothing_to_do", model.recipe, models={MODEL: model.hash})
    return run_lm(LmConfig(**shared, **dict(config.lm)))


def _result(
    workspace: Workspace,
    results: Mapping[str, JobResult],
    is_new: bool,
    tables: Mapping[str, int],
    release: Mapping[str, Any],
    seconds: float,
) -> JobResult:
    shown = {
        name: {"version": version, "rows": workspace.tables[name].rows(version), "rejected": 0}
        for name, version in tables.items()
    }
    for result in results.values():
        shown.update({name: dict(table) for name, table in result.tables.items()})
    cost = {"seconds": round(seconds, 3)}
    for name in ("calls", "tokens_in", "tokens_out", "money"):
        cost[name] = sum(result.cost.get(name, 0) for result in results.values())
    metrics = {f"{name}.{key}": value for name, result in results.items() for key, value in result.metrics.items()}
    status = "ok" if is_new else "nothing_to_do"
    run_key = results["summarize"].run_key
    return JobResult(JOB, status, run_key, shown, {key: str(value) for key, value in release.items()}, metrics, cost)
