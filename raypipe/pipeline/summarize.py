"""`raypipe summarize`: write a preference summary of every user whose history or recipe changed.

The work is decided by change keys, so a night costs what changed: unchanged users are carried over, and only those
blocks of a changed user are read again whose items are new.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa

from raypipe.config import free, shaping
from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.held_out import share_of
from raypipe.pipeline.job import BatchConfig, CapOptions, cost_of, scope_of
from raypipe.pipeline.loaded import BUILTIN, find_builtin_lm, is_builtin
from raypipe.pipeline.summarize_units import SummarizeBucket, SummaryTask
from raypipe.pipeline.summary_quality import QUALITY
from raypipe.pipeline.summary_state import Pins, Recipes
from raypipe.pipeline.user_results import users_result
from raypipe.runtime.job import JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import bucket_parts
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.session import Session, open_session
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import WHOLE, Receipt, Run, Unit, Usage
from raypipe.storage.models import Model
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig

JOB = "summarize"
_READS = ("histories", "items", "rejects")
_WRITES = ("block_summaries", "summaries")


class SummarizeOptions(CapOptions, ModelCache):
    """Which engine writes the summaries, how, and at what cost at most."""

    engine: EngineConfig = shaping(
        lambda: EngineConfig(lm=BUILTIN),
        "what generates; lm builtin is the workspace's own, builtin/HASH one of several",
    )
    summaries: SummariesConfig = shaping(SummariesConfig, "blocks, window, prompts, decoding")
    micro_batch_users: int = free(256, "users a worker gives the engine at a time", ge=1)

    def resolve_model(self, workspace: Workspace) -> Model | None:
        """The workspace's own language model, the newest or the one named, if the config asks for it.

        Raises UsageError if it is not there.
        """
        if not self.engine.reads_checkpoint or not is_builtin(self.engine.lm):
            return None
        return find_builtin_lm(workspace, "--engine.lm", self.engine.lm)

    def recipes(self, workspace: Workspace, model: Model | None) -> Recipes:
        """The fingerprints of both stages with the resolved model's content in them."""
        engine = self.engine
        if model is not None:
            engine = engine.model_copy(update={"lm": str(self.fetch(workspace, model))})
        identity = engine.identity()
        return Recipes(
            self.summaries.variant, self.summaries.block_recipe(identity), self.summaries.merge_recipe(identity)
        )


class SummarizeConfig(SummarizeOptions, BatchConfig):
    """Configuration of `summarize`."""


def run_summarize(config: SummarizeConfig, night: NightRuns | None = None) -> JobResult:
    """Summarise every changed user; see the module.

    As a step of `night` the job spends at most what the night left of the caps. Raises UsageError before work starts.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    model = config.resolve_model(workspace)
    recipes = config.recipes(workspace, model)
    canary = config.canary_users(workspace)
    scope = scope_of(canary)
    with open_session(workspace, JOB, _WRITES, config.cluster, config.lock_lease_s, night, scope) as session:
        recipe = fingerprint({"variant": recipes.variant, "block": recipes.block, "merge": recipes.merge})
        reject_limit = RejectLimit(config.max_reject_rate)
        if canary is None:
            session.keep_finished(recipe, recipes.variant, _READS, _WRITES, reject_limit)
        pins = pin(session, canary)
        if scope == WHOLE and session.is_current(recipe, pins.inputs()):
            return JobResult(JOB, "nothing_to_do", cost=cost_of(Usage(), time.monotonic() - started))
        run = session.run(
            recipe,
            pins.inputs(),
            pins.outputs(),
            scope,
            {
                "variant": recipes.variant,
                "engine": config.engine.engine,
                "model": model.hash if model else config.engine.model_name,
                "block_items": config.summaries.block_items,
                # How many last events of every user, and which share of the users, the language model has not read.
                # Nobody knows it for a model that is not the workspace's own.
                "model_hold_out": model and int(model.lineage["hold_out"]),
                "model_held_out_share": model and share_of(model),
                "recipes": {"block": recipes.block, "merge": recipes.merge},
            },
        )
        task = SummaryTask(
            workspace,
            scope,
            pins,
            recipes,
            config.summaries,
            config.engine,
            model,
            pa.array(canary, pa.string()) if canary is not None else None,
            config.micro_batch_users,
            Path(config.model_cache),
        )
        units = [Unit("users", index) for index in range(session.info.buckets)]
        budget = session.budget(config.limits(), run)
        receipts = session.phase(run, units, partial(SummarizeBucket, task, budget), JOB, reject_limit, budget)
        result = _publish(config, session, run, receipts, scope, started)
    if result.status == "ok":
        params = {
            "engine": config.engine.engine,
            "model": model.hash if model else config.engine.model_name,
            "scope": scope[:12],
        }
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, (int, float))}
        tracking.log_run(JOB, run.run_key, params, {**numbers, **result.cost})
    return result


def pin(session: Session, canary: list[str] | None) -> Pins:
    """The versions this run reads. A canary starts from nothing, as a first night would."""
    versions = session.versions(*_READS, *_WRITES)
    if canary is not None:
        versions.update(summaries=ABSENT, block_summaries=ABSENT)
    return Pins(**versions)


def _publish(
    config: SummarizeConfig, session: Session, run: Run, receipts: dict[Unit, Receipt], scope: str, started: float
) -> JobResult:
    parts = bucket_parts(receipts.values(), config.summaries.variant, _WRITES)
    quality = {name: _mean(receipts.values(), name) for name in QUALITY}
    result = users_result(session, run, receipts.values(), parts, config.limits(), started, quality)
    if unfinished := result.metrics.get("unfinished"):
        say(f"{JOB}: {unfinished:,} users have more blocks than one run reads; the next one goes on")
    published = session.publish(run, parts, result)
    if scope != WHOLE:
        say(f"{JOB}: the canary's tables are below {session.workspace.uri}/canary/{run.run_key}")
    return published


def _mean(receipts: Iterable[Receipt], name: str) -> float | None:
    totals = [receipt.facts[name] for receipt in receipts]
    count = sum(count for _, count in totals)
    return round(sum(total for total, _ in totals) / count, 4) if count else None
