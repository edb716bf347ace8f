"""The unit work of `summarize`: one user bucket in micro-batches, each named in the journal before it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.engines.engine import Engine, EngineConfig
from raypipe.pipeline.micro_batches import run_micro_batches, used
from raypipe.pipeline.rejects import WORKER_DIED, blocked_users, stage_rejected
from raypipe.pipeline.summary_quality import SummaryQuality
from raypipe.pipeline.summary_state import BucketState, Pins, PromptCatalogue, Recipes
from raypipe.runtime.budget import Budget
from raypipe.runtime.publishing import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.change_keys import RECIPE_DIGITS
from raypipe.storage.fingerprint import schema_hash
from raypipe.storage.ledger import Counts, Receipt, Unit, Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.schemas import BLOCK_SUMMARIES, SUMMARIES
from raypipe.storage.tables import StagedFile
from raypipe.storage.workspace import Workspace
from raypipe.systems.paradigms import build_summarizer
from raypipe.systems.summaries import UNFINISHED, Block, Known, SummariesConfig, Summarizer, UserSummary, Written


@dataclass(frozen=True)
class SummaryTask:
    """What every unit of a run shares; small and picklable."""

    workspace: Workspace
    scope: str
    pins: Pins
    recipes: Recipes
    config: SummariesConfig
    engine: EngineConfig
    model: Model | None
    users: pa.Array | None
    micro_batch_users: int
    model_cache: Path


class SummarizeBucket:
    """Writes the summaries of one bucket's changed users and carries over those of the others."""

    def __init__(self, task: SummaryTask, budget: Budget) -> None:
        self.task = task
        self.budget = budget
        workspace = task.workspace
        self.catalogue = PromptCatalogue(workspace.tables["items"].read(task.pins.items), task.config)
        self.quality = SummaryQuality(self.catalogue, task.config)
        self.blocked = blocked_users(workspace, task.pins.rejects, "summaries", task.recipes.variant)

    @cached_property
    def summarizer(self) -> Summarizer:
        # Built for the first changed user, so that a night without changes loads no weights.
        return build_summarizer(
            build_engine(self.task.workspace, self.task.engine, self.task.model, self.task.model_cache),
            self.task.config,
            self.task.recipes.merge,
        )

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        task = self.task
        state = BucketState(
            task.workspace, unit.index, task.pins, task.recipes, task.config, self.catalogue, task.users
        )
        # If a cap or the deadline ends the night early, those who did most have been read.
        changed = state.changed_by_activity.tolist()
        names = state.users.take(pa.array(changed, pa.int64())).to_pylist()
        keys = state.blocks.change_key.take(pa.array(changed, pa.int64())).to_pylist()
        work = {
            name: user for name, key, user in zip(names, keys, changed, strict=True) if (name, key) not in self.blocked
        }
        results = self._write(work, state, context)
        capped = len(work) - len(results)
        failed = [result for result in results.values() if result.reason]
        good = [result for result in results.values() if result.summary and not result.reason]
        made = np.array([work[result.user_id] for result in good], np.int64)
        carried = state.carried_over(made)
        unfinished = sum(result.unfinished for result in results.values() if not result.reason)
        skipped = {
            "unchanged": len(state.users) - len(changed),
            "blocked": len(changed) - len(work),
            "capped": capped,
            "unfinished": unfinished,
        }
        counts = Counts(len(state.users), len(results) - len(failed) - unfinished, len(failed), skipped)
        staged: dict[str, Sequence[StagedFile]] = {}
        if results or carried.rows.num_rows < state.before.num_rows:
            context.journal([])
            rows = pa.concat_tables([carried.rows, self._summary_rows(state, pa.array(made), good)]).sort_by("user_id")
            staged = self._stage(state, work, results, rows, context)
        usage = used(results.values()) + Usage(seconds=time.monotonic() - started)
        schemas = {"summaries": schema_hash(SUMMARIES.schema), "block_summaries": schema_hash(BLOCK_SUMMARIES.schema)}
        facts = {
            **self._quality(state, work, results),
            "stale": carried.stale,
            "reasons": {result.reason: result.message for result in failed},
        }
        return Receipt(unit, counts, usage, staged, schemas, facts, context.attempt)

    def _write(self, work: Mapping[str, int], state: BucketState, context: UnitContext) -> dict[str, UserSummary]:
        names, places = list(work), list(work.values())

        def read(rows: list[int]) -> tuple[dict[str, list[Block]], dict[str, Known]]:
            """The users' blocks, and what is known of them from before."""
            users, chosen = [names[row] for row in rows], [places[row] for row in rows]
            blocks = dict(zip(users, state.user_blocks(chosen), strict=True))
            return blocks, dict(zip(users, state.known(chosen), strict=True))

        results = run_micro_batches(
            names,
            self.task.micro_batch_users,
            context,
            self.budget,
            read=read,
            weigh=lambda batch: sum(map(self.summarizer.most_calls, *(users.values() for users in batch))),
            most=self._most,
            run=lambda batch: self.summarizer.summarize(*batch),
            rejected=lambda row, *why: UserSummary(names[row], "", *why),
        )
        return {result.user_id: result for result in results.values()}

    def _most(self, answers: int) -> Usage:
        """An upper bound of what so many answers take, if each is asked for again as often as the checks allow."""
        calls = answers * (1 + self.task.config.checks.retries)
        return Usage(calls * self.task.engine.most_calls, *self.summarizer.most_tokens(calls))

    def _stage(
        self,
        state: BucketState,
        work: Mapping[str, int],
        results: Mapping[str, UserSummary],
        summaries: pa.Table,
        context: UnitContext,
    ) -> dict[str, Sequence[StagedFile]]:
        task = self.task
        partition: dict[str, str | int] = {"variant": task.recipes.variant, "bucket": state.bucket}
        name = context.file_name()
        rows = {"summaries": summaries, "block_summaries": _block_rows(state, results)}
        staged: dict[str, Sequence[StagedFile]] = {
            table: [output_table(task.workspace, table, task.scope, context.run.run_key).stage(values, name, partition)]
            for table, values in rows.items()
        }
        failed = [result for result in results.values() if result.reason]
        if failed:
            staged["rejects"] = stage_rejected(
                task.workspace,
                task.scope,
                context,
                "summaries",
                task.recipes.variant,
                [result.user_id for result in failed],
                [(result.reason, result.message) for result in failed],
                [state.blocks.change_key[work[result.user_id]].as_py() for result in failed],
            )
        return staged

    def _summary_rows(self, state: BucketState, users: pa.Array, good: Sequence[UserSummary]) -> pa.Table:
        """The new rows of `users`, who are given by number."""
        keys = state.blocks.change_key.take(users).to_pylist()
        done = [
            key[:RECIPE_DIGITS] + UNFINISHED if result.unfinished else key
            for key, result in zip(keys, good, strict=True)
        ]
        return pa.table(
            [
                pa.array([result.user_id for result in good], pa.string()),
                pa.array([result.summary for result in good], pa.string()),
                *self._carries(state, users, good),
                pa.array([result.calls for result in good], pa.int32()),
                pa.array([result.tokens_in for result in good], pa.int64()),
                pa.array([result.tokens_out for result in good], pa.int64()),
                pa.array(done, pa.string()),
            ],
            schema=SUMMARIES.columns,
        )

    def _carries(
        self, state: BucketState, users: pa.Array, results: Sequence[UserSummary]
    ) -> tuple[pa.Array, pa.Array, pa.Array]:
        """What a later summary is built on.

        That is its text if there is one, the number of full blocks it is of, and their key.
        """
        if self.task.config.paradigm == "hierarchical":
            covered = pa.array(state.blocks.covered, pa.int32()).take(users)
            return pa.nulls(len(results), pa.string()), covered, state.blocks.covered_key.take(users)
        last = [result.written[-1] if result.written else None for result in results]
        return (
            pa.array([text and text.text for text in last], pa.string()),
            pa.array([text.number + 1 if text else 0 for text in last], pa.int32()),
            pa.array([text.key if text else "" for text in last], pa.string()),
        )

    def _quality(
        self, state: BucketState, work: Mapping[str, int], results: Mapping[str, UserSummary]
    ) -> dict[str, list[float]]:
        finished = [result for result in results.values() if not result.reason and not result.unfinished]
        users = [work[result.user_id] for result in finished]
        return self.quality.figures(state, users, [result.summary for result in finished])


