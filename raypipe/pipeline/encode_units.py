"""The unit work of `extract` and `recommend`: one user bucket through a recommender, in micro-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.pipeline.rejects import WORKER_DIED, blocked_users, stage_rejected
from raypipe.pipeline.user_rows import UserRows
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import Filters, top_k
from raypipe.recommenders.windows import Histories, stretches
from raypipe.runtime.session import output_table
from raypipe.runtime.units import UnitContext
from raypipe.storage.fingerprint import schema_hash
from raypipe.storage.ledger import MAX_DEATHS, Counts, Receipt, Unit, Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace


class Reader(Protocol):
    """A model that reads histories: the items it knows, the last events it reads, and a tensor that lies where it computes."""

    @property
    def items(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def table(self) -> Tensor: ...


class Loads(Protocol):
    """Picklable; makes a model of its checkpoint, on a worker."""

    def __call__(self, folder: Path, device: str) -> Reader: ...


def load_reader(folder: Path, device: str) -> Recommender:
    """A recommender; implements `Loads`."""
    return load_recommender(folder, device)[0]


@dataclass(frozen=True)
class Made:
    """`rows` of users, and by the place of those who have none their reason and message."""

    rows: pa.Table
    failed: Mapping[int, tuple[str, str]] = field(default_factory=dict)


class Rows(Protocol):
    """What a job makes of users; columns of its table, `place` standing for the user."""

    def warm(self, model: Any, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]) -> Made:
        """Of the users at `places`, of whose histories `known` holds what the model has seen; one seed each."""
        ...

    def cold(self, places: NDArray[np.int64]) -> pa.Table | None:
        """Rows of users of whom the model knows nothing; None where there is nothing to say."""
        ...


@dataclass(frozen=True)
class EncodeTask:
    """What every unit of a run shares; small and picklable. `users` restricts it to a canary's."""

    workspace: Workspace
    scope: str
    output: str
    variant: str
    recipe: str
    versions: dict[str, int]
    model: Model
    rows: Rows
    load: Loads
    users: pa.Array | None
    micro_batch_positions: int
    model_cache: Path
    device: str


