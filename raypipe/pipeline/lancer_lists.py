"""Lists that LANCER writes, for `recommend`: its model on a worker, and the rows it makes of a bucket's users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from raypipe.errors import UsageError
from raypipe.language.catalogue import Catalogue
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.pipeline.encode_units import Made, list_column
from raypipe.pipeline.sequences import catalogue_of
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import ModelCache
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.lancer_lists import ListWriter, load_writer, stored_config


@dataclass(frozen=True)
class Writer:
    """A loaded model; implements `Reader`."""

    lists: ListWriter

    @property
    def items(self) -> int:
        return len(self.lists.lancer.lines)

    @property
    def max_length(self) -> int:
        config = self.lists.lancer.config
        return max(config.shown, config.reads)

    @property
    def table(self) -> Tensor:
        return self.lists.grounding.table


@dataclass(frozen=True)
class LoadsWriter:
    """Makes a writer of an adapter and its language model, `lm_model` of the workspace or the hub's `lm`; implements `Loads`."""

    workspace: Workspace
    lm_model: Model | None
    lm: str
    lm_hash: str
    options: LancerConfig
    catalogue: Catalogue
    answer_tokens: int
    cache: Path

    def __call__(self, folder: Path, device: str) -> Writer:
        stored, models = self.lm_model, Models(self.workspace.store)
        lm = resolve_checkpoint(self.lm) if stored is None else models.fetch(stored, self.cache)
        return Writer(load_writer(self.options, self.catalogue, str(lm), folder, self.answer_tokens, device))


def writer_of(
    config: ModelCache, workspace: Workspace, model: Model, items: pa.Table, answer_tokens: int
) -> LoadsWriter:
    """Of the stored `model` and the catalogue `items`. Raises UsageError where its language model is not there any more."""
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
    return LoadsWriter(workspace, lm_model, path, content, options, catalogue, answer_tokens, cache)


@dataclass(frozen=True)
class WrittenLists:
    """The first k items that are written for a history; implements `Rows`. Where fewer are, the rest is item 0 with −∞, and
    for whom the language model writes nothing there is no row.

    `allowed` bool [items + 1]. A score is the log-probability of the line that was taken for the item.
    """

    k: int
    filter_seen: bool
    allowed: NDArray[np.bool_]

    def warm(self, model: Writer, known: Histories, places: NDArray[np.int64], seeds: NDArray[np.int64]) -> Made:
        mine = known.take(known.starts[places], known.lengths[places])
        histories = [items.tolist() for items in np.split(mine.items, mine.ends[:-1])]
        written = model.lists.lists(histories, filter_seen=self.filter_seen)
        items = np.zeros((len(places), self.k), np.int32)
        scores = np.full((len(places), self.k), -np.inf, np.float32)
        for row, (found, logprobs) in enumerate(zip(written.items, written.logprobs, strict=True)):
            kept = [place for place, item in enumerate(found) if self.allowed[item]][: self.k]
            items[row, : len(kept)] = [found[place] for place in kept]
            scores[row, : len(kept)] = [logprobs[place] for place in kept]
        good = np.array([error is None for error in written.errors], bool)
        columns = {
            "place": pa.array(places[good]),
            "items": list_column(items[good]),
            "scores": list_column(scores[good]),
        }
        pairs = zip(places.tolist(), written.errors, strict=True)
        return Made(
            pa.table(columns), {place: (error.kind, error.message) for place, error in pairs if error is not None}
        )

    def cold(self, places: NDArray[np.int64]) -> None:
        return None
