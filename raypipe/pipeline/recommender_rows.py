"""The rows that a recommender makes of users: their states, or the items it ranks first for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raypipe.pipeline.encode_units import Made, list_column
from raypipe.pipeline.rejects import WORKER_DIED
from raypipe.pipeline.user_rows import UserRows
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import Filters, top_k
from raypipe.recommenders.windows import Histories, stretches
from raypipe.runtime.budget import Budget
from raypipe.runtime.units import UnitContext
from raypipe.storage.ledger import MAX_DEATHS, Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace


class Rows(Protocol):
    """Makes the rows of users for a job: the columns of its table, with the user's `place` instead of the id."""

    def warm(
        self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]
    ) -> pa.Table:
        """The rows of the users at `places`.

        `known` holds the part of histories that the model has seen, and `seeds` has one for each of these users.
        """
        ...

    def cold(self, places: NDArray[np.int64]) -> pa.Table | None:
        """The rows of users unknown to the model; None if they get none."""
        ...


@dataclass(frozen=True)
class ByRecommender:
    """Makes `rows` by the stored recommender `model`; implements `Makes`.

    Items the model never saw are left out of a history. A user without any item that it knows is cold, and is skipped
    unless there are rows for such users.
    """

    workspace: Workspace
    model: Model
    rows: Rows
    micro_batch_positions: int
    model_cache: Path
    device: str

    @cached_property
    def recommender(self) -> Recommender:
        # Loaded for the first changed user, so that a night without changes loads no weights.
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        models = Models(self.workspace.store)
        return load_recommender(models.fetch(self.model, self.model_cache), device, models.users(self.model))[0]

    def make(
        self, state: UserRows, work: NDArray[np.int64], names: Sequence[str], context: UnitContext, budget: Budget
    ) -> Made:
        known = state.histories.within(self.recommender.items)
        events = state.histories.offsets_within(self.recommender.items)
        is_warm = known.lengths[work] > 0
        made: list[pa.Table] = []
        failed: dict[int, tuple[str, str]] = {}
        left = int(is_warm.sum())
        for batch in self._batches(known, work[is_warm], names, context.deaths):
            # A recommender costs no calls, so only the deadline can refuse.
            if not budget.take(Usage()):
                break
            left -= len(batch)
            if context.deaths.get(names[batch[0]], 0) >= MAX_DEATHS:
                failed |= dict.fromkeys(batch.tolist(), WORKER_DIED)
                continue
            context.journal([names[place] for place in batch])
            for block in self._blocks(known, batch):
                rows = self.rows.warm(self.recommender, known, block, state.seeds[block])
                made.append(_at_events(rows, known.starts, events))
        cold = work[~is_warm]
        skipped = {"cold": len(cold), "capped": left}
        if len(cold) and (rows_of_cold := self.rows.cold(cold)) is not None:
            made.append(rows_of_cold)
            skipped["cold"] = 0
        return Made(made, failed, skipped)

    def _batches(
        self, known: Histories, users: NDArray[np.int64], names: Sequence[str], suspects: Mapping[str, int]
    ) -> Iterator[NDArray[np.int64]]:
        """Batches of users of like length. Before them come suspects, each alone.

        The suspects that died most often come first, as a death costs what was computed before it.
        """
        alone = np.array([names[place] in suspects for place in users], bool)
        for place in sorted(users[alone].tolist(), key=lambda place: -suspects[names[place]]):
            yield np.array([place])
        yield from batches_by_length(known, self.recommender.max_length, users[~alone], self.micro_batch_positions)

    def _blocks(self, known: Histories, batch: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The batches that a micro-batch is computed in: one for a GPU, or the smaller ones that a CPU is fast at."""
        if self.recommender.table.is_cuda:
            return iter([batch])
        return batches_by_length(known, self.recommender.max_length, batch)


def _at_events(rows: pa.Table, starts: NDArray[np.int64], events: NDArray[np.int64]) -> pa.Table:
    """`rows` with each `position`, which counts the events that the model knows, counted among all events instead.

    `starts` [users] are the users' first known events; `events` has the place of each known event in its whole history.
    Rows without a `position` stay as they are.
    """
    if "position" not in rows.column_names:
        return rows
    at = starts[rows["place"].to_numpy()] + rows["position"].to_numpy()
    return rows.set_column(rows.column_names.index("position"), "position", pa.array(events[at].astype(np.int32)))


@dataclass(frozen=True)
class States:
    """Makes the state of every history (`last`), or of every prefix of it (`all`).

    A prefix's state is that after its last event, as if nothing had followed. With `queries` it makes what the model
    multiplies item vectors with instead: DreamRec's oracles. Those of a last position are the very ones that
    `recommend` ranks by.
    """

    positions: str
    queries: bool

    @torch.no_grad()
    def warm(
        self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]
    ) -> pa.Table:
        device = model.table.device
        lengths = known.lengths[places]
        if self.positions == "last":
            states, owners, at = (
                model.encode(sequences_of(known, places, model.max_length).to(device)),
                places,
                lengths - 1,
            )
        else:
            owners, at = np.repeat(places, lengths), stretches(np.zeros_like(lengths), lengths)
            states = torch.from_numpy(prefix_states(model, known, owners, at + 1)).to(device)
            seeds = np.repeat(seeds, lengths) ^ (np.repeat(lengths, lengths) - 1 - at)
        if self.queries:
            states = model.queries(states, torch.from_numpy(seeds).to(device))
        columns = {
            "place": pa.array(owners),
            "position": pa.array(at.astype(np.int32)),
            "state": list_column(states.float().cpu().numpy()),
        }
        return pa.table(columns)

    def cold(self, places: NDArray[np.int64]) -> None:
        return None


@dataclass(frozen=True)
class Recommendations:
    """Makes lists of the best k items of every history. Users unknown to the model get what is popular.

    `allowed` is bool [items + 1] over the model's items; `popular` int32 [≤ k] is what those users get.
    """

    k: int
    filter_seen: bool
    allowed: NDArray[np.bool_]
    popular: NDArray[np.int32]

    @torch.no_grad()
    def warm(
        self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]
    ) -> pa.Table:
        device = model.table.device
        states = model.encode(sequences_of(known, places, model.max_length).to(device))
        seen = sequences_of(known, places).to(device) if self.filter_seen else None
        allowed = torch.from_numpy(self.allowed).to(device)
        queries = model.queries(states, torch.from_numpy(seeds).to(device))
        items, scores = top_k(queries, model.item_states(), self.k, Filters(allowed, seen))
        columns = {
            "place": pa.array(places),
            "items": list_column(items.cpu().numpy().astype(np.int32)),
            "scores": list_column(scores.cpu().numpy()),
        }
        return pa.table(columns)

    def cold(self, places: NDArray[np.int64]) -> pa.Table:
        items = np.broadcast_to(self.popular, (len(places), len(self.popular)))
        # Scores of popularity and of a model cannot be compared.
        scores = np.full(items.shape, np.nan, np.float32)
        return pa.table({"place": pa.array(places), "items": list_column(items), "scores": list_column(scores)})
