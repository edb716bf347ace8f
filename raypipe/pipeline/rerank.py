"""`raypipe rerank`: put everybody's recommendations in the order of a language model that reads them.

The language model also reads a summary of the user. The ranker is a model of `align --system trsr`. If it was taught by
counts, its prompts have the numbers of the counts stored with it. Only users whose history, list or summary changed are
asked about.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from raypipe.config import free, shaping
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.pipeline.job import BatchConfig, CapOptions, cost_of, scope_of
from raypipe.pipeline.loaded import BUILTIN, is_builtin, lm_beside
from raypipe.pipeline.rerank_units import TABLE, RerankBucket, RerankTask
from raypipe.pipeline.user_results import users_result
from raypipe.runtime.job import JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import bucket_parts
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.session import open_session
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import WHOLE, Unit, Usage
from raypipe.storage.models import Model, Models, find_adapter
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems.summaries import SummariesConfig
from raypipe.systems.trsr import NAME, Shown, TrsrConfig, shown_summaries

JOB = "rerank"
STEP_VERSION = 3


class RerankOptions(CapOptions, ModelCache):
    """Which model ranks, whose lists it ranks, and what it is shown of a user."""

    ranker: str = free(NAME, "NAME, for its newest, or NAME/HASH of a model made by `align --system trsr`")
    engine: EngineConfig = free(
        lambda: EngineConfig(lm=BUILTIN), "what scores; lm is the one the model was trained beside"
    )
    model: str = shaping("sasrec", "the recommender whose lists, of `recommend`, are put in order")
    summaries: Shown = shaping(
        "trained", "whose summaries are shown, of `summarize`; trained: as in its training; null for none"
    )
    micro_batch: int = free(64, "users a worker gives the engine at a time", ge=1)


class RerankConfig(RerankOptions, BatchConfig):
    """Configuration of `rerank`."""


@dataclass(frozen=True)
class _Ranker:
    """The resolved and checked ranker: the model, and how users and items are shown to it.

    `lm` is the workspace's own language model, None if the ranker reads with another.
    """

    model: Model
    lm: Model | None
    options: TrsrConfig
    summaries: str | None
    recipe: str

    @classmethod
    def of(cls, config: RerankOptions, workspace: Workspace) -> _Ranker:
        """Resolve and check the ranker.

        Raises UsageError for a model that ranks no candidates, for a language model it was not trained beside, and for
        an engine that scores no answers.
        """
        model = find_adapter(Models(workspace.store), config.ranker, NAME)
        if not config.engine.capabilities.logprobs:
            raise UsageError(
                f"The engine {config.engine.engine} cannot tell how likely an answer is, nor read an adapter.",
                "Choose --engine.engine transformers.",
            )
        folder = config.fetch(workspace, model)
        card = read_card(folder)
        lm = lm_beside(config, workspace, card, config.engine.lm) if is_builtin(config.engine.lm) else None
        engine = config.engine.model_copy(update={"adapter": str(folder)})
        if lm is not None:
            engine = engine.model_copy(update={"lm": str(config.fetch(workspace, lm))})
        identity = engine.identity()
        if identity["model"] != card.lm:
            raise UsageError(
                f"The model {model.name} was trained beside another language model than {config.engine.lm}.",
                "Name that one with --engine.lm, or train another with `raypipe align --system trsr`.",
            )
        options = TrsrConfig.model_validate(model.lineage["options"]).undisturbed()
        summaries = shown_summaries(config.summaries, model.lineage)
        recipe = fingerprint(
            {
                "step": STEP_VERSION,
                "config": {**config.shaping_values(), "summaries": summaries},
                "engine": identity,
                "options": options.shaping_values(),
                # This hash also covers the counts that are stored beside its weights.
                "ranker": model.hash,
            }
        )
        return cls(model, lm, options, summaries, recipe)


def run_rerank(config: RerankConfig) -> JobResult:
    """Write lists to `recommendations`, variant `rerank-<recommender>`. Their scores are the probabilities of yes.

    Raises UsageError before work starts: for a model that cannot rank, and if there are no lists or summaries.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    ranker = _Ranker.of(config, workspace)
    canary = config.canary_users(workspace)
    recommender = config.model.partition("/")[0]
    variant = f"{JOB}-{recommender}"
    scope = scope_of(canary)
    with open_session(workspace, JOB, [TABLE], config.cluster, config.lock_lease_s, scope=scope) as session:
        shown = ["summaries"] if ranker.summaries is not None else []
        reads, reject_limit = ("histories", "items", "rejects", TABLE, *shown), RejectLimit(config.max_reject_rate)
        if canary is None:
            session.keep_finished(ranker.recipe, variant, reads, [TABLE], reject_limit)
        inputs = session.versions(*reads)
        base = {TABLE: inputs[TABLE] if canary is None else ABSENT}
        task = RerankTask(
            workspace=workspace,
            scope=scope,
            variant=variant,
            recipe=ranker.recipe,
            versions={**inputs, **base},
            lists=f"recommend-{recommender}",
            lists_version=inputs[TABLE],
            summaries=ranker.summaries and SummariesConfig.model_validate({"paradigm": ranker.summaries}).variant,
            ranker=ranker.model,
            lm=ranker.lm,
            engine=config.engine,
            options=ranker.options,
            users=pa.array(canary, pa.string()) if canary is not None else None,
            micro_batch=config.micro_batch,
            model_cache=Path(config.model_cache),
        )
        _check_written(task)
        if task.scope == WHOLE and session.is_current(ranker.recipe, inputs):
            return JobResult(JOB, "nothing_to_do", cost=cost_of(Usage(), time.monotonic() - started))
        facts = {"variant": variant, "model": ranker.model.hash, "engine": config.engine.engine}
        run = session.run(ranker.recipe, inputs, base, task.scope, facts)
        budget = session.budget(config.limits(), run)
        units = [Unit("users", index) for index in range(session.info.buckets)]
        receipts = session.phase(run, units, partial(RerankBucket, task, budget), JOB, reject_limit, budget)
        parts = bucket_parts(receipts.values(), variant, (TABLE,))
        moved = {"first_moved": sum(receipt.facts["first_moved"] for receipt in receipts.values())}
        result = users_result(session, run, receipts.values(), parts, config.limits(), started, moved)
        published = session.publish(run, parts, result)
    if canary is not None:
        say(f"{JOB}: the canary's tables are below {workspace.uri}/canary/{run.run_key}")
    if published.status == "ok":
        params = {"model": ranker.model.hash, "variant": variant, "scope": task.scope[:12]}
        tracking.log_run(JOB, run.run_key, params, {**published.metrics, **published.cost})
    return published


def _check_written(task: RerankTask) -> None:
    """Raise UsageError if there are no lists to put in order, or no summaries to show."""

    def there(table: str, version: int, variant: str) -> bool:
        partitions = task.workspace.tables[table].partitions(version)
        return any(values["variant"] == variant for values, _ in partitions)

    if not there(TABLE, task.lists_version, task.lists):
        raise UsageError(
            f"There are no lists of the variant {task.lists} yet.",
            "Run `raypipe recommend` first, or name another --model.",
        )
    if task.summaries is not None and not there("summaries", task.versions["summaries"], task.summaries):
        raise UsageError(
            f"There are no summaries of the variant {task.summaries} yet.",
            "Run `raypipe summarize` first, or rank without with --summaries null.",
        )
