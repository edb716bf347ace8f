"""Lists that LANCER writes, for `recommend`: loading its model on a worker, and making the rows of a bucket's users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypipe.errors import UsageError
from raypipe.language.catalogue import Catalogue
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.pipeline.encode_units import Made, list_column
from raypipe.pipeline.micro_batches import run_micro_batches, used
from raypipe.pipeline.sequences import catalogue_of
from raypipe.pipeline.user_rows import UserRows
from raypipe.recommenders.windows import Histories
from raypipe.runtime.budget import Budget
from raypipe.runtime.job import ModelCache
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import Usage
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.lancer_lists import ListWriter, load_writer, stored_config


@dataclass(frozen=True)
class LoadsWriter:
    """Loads a writer from the stored `adapter` and its language model; picklable.

    The language model is `lm_model` of the workspace, or else the checkpoint `lm`.
    """

    workspace: Workspace
    adapter: Model
    lm_model: Model | None
    lm: str
    lm_hash: str
    options: LancerConfig
    catalogue: Catalogue
    answer_tokens: int
    cache: Path

    @classmethod
    def of(
        cls, config: ModelCache, workspace: Workspace, model: Model, items: pa.Table, answer_tokens: int
    ) -> LoadsWriter:
        """Resolve the stored `model` over the catalogue `items`.

        Raises UsageError if its language model is not there any more.
        """
        catalogue = catalogue_of(items)
        options = stored_config(model.name, model.lineage)
        named, path = model.lineage["lm_model"], model.lineage["lm_path"]
        lm_model = find_model(Models(workspace.store), named) if named else None
        lm = config.fetch(workspace, lm_model) if lm_model is not None else resolve_checkpoint(path)
        if (content := checkpoint_hash(lm)) != model.lineage["lm"]:
            raise UsageError(
                f"What lies in {lm} is not the language model that {model.name}/{model.hash[:12]} was trained beside.",
                "Restore it, or train again with `raypipe align --system lancer`.",
            )
        cache = Path(config.model_cache)
        return cls(workspace, model, lm_model, path, content, options, catalogue, answer_tokens, cache)

    def load(self, device: str) -> ListWriter:
        models = Models(self.workspace.store)
        lm = resolve_checkpoint(self.lm) if self.lm_model is None else models.fetch(self.lm_model, self.cache)
        adapter = models.fetch(self.adapter, self.cache)
        return load_writer(self.options, self.catalogue, str(lm), adapter, self.answer_tokens, device)


@dataclass(frozen=True)
class _Written:
    """A user's list, `items` and `scores` [≤ k] each, best first, or the reason why there is none.

    In both cases it has what it took. Implements `Result`.
    """

    items: Sequence[int] = ()
    scores: Sequence[float] = ()
    reason: str = ""
    message: str = ""
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class ByWriter:
    """Makes lists of the first k allowed items that the language model writes for a history; implements `Makes`.

    A list of fewer items is filled up with item 0 and score −∞. A user is rejected, and has no row, if the engine
    returns an error. `allowed` is bool [items + 1]. A score is the log-probability of the line that was taken for the
    item. A user without any item of the catalogue is cold.
    """

    loads: LoadsWriter
    device: str
    k: int
    filter_seen: bool
    allowed: NDArray[np.bool_]
    micro_batch: int

    @cached_property
    def writer(self) -> ListWriter:
        # Loaded for the first changed user, so that a night without changes loads no weights.
        return self.loads.load(self.device)

    def make(
        self, state: UserRows, work: NDArray[np.int64], names: Sequence[str], context: UnitContext, budget: Budget
    ) -> Made:
        known = state.histories.within(len(self.loads.catalogue.titles))
        warm = work[known.lengths[work] > 0]
        written = run_micro_batches(
            [names[place] for place in warm],
            self.micro_batch,
            context,
            budget,
            read=lambda rows: known.take(known.starts[warm[rows]], known.lengths[warm[rows]]),
            weigh=lambda histories: len(histories.lengths),
            most=self._most,
            run=self._lists,
            rejected=lambda row, *why: _Written((), (), *why),
        )
        good = {row: mine for row, mine in written.items() if not mine.reason}
        failed = {int(warm[row]): (mine.reason, mine.message) for row, mine in written.items() if mine.reason}
        skipped = {"cold": len(work) - len(warm), "capped": len(warm) - len(written)}
        return Made([self._table(warm, good)] if good else [], failed, skipped, used(written.values()))

    def _most(self, users: int) -> Usage:
        lines = users * self.loads.options.beams
        return Usage(users, users * self.writer.engine.context, lines * self.writer.answer_tokens)

    def _lists(self, histories: Histories) -> list[_Written]:
        asked = [items.tolist() for items in np.split(histories.items, histories.ends[:-1])]
        lists = self.writer.lists(asked, filter_seen=self.filter_seen)
        found = []
        for items, logprobs, outcome in zip(lists.items, lists.logprobs, lists.outcomes, strict=True):
            kept = [place for place, item in enumerate(items) if self.allowed[item]][: self.k]
            why = ("", "") if outcome.error is None else (outcome.error.kind, outcome.error.message)
            spent = outcome.calls, outcome.tokens_in, outcome.tokens_out
            found.append(_Written([items[at] for at in kept], [logprobs[at] for at in kept], *why, *spent))
        return found

    def _table(self, warm: NDArray[np.int64], good: Mapping[int, _Written]) -> pa.Table:
        items = np.zeros((len(good), self.k), np.int32)
        scores = np.full((len(good), self.k), -np.inf, np.float32)
        for row, mine in enumerate(good.values()):
            items[row, : len(mine.items)], scores[row, : len(mine.items)] = mine.items, mine.scores
        places = pa.array(warm[list(good)])
        return pa.table({"place": places, "items": list_column(items), "scores": list_column(scores)})