def build_engine(workspace: Workspace, engine: EngineConfig, model: Model | None, cache: Path) -> Engine:
    """The engine on this machine. `model` is the workspace's own, and is fetched first from an object store."""
    if model is not None:
        engine = engine.model_copy(update={"lm": str(Models(workspace.store).fetch(model, cache))})
    return engine.build()


def _block_rows(state: BucketState, results: Mapping[str, UserSummary]) -> pa.Table:
    """All block summaries of the bucket.

    These users have those that their summaries are made of, and the other users have theirs as they were.
    """
    written = [result.written for result in results.values()]
    owners = np.repeat(np.arange(len(written)), [len(texts) for texts in written])
    users = pa.array(list(results), pa.string())
    # For a user whose worker died nothing was written, and what was there stays.
    asked = [user for user, result in results.items() if result.reason != WORKER_DIED[0]]
    texts = list(zip(*chain.from_iterable(written), strict=True)) or [()] * len(Written._fields)
    fresh = pa.table([users.take(pa.array(owners)), *texts], schema=BLOCK_SUMMARIES.columns)
    before = state.written_before
    gone = pc.is_in(before["user_id"], value_set=pa.array(asked, pa.string()))
    stays = pc.and_(pc.is_in(before["user_id"], value_set=state.users), pc.invert(gone))
    order = [("user_id", "ascending"), ("level", "ascending"), ("block", "ascending")]
    return pa.concat_tables([before.filter(stays), fresh]).sort_by(order)
