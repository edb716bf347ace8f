"""The unit work of `rerank`: put the lists of one user bucket in order by a language model, in micro-batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.data.candidates import CandidateSets
from raypipe.engines.engine import Engine, EngineConfig
from raypipe.language.backbone import PromptTokenizer, load_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.pipeline.micro_batches import run_micro_batches, used
from raypipe.pipeline.rejects import blocked_users, stage_rejected
from raypipe.pipeline.sequences import catalogue_of
from raypipe.pipeline.user_rows import UserRows, carry_over
from raypipe.recommenders.windows import Histories
from raypipe.runtime.budget import Budget
from raypipe.runtime.publishing import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.change_keys import RECIPE_DIGITS, recipes_of
from raypipe.storage.fingerprint import fingerprint, schema_hash
from raypipe.storage.hashing import stable_hash
from raypipe.storage.ledger import Counts, Receipt, Unit, Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.schemas import RECOMMENDATIONS
from raypipe.storage.tables import StagedFile
from raypipe.storage.workspace import Workspace
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.trsr import Trsr, TrsrConfig, best_first
from raypipe.systems.trsr_past import Past, PastSummaries

TABLE = "recommendations"


@dataclass(frozen=True)
class RerankTask:
    """What every unit of a run shares; small and picklable.

    `lists` is a variant of `recommendations` at `lists_version`. `summaries` is a variant of `summaries`, None for
    none.
    """

    workspace: Workspace
    scope: str
    variant: str
    recipe: str
    versions: dict[str, int]
    lists: str
    lists_version: int
    summaries: str | None
    ranker: Model
    lm: Model | None
    engine: EngineConfig
    options: TrsrConfig
    users: pa.Array | None
    micro_batch: int
    model_cache: Path


@dataclass(frozen=True)
class _Ranked:
    """A list in order, `items` and `scores` [k] each, or the reason why there is none; in both cases what it took.

    Implements `Result`.
    """

    items: NDArray[np.int32]
    scores: NDArray[np.float64]
    reason: str
    message: str
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class RerankBucket:
    """Puts the lists of one bucket's changed users in order and carries over those of the others."""

    def __init__(self, task: RerankTask, budget: Budget) -> None:
        self.task, self.budget = task, budget
        self.blocked = blocked_users(task.workspace, task.versions["rejects"], TABLE, task.variant)

    @cached_property
    def engine(self) -> Engine:
        # Built for the first user there is work for, so that a night without changes loads no weights.
        folders = {"adapter": str(self._fetch(self.task.ranker))}
        if self.task.lm is not None:
            folders["lm"] = str(self._fetch(self.task.lm))
        return self.task.engine.model_copy(update=folders).build()

    @cached_property
    def _items(self) -> pa.Table:
        return self.task.workspace.tables["items"].read(self.task.versions["items"]).sort_by("index")

    @cached_property
    def catalogue(self) -> Catalogue:
        return catalogue_of(self._items)

    @cached_property
    def contents(self) -> pa.Array:
        """The hash of each item's words."""
        return self._items["content_hash"].combine_chunks()

    @cached_property
    def facts(self) -> Facts | None:
        """The facts about candidates that the model was taught by; None if it was taught by none."""
        task = self.task
        return Facts.load(self._fetch(task.ranker), len(self.catalogue.titles)) if task.options.facts else None

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        task = self.task
        versions = task.versions["histories"], task.versions[TABLE]
        state = UserRows(task.workspace, unit.index, TABLE, task.variant, task.recipe, *versions, task.users)
        rows = self._rows(state)
        work, skipped = state.divide(rows, self.blocked)
        work = work.combine_chunks()
        ranked = self._rank(state, work, context)
        failed = [at for at, mine in ranked.items() if mine.reason]
        good = [at for at, mine in ranked.items() if not mine.reason]
        before, made = state.before, work["user_id"].take(pa.array(good, pa.int64()))
        carried = carry_over(before, before["user_id"], rows["user_id"], rows["change_key"], made)
        skipped |= {"capped": work.num_rows - len(ranked), "unlisted": len(state.users) - rows.num_rows}
        counts = Counts(len(state.users), len(good), len(failed), skipped)
        staged: dict[str, Sequence[StagedFile]] = {}
        if ranked or carried.rows.num_rows < before.num_rows:
            context.journal([])
            staged = self._stage(state, carried.rows, work, ranked, context)
        usage = used(ranked.values()) + Usage(seconds=time.monotonic() - started)
        firsts = [work["items"][at][0].as_py() != mine.items[0] for at, mine in ranked.items() if not mine.reason]
        reasons = {mine.reason: mine.message for mine in ranked.values() if mine.reason}
        facts = {"first_moved": int(sum(firsts)), "stale": carried.stale, "reasons": reasons}
        return Receipt(
            unit, counts, usage, staged, {TABLE: schema_hash(RECOMMENDATIONS.schema)}, facts, context.attempt
        )

    def _rows(self, state: UserRows) -> pa.Table:
        """The rows of users with a list: user_id, items, summary, place among the bucket's users, and change_key.

        The key is of the history, the list, the words of its items, and the summary. The recipe that it begins with
        also covers the recipes of lists and summaries: an older list in order may hold what the deny list of a newer
        recipe denies.
        """
        task, tables = self.task, self.task.workspace.tables
        lists = tables[TABLE].read(
            task.lists_version, ["user_id", "items", "change_key"], variant=task.lists, bucket=state.bucket
        )
        recipes = {"rerank": task.recipe, "lists": _distinct_recipes(lists)}
        lists = lists.set_column(1, "items", without_padding(lists["items"].combine_chunks()))
        places = pc.index_in(lists["user_id"], value_set=state.users)
        lists = lists.append_column("place", places)
        lists = lists.filter(pc.and_(pc.is_valid(places), pc.greater(pc.list_value_length(lists["items"]), 0)))
        summary, summary_key = pa.nulls(lists.num_rows, pa.string()), pa.repeat("", lists.num_rows)
        if task.summaries is not None:
            columns = ["user_id", "summary", "change_key"]
            told = tables["summaries"].read(
                task.versions["summaries"], columns, variant=task.summaries, bucket=state.bucket
            )
            recipes["summaries"] = _distinct_recipes(told)
            at = pc.index_in(lists["user_id"], value_set=told["user_id"].combine_chunks())
            summary, summary_key = told["summary"].take(at), pc.fill_null(told["change_key"].take(at), "")
        listed = lists["items"].combine_chunks()
        words = self.contents.take(pc.subtract(listed.flatten(), 1))
        words = pc.binary_join(pa.ListArray.from_arrays(_offsets(pc.list_value_length(listed)), words), "")
        shown = pc.binary_join_element_wise(lists["change_key"], summary_key, words, "-")
        hashes = [f"{value:016x}" for value in stable_hash(pa.array(shown.to_pylist(), pa.string())).tolist()]
        histories = state.change_keys.take(lists["place"])
        recipe = fingerprint(recipes)[:RECIPE_DIGITS]
        keys = pc.binary_join_element_wise(recipe, histories, pa.array(hashes, pa.string()), "-")
        return pa.table(
            {
                "user_id": lists["user_id"],
                "items": lists["items"],
                "summary": summary,
                "place": lists["place"],
                "change_key": keys,
            }
        ).sort_by("user_id")

    def _rank(self, state: UserRows, work: pa.Table, context: UnitContext) -> dict[int, _Ranked]:
        """Put the lists of `work` in order. The results are by row of `work`; a row that the caps left out has none."""
        lengths = pc.list_value_length(work["items"]).to_pylist()
        ranker = cache(partial(self._ranker, state, work))
        return run_micro_batches(
            work["user_id"].to_pylist(),
            self.task.micro_batch,
            context,
            self.budget,
            read=lambda rows: work.take(pa.array(rows)),
            weigh=lambda lists: pc.sum(pc.list_value_length(lists["items"])).as_py(),
            most=lambda calls: Usage(calls, calls * self.engine.context),
            run=lambda lists: self._ordered(ranker(), lists),
            rejected=lambda row, *why: _Ranked(np.zeros(0, np.int32), np.zeros(0), *why),
            alike=lengths.__getitem__,
        )

    def _ranker(self, state: UserRows, work: pa.Table) -> Trsr:
        """A ranker that knows the bucket's histories, and the summaries of the users in `work`."""
        told = zip(work["place"].to_pylist(), work["summary"].to_pylist(), strict=True)
        summaries = PastSummaries({row: [(0, text)] for row, text in told if text is not None})
        return self._of_nobody.of(state.histories, summaries)

    @cached_property
    def _of_nobody(self) -> Trsr:
        """A ranker that knows no users, made once for all buckets.

        It holds what is made of the catalogue, such as the token count of every line.
        """
        past = Past(Histories(np.zeros(0, np.int32), np.zeros(0, np.int64)), np.zeros(0, bool), self.catalogue)
        return Trsr(self.task.options, past, self._tokenizer, self.engine.context, self.facts)

    def _ordered(self, trsr: Trsr, work: pa.Table) -> list[_Ranked]:
        """Put the lists of the users in `work` in order. All of these lists have the same length."""
        rows = work["place"].to_numpy().astype(np.int64)
        items = np.array(work["items"].to_pylist(), np.int32)
        sets = CandidateSets(rows, items, np.zeros(len(rows), np.int64))
        found: list[_Ranked] = []
        for scored in trsr.scores(self.engine, rows, sets):
            order = best_first(scored.yes)
            columns = (items[scored.part], scored.yes, order, scored.tokens.tolist())
            for at, (mine, yes, best, tokens) in enumerate(zip(*columns, strict=True)):
                error = scored.errors.get(at)
                why = ("", "") if error is None else (error.kind, f"About one of the list's items: {error.message}")
                found.append(_Ranked(mine[best], yes[best], *why, len(mine), tokens))
        return found

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        lm = str(self._fetch(self.task.lm)) if self.task.lm is not None else str(self.task.engine.lm)
        return load_tokenizer(lm)

    def _stage(
        self, state: UserRows, carried: pa.Table, work: pa.Table, ranked: Mapping[int, _Ranked], context: UnitContext
    ) -> dict[str, Sequence[StagedFile]]:
        task = self.task
        good = [at for at, mine in ranked.items() if not mine.reason]
        rows = work.take(pa.array(good, pa.int64()))
        fresh = pa.table(
            [
                rows["user_id"],
                pa.array([ranked[at].items.tolist() for at in good], pa.list_(pa.int32())),
                pa.array([ranked[at].scores.tolist() for at in good], pa.list_(pa.float32())),
                rows["change_key"],
            ],
            schema=RECOMMENDATIONS.columns,
        )
        table = output_table(task.workspace, TABLE, task.scope, context.run.run_key)
        partition: dict[str, str | int] = {"variant": task.variant, "bucket": state.bucket}
        whole = pa.concat_tables([carried, fresh]).sort_by("user_id")
        staged: dict[str, Sequence[StagedFile]] = {TABLE: [table.stage(whole, context.file_name(), partition)]}
        if failed := [at for at, mine in ranked.items() if mine.reason]:
            rows = work.take(pa.array(failed, pa.int64()))
            staged["rejects"] = stage_rejected(
                task.workspace,
                task.scope,
                context,
                TABLE,
                task.variant,
                rows["user_id"].to_pylist(),
                [(ranked[at].reason, ranked[at].message) for at in failed],
                rows["change_key"].to_pylist(),
            )
        return staged

    def _fetch(self, model: Model) -> Path:
        return Models(self.task.workspace.store).fetch(model, self.task.model_cache)


def without_padding(lists: pa.ListArray) -> pa.ListArray:
    """The lists without the item 0 that pads short ones."""
    items = lists.flatten()
    there = pc.greater(items, 0)
    owners = pc.list_parent_indices(lists).filter(there)
    lengths = np.bincount(owners.to_numpy(), minlength=len(lists))
    return pa.ListArray.from_arrays(_offsets(pa.array(lengths)), items.filter(there))


def _distinct_recipes(rows: pa.Table) -> list[str]:
    """The recipes of rows. All rows of one variant in a bucket are of one recipe."""
    return sorted(pc.unique(recipes_of(rows["change_key"])).to_pylist())


def _offsets(lengths: pa.Array) -> pa.Array:
    """Where each list begins among the values of all lists of these lengths, and where the last one ends."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths.to_numpy())]).astype(np.int32))
