"""What `extract` and `recommend` share: running a model over every user whose history, model or options changed."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.config import free, shaping
from raypipe.pipeline.encode_units import EncodeBucket, EncodeTask, Makes, list_column
from raypipe.pipeline.job import BatchConfig, cost_of, scope_of
from raypipe.pipeline.recommender_rows import ByRecommender, Rows
from raypipe.pipeline.user_results import users_result
from raypipe.runtime.budget import Limits
from raypipe.runtime.job import JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import bucket_parts, output_table
from raypipe.runtime.reject_limit import RejectLimit
from raypipe.runtime.session import Session, open_session
from raypipe.storage.ledger import WHOLE, Publish, Receipt, Run, Unit, Usage
from raypipe.storage.models import Model
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace

_READS = ("histories", "items", "rejects")


class EncodeOptions(ModelCache):
    """How a recommender reads the histories."""

    micro_batch_positions: int = free(
        20_000, "positions a worker journals, and a GPU encodes, at a time; padding included", ge=1
    )
    device: str = free("auto", "auto takes a GPU where the worker has one")


class EncodeConfig(EncodeOptions, BatchConfig):
    """The options that `extract` and `recommend` share. In a night the recommender is that of its release."""

    model: str = shaping("sasrec", "a recommender's name, for its newest, or NAME/HASH")


@dataclass(frozen=True)
class Encoding:
    """What a job computes: rows of the table `output` under `variant`, within `limits`.

    `recipe` names all that shapes the rows. `item_states` [items + 1, width] are the model's item vectors. If set, they
    are published too, under the same variant.
    """

    job: str
    output: str
    variant: str
    recipe: str
    makes: Makes
    item_states: NDArray[np.float32] | None = None
    limits: Limits = field(default_factory=Limits)
    reject_limit: RejectLimit | None = None

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.output,) if self.item_states is None else (self.output, "item_states")


def by_recommender(config: EncodeConfig, workspace: Workspace, model: Model, rows: Rows) -> ByRecommender:
    """The work that makes `rows` with the stored `model`, as configured."""
    cache = Path(config.model_cache)
    return ByRecommender(workspace, model, rows, config.micro_batch_positions, cache, config.device)


def run_encoding(
    config: EncodeConfig,
    workspace: Workspace,
    model: Model,
    encoding: Encoding,
    started: float,
    night: NightRuns | None = None,
) -> JobResult:
    """Compute the rows that changed and publish them.

    As a step of `night` the job spends at most what the night left of the caps. A canary's rows go to tables of their
    own.
    """
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    canary = config.canary_users(workspace)
    writes, scope = encoding.writes, scope_of(canary)
    with open_session(workspace, encoding.job, writes, config.cluster, config.lock_lease_s, night, scope) as session:
        if canary is None:
            session.keep_finished(encoding.recipe, encoding.variant, _READS, writes, encoding.reject_limit)
        inputs = session.versions(*_READS)
        base = session.versions(*writes) if canary is None else dict.fromkeys(writes, ABSENT)
        if scope == WHOLE and session.is_current(encoding.recipe, inputs):
            return JobResult(encoding.job, "nothing_to_do", cost=cost_of(Usage(), time.monotonic() - started))
        facts = {"variant": encoding.variant, "model": model.hash}
        run = session.run(encoding.recipe, inputs, base, scope, facts)
        task = EncodeTask(
            workspace,
            scope,
            encoding.output,
            encoding.variant,
            encoding.recipe,
            {**inputs, **base},
            encoding.makes,
            pa.array(canary, pa.string()) if canary is not None else None,
        )
        budget = session.budget(encoding.limits, run)
        units = [Unit("users", index) for index in range(session.info.buckets)]
        receipts = session.phase(
            run, units, partial(EncodeBucket, task, budget), encoding.job, encoding.reject_limit, budget
        )
        parts = bucket_parts(receipts.values(), encoding.variant, (encoding.output,))
        if encoding.item_states is not None:
            parts += _item_states(session, run, encoding.variant, encoding.item_states[1:], base["item_states"])
        result = _finish(session, run, encoding, parts, receipts.values(), started)
    if result.status == "ok":
        params = {"model": model.hash, "variant": encoding.variant, "scope": scope[:12]}
        tracking.log_run(encoding.job, run.run_key, params, {**result.metrics, **result.cost})
    return result


def _item_states(session: Session, run: Run, variant: str, states: NDArray[np.float32], version: int) -> list[Publish]:
    """What to publish of the model's item vectors; nothing if they are published already."""
    workspace, name = session.workspace, "item_states"
    table = workspace.tables[name]
    indices = pa.array(np.arange(1, len(states) + 1, dtype=np.int32))
    rows = pa.table([indices, list_column(states)], schema=table.spec.columns)
    before = table.read(version, table.spec.columns.names, variant=variant).sort_by("item_index")
    if before.num_rows == rows.num_rows and before.combine_chunks().equals(rows):
        return []
    target = output_table(workspace, name, run.manifest["scope"], run.run_key)
    # Under a fixed name, so that a resumed run stages the same bytes again.
    staged = target.stage(rows, f"{run.run_key[:12]}-items", {"variant": variant})
    return [Publish(name, "overwrite", [staged], [{"variant": variant}])]


def _finish(
    session: Session,
    run: Run,
    encoding: Encoding,
    parts: Sequence[Publish],
    receipts: Collection[Receipt],
    started: float,
) -> JobResult:
    result = users_result(session, run, receipts, parts, encoding.limits, started)
    published = session.publish(run, parts, result)
    if run.manifest["scope"] != WHOLE:
        say(f"{encoding.job}: the canary's tables are below {session.workspace.uri}/canary/{run.run_key}")
    return published