class EncodeBucket:
    """Computes the rows of one bucket's changed users and carries the others over.

    Items the model never saw are left out of a history. A user without any item it knows is cold: skipped, unless the
    job has rows for such users.
    """

    def __init__(self, task: EncodeTask) -> None:
        self.task = task
        self.blocked = blocked_users(task.workspace, task.versions["rejects"], task.output, task.variant)

    @cached_property
    def model(self) -> Reader:
        # Loaded at the first changed user: a night without changes loads no weights.
        models = Models(self.task.workspace.store)
        device = self.task.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.task.load(models.fetch(self.task.model, self.task.model_cache), device)

    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        started = time.monotonic()
        task = self.task
        state = UserRows(
            task.workspace,
            unit.index,
            task.output,
            task.variant,
            task.recipe,
            task.versions["histories"],
            task.versions[task.output],
            task.users,
        )
        keys = state.change_keys.to_pylist() if self.blocked else []
        names = state.users.to_pylist() if len(state.changed) else []
        work = np.array(
            [place for place in state.changed.tolist() if not keys or (names[place], keys[place]) not in self.blocked],
            np.int64,
        )
        made, failed, cold = self._rows(state, work, names, context)
        skipped = {
            "unchanged": len(state.users) - len(state.changed),
            "blocked": len(state.changed) - len(work),
            "cold": cold,
        }
        counts = Counts(len(state.users), len(work) - len(failed) - cold, len(failed), skipped)
        staged: dict[str, Sequence] = {}
        # Users of whom there is nothing to say stay changed for ever: they alone are no reason to write the others anew.
        if made or failed or state.kept.num_rows < state.before.num_rows:
            context.journal([])
            staged = self._stage(state, made, failed, context)
        schemas = {task.output: schema_hash(task.workspace.tables[task.output].spec.schema)}
        usage = Usage(0, 0, 0, time.monotonic() - started)
        return Receipt(unit, counts, usage, staged, schemas, {}, context.attempt)

    def _rows(
        self, state: UserRows, work: NDArray[np.int64], names: Sequence[str], context: UnitContext
    ) -> tuple[list[pa.Table], dict[int, tuple[str, str]], int]:
        """Tables of new rows, why users failed, by their places, and how many were skipped as cold."""
        if not len(work):
            return [], {}, 0
        known = state.histories.within(self.model.items)
        events = state.histories.offsets_within(self.model.items)
        is_warm = known.lengths[work] > 0
        made: list[pa.Table] = []
        failed: dict[int, tuple[str, str]] = {}
        for batch in self._batches(known, work[is_warm], names, context.deaths):
            if context.deaths.get(names[batch[0]], 0) >= MAX_DEATHS:
                failed |= dict.fromkeys(batch.tolist(), WORKER_DIED)
                continue
            context.journal([names[place] for place in batch])
            for block in self._blocks(known, batch):
                found = self.task.rows.warm(self.model, known, block, state.seeds[block])
                made.append(_at_events(found.rows, known.starts, events))
                failed |= found.failed
        cold = work[~is_warm]
        if len(cold) and (rows := self.task.rows.cold(cold)) is not None:
            return [*made, rows], failed, 0
        return made, failed, len(cold)

    def _batches(
        self, known: Histories, users: NDArray[np.int64], names: Sequence[str], suspects: Mapping[str, int]
    ) -> Iterator[NDArray[np.int64]]:
        """Users of like length together; suspects alone and last, so that a poison row costs its neighbours nothing."""
        alone = np.array([names[place] in suspects for place in users], bool)
        yield from batches_by_length(known, self.model.max_length, users[~alone], self.task.micro_batch_positions)
        for place in users[alone]:
            yield np.array([place])

    def _blocks(self, known: Histories, batch: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """A micro-batch as a GPU takes it, whole, or in the smaller batches that a CPU is fast at."""
        if self.model.table.is_cuda:
            return iter([batch])
        return batches_by_length(known, self.model.max_length, batch)

    def _stage(
        self, state: UserRows, made: list[pa.Table], failed: Mapping[int, tuple[str, str]], context: UnitContext
    ) -> dict[str, Sequence]:
        task = self.task
        spec = task.workspace.tables[task.output].spec
        fresh = [
            rows.set_column(0, "user_id", state.users.take(rows["place"]))
            .append_column("change_key", state.change_keys.take(rows["place"]))
            .select(spec.columns.names)
            .cast(spec.columns)
            for rows in made
        ]
        order = [(name, "ascending") for name in spec.key if name != "variant"]
        rows = pa.concat_tables([state.kept, *fresh]).sort_by(order)
        table = output_table(task.workspace, task.output, task.scope, context.run.run_key)
        partition: dict[str, str | int] = {"variant": task.variant, "bucket": state.bucket}
        staged: dict[str, Sequence] = {task.output: [table.stage(rows, context.file_name(), partition)]}
        if failed:
            places = pa.array(list(failed))
            staged["rejects"] = stage_rejected(
                task.workspace,
                task.scope,
                context,
                task.output,
                task.variant,
                state.users.take(places).to_pylist(),
                list(failed.values()),
                state.change_keys.take(places).to_pylist(),
            )
        return staged


def _at_events(rows: pa.Table, starts: NDArray[np.int64], events: NDArray[np.int64]) -> pa.Table:
    """Rows with a `position` among the events a model knows, `starts` [users] their first ones, at that among all events."""
    if "position" not in rows.column_names:
        return rows
    at = starts[rows["place"].to_numpy()] + rows["position"].to_numpy()
    return rows.set_column(rows.column_names.index("position"), "position", pa.array(events[at].astype(np.int32)))


@dataclass(frozen=True)
class States:
    """The state of every history (`last`), or of every prefix of it (`all`): after each event, and as if nothing had followed.

    With `queries`, what the model multiplies item vectors with instead: DreamRec's oracles. Those of a last position are
    the very ones that `recommend` ranks by.
    """

    positions: str
    queries: bool

    @torch.no_grad()
    def warm(self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]) -> Made:
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
        return Made(pa.table(columns))

    def cold(self, places: NDArray[np.int64]) -> None:
        return None


@dataclass(frozen=True)
class Recommendations:
    """The best k items of every history; to users of whom the model knows nothing, what is popular.

    `allowed` bool [items + 1] over the model's items; `popular` int32 [≤ k], what is recommended to these.
    """

    k: int
    filter_seen: bool
    allowed: NDArray[np.bool_]
    popular: NDArray[np.int32]

    @torch.no_grad()
    def warm(self, model: Recommender, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]) -> Made:
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
        return Made(pa.table(columns))

    def cold(self, places: NDArray[np.int64]) -> pa.Table:
        items = np.broadcast_to(self.popular, (len(places), len(self.popular)))
        # Scores of popularity and of a model cannot be compared.
        scores = np.full(items.shape, np.nan, np.float32)
        return pa.table({"place": pa.array(places), "items": list_column(items), "scores": list_column(scores)})


def list_column(values: NDArray) -> pa.ListArray:
    """[rows, width] as a list column, without copying row by row."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))
