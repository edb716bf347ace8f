"""The unit work of `explain`: decide on and explain the pairs (user, item) of one user bucket, in micro-batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raypipe.engines.checks import AnswerChecks
from raypipe.engines.engine import Decoding, Engine, EngineConfig
from raypipe.language.titles import distinct_titles
from raypipe.metrics.text import item_values
from raypipe.metrics.unfounded import Titles
from raypipe.pipeline.micro_batches import run_micro_batches, used
from raypipe.pipeline.rejects import blocked_users, stage_rejected
from raypipe.pipeline.user_rows import CarriedOver, UserRows, carry_over
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender, freeze
from raypipe.recommenders.windows import Histories
from raypipe.runtime.budget import Budget
from raypipe.runtime.publishing import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.fingerprint import schema_hash
from raypipe.storage.ledger import Counts, Receipt, Unit, Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.schemas import EXPLANATIONS
from raypipe.storage.tables import StagedFile
from raypipe.storage.workspace import Workspace
from raypipe.systems.explainer_examples import PromptPieces
from raypipe.systems.explanations import Explanation, ExplanationRequest, contradicts, explain
from raypipe.systems.recexplainer import ExplainerConfig

TABLE = "explanations"
FIGURES = ("explained", "yes", "contradicting", "unchosen", "made_up")
"""Facts of a receipt: of new explanations their number, and how many say yes, how many texts begin with the other answer than
was decided, how many name titles beside the user's and the item's, and how many name titles that no item has."""


@dataclass(frozen=True)
class ExplainTask:
    """What every unit of a run shares; small and picklable.

    `pairs` has user_id and item_index. If it is None, every user's first item in `recommendations`, of the variant
    `recommended`, is explained. `users` restricts the run to those of a canary.
    """

    workspace: Workspace
    scope: str
    variant: str
    recipe: str
    versions: dict[str, int]
    recommender: Model
    adapter: Model
    lm: Model | None
    engine: EngineConfig
    system: ExplainerConfig
    focus: str
    decoding: Decoding
    checks: AnswerChecks
    recommended: str
    pairs: pa.Table | None
    users: pa.Array | None
    micro_batch: int
    model_cache: Path


@dataclass(frozen=True)
class Due:
    """What is due in one bucket.

    `pairs` has user_id, item_index, place among the bucket's users, and change_key. `work` are those of the pairs that
    are to be explained, and `skipped` counts the others by reason. An older explanation may stay only if its pair is in
    `shown` (user_id, item_index).
    """

    pairs: pa.Table
    shown: pa.Table
    work: pa.Table
    skipped: dict[str, int]


class ExplainBucket:
    """Explains one bucket's pairs that are new or whose history changed, and carries over the other explanations."""

    def __init__(self, task: ExplainTask, budget: Budget) -> None:
        self.task, self.budget = task, budget
        self.blocked = blocked_users(task.workspace, task.versions["rejects"], TABLE, task.variant)
        items = task.workspace.tables["items"].read(task.versions["items"]).sort_by("index")
        self.titles = distinct_titles(items["title"].to_pylist(), items["item_id"].to_pylist())
        values = chain.from_iterable(item_values(dict(pairs)) for pairs in items["attributes"].to_pylist())
        self.known = Titles(self.titles, values)
        self.contents = items["content_hash"].combine_chunks()

    @cached_property
    def recommender(self) -> Recommender:
        models = Models(self.task.workspace.store)
        folder = models.fetch(self.task.recommender, self.task.model_cache)
        return freeze(load_recommender(folder, users=models.users(self.task.recommender))[0])

    @cached_property
    def shown(self) -> PromptPieces:
        return self.task.system.build().shown(self.titles, self.recommender.item_states().detach().numpy())

    @cached_property
    def engine(self) -> Engine:
        # Built for the first pair that is to be explained, so that a night without changes loads no weights.
        task, models = self.task, Models(self.task.workspace.store)
        folders = {"adapter": str(models.fetch(task.adapter, task.model_cache))}
        if task.lm is not None:
            folders["lm"] = str(models.fetch(task.lm, task.model_cache))
        return task.engine.model_copy(update=folders).build()

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        state = self.rows(unit.index)
        due = self.due(state)
        results = self._explain(state, due.work, context)
        failed = [at for at, result in results.items() if result.reason]
        good = [at for at, result in results.items() if not result.reason]
        carried = self._carried_over(state.before, due, due.work.take(pa.array(good, pa.int64())))
        skipped = {**due.skipped, "capped": due.work.num_rows - len(results)}
        counts = Counts(due.pairs.num_rows, len(good), len(failed), skipped)
        staged: dict[str, Sequence[StagedFile]] = {}
        if results or carried.rows.num_rows < state.before.num_rows:
            context.journal([])
            staged = self._stage(state, carried.rows, due.work, results, context)
        usage = used(results.values()) + Usage(seconds=time.monotonic() - started)
        facts = {
            **self._figures(state, due.work, results),
            "stale": carried.stale,
            "reasons": {result.reason: result.message for result in results.values() if result.reason},
        }
        return Receipt(unit, counts, usage, staged, {TABLE: schema_hash(EXPLANATIONS.schema)}, facts, context.attempt)

    def rows(self, bucket: int) -> UserRows:
        task = self.task
        versions = task.versions["histories"], task.versions[TABLE]
        return UserRows(task.workspace, bucket, TABLE, task.variant, task.recipe, *versions, task.users)

    def due(self, state: UserRows) -> Due:
        """Which pairs of a bucket are to be explained, and which are left out."""
        task = self.task
        if task.pairs is not None:
            pairs = shown = task.pairs
        else:
            lists = task.workspace.tables["recommendations"].read(
                task.versions["recommendations"], ["user_id", "items"], variant=task.recommended, bucket=state.bucket
            )
            lists = lists.filter(pc.greater(pc.list_value_length(lists["items"]), 0))
            users, items = lists["user_id"].combine_chunks(), lists["items"].combine_chunks()
            pairs = pa.table({"user_id": users, "item_index": pc.list_element(items, 0)})
            shown = pa.table({"user_id": users.take(pc.list_parent_indices(items)), "item_index": items.flatten()})
        pairs = self._keyed(state, pairs)
        free, skipped = state.divide(pairs, self.blocked)
        warm = np.zeros(0, bool)
        if free.num_rows:  # A bucket without changes loads no recommender.
            known = state.histories.within(self.recommender.items)
            warm = (known.lengths[free["place"].to_numpy()] > 0) & (
                free["item_index"].to_numpy() <= self.recommender.items
            )
        return Due(pairs, shown, free.filter(pa.array(warm)), {**skipped, "cold": int((~warm).sum())})

    def _keyed(self, state: UserRows, pairs: pa.Table) -> pa.Table:
        """The pairs of the bucket's users, with the user's place in the bucket and the pair's change key.

        The key is of the history and of the item's words.
        """
        place = pc.index_in(pairs["user_id"], value_set=state.users)
        pairs = pairs.append_column("place", place).filter(
            pc.and_(pc.is_valid(place), pc.greater(pairs["item_index"], 0))
        )
        keys = pair_keys(state.change_keys.take(pairs["place"]), pairs["item_index"], self.contents)
        return pairs.append_column("change_key", keys).sort_by([("user_id", "ascending"), ("item_index", "ascending")])

    def _carried_over(self, before: pa.Table, due: Due, made: pa.Table) -> CarriedOver:
        """The published explanations that stay when the pairs `made` are explained anew.

        A user has one explanation of the first recommended item, or one of each pair of a file. An older one may be of
        an item that is not first any more, but not of one that is in no list: neither the deny list nor the
        availability of items is part of this recipe.
        """
        one_of = _users if self.task.pairs is None else _names
        shown = pc.is_in(_names(before), value_set=_names(due.shown))
        owners = pc.if_else(shown, one_of(before), None)
        return carry_over(before, owners, one_of(due.pairs), due.pairs["change_key"], one_of(made))

    def _explain(self, state: UserRows, work: pa.Table, context: UnitContext) -> dict[int, Explanation]:
        """Explain the pairs of `work`. The results are by row of `work`; a pair that the caps left out has none."""
        task = self.task
        return run_micro_batches(
            _names(work).to_pylist(),
            task.micro_batch,
            context,
            self.budget,
            read=lambda rows: work.take(pa.array(rows)),
            weigh=len,
            most=self._most,
            run=lambda pairs: explain(self.engine, self.asked(state, pairs), task.decoding, task.checks),
            rejected=lambda row, reason, message: Explanation(reason=reason, message=message),
        )

    def _most(self, pairs: int) -> Usage:
        """An upper bound of what so many pairs take.

        It is a decision each, and as many tries at the words as the checks allow.
        """
        calls = pairs * (2 + self.task.checks.retries)
        return Usage(calls, calls * self.engine.context, calls * self.task.decoding.most_written)

    @torch.no_grad()
    def asked(self, state: UserRows, work: pa.Table) -> list[ExplanationRequest]:
        """The requests to the engine for pairs of a bucket whose users and items the recommender knows."""
        task, model = self.task, self.recommender
        known = state.histories.within(model.items)
        places = work["place"].to_numpy()
        states = np.zeros((len(places), model.width), np.float32)
        histories = known.take(known.starts[places], known.lengths[places])
        for block in batches_by_length(histories, model.max_length):
            states[block] = model.encode(sequences_of(histories, block, model.max_length)).float().numpy()
        pairs = zip(places.tolist(), states, work["item_index"].to_pylist(), strict=True)
        return [
            self.shown.request(_items(known, place), own, item, task.system.prompts, task.focus)
            for place, own, item in pairs
        ]

    def _stage(
        self, state: UserRows, carried: pa.Table, work: pa.Table, results: dict[int, Explanation], context: UnitContext
    ) -> dict[str, Sequence[StagedFile]]:
        task = self.task
        good = [at for at, result in results.items() if not result.reason]
        rows = work.take(pa.array(good, pa.int64()))
        fresh = pa.table(
            [
                rows["user_id"],
                rows["item_index"],
                pa.array([results[at].decision for at in good], pa.string()),
                pa.array([results[at].text for at in good], pa.string()),
                rows["change_key"],
            ],
            schema=EXPLANATIONS.columns,
        )
        table = output_table(task.workspace, TABLE, task.scope, context.run.run_key)
        order = [("user_id", "ascending"), ("item_index", "ascending")]
        partition: dict[str, str | int] = {"variant": task.variant, "bucket": state.bucket}
        whole = pa.concat_tables([carried, fresh]).sort_by(order)
        staged: dict[str, Sequence[StagedFile]] = {TABLE: [table.stage(whole, context.file_name(), partition)]}
        failed = [at for at, result in results.items() if result.reason]
        if failed:
            rows = work.take(pa.array(failed, pa.int64()))
            staged["rejects"] = stage_rejected(
                task.workspace,
                task.scope,
                context,
                TABLE,
                task.variant,
                rows["user_id"].to_pylist(),
                [(results[at].reason, results[at].message) for at in failed],
                rows["change_key"].to_pylist(),
                _names(rows).to_pylist(),
                rows["item_index"].to_pylist(),
            )
        return staged

    def _figures(self, state: UserRows, work: pa.Table, results: dict[int, Explanation]) -> dict[str, int]:
        good = {at: result for at, result in results.items() if not result.reason}
        places, items = work["place"].to_numpy(), work["item_index"].to_numpy()
        found = []
        for at, result in good.items():
            history = {self.titles[item - 1] for item in _items(state.histories, int(places[at]))}
            found.append(self.known.unfounded(result.text, history, self.titles[int(items[at]) - 1]))
        yes = sum(result.decision == "yes" for result in good.values())
        contradicting = sum(contradicts(result.decision, result.text) for result in good.values())
        unchosen, made_up = sum(bool(one.unchosen) for one in found), sum(bool(one.made_up) for one in found)
        return dict(zip(FIGURES, (len(good), yes, contradicting, unchosen, made_up), strict=True))


def pair_keys(user_keys: pa.ChunkedArray, items: pa.ChunkedArray, contents: pa.Array) -> pa.ChunkedArray:
    """The change keys of pairs: the user's change key, the item's index and the hash of its words.

    `contents` are the hashes of all items' words.
    """
    content = contents.take(pc.subtract(items, 1))
    return pc.binary_join_element_wise(user_keys, pc.cast(items, pa.string()), content, "-")


def _users(rows: pa.Table) -> pa.Array:
    return rows["user_id"].combine_chunks()


def _names(pairs: pa.Table) -> pa.Array:
    """The names of pairs in the journal."""
    items = pc.cast(pairs["item_index"], pa.string())
    return pc.binary_join_element_wise(pairs["user_id"], items, " ").combine_chunks()


def _items(histories: Histories, place: int) -> list[int]:
    return histories.items[histories.starts[place] : histories.ends[place]].tolist()
