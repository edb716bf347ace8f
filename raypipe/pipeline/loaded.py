"""Stored recommenders and language models, resolved by name.

Recommenders are checked against the workspace's catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.pipeline.sequences import pinned_versions
from raypipe.recommenders.checkpoint import Card, check_catalogue, load_recommender
from raypipe.recommenders.recommender import Recommender
from raypipe.runtime.job import ModelCache
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace

BUILTIN = "builtin"
"""Names the workspace's own language model, the newest; BUILTIN/HASH names one of several."""


@dataclass(frozen=True)
class Loaded:
    """A stored recommender, with its card and the catalogue it works on, in order of index."""

    model: Model
    recommender: Recommender
    card: Card
    items: pa.Table

    @classmethod
    def of(cls, config: ModelCache, workspace: Workspace, named: str) -> Loaded:
        """Load the recommender `named` as for `find_model`.

        Raises UsageError for a model that is not there, is no recommender or knows other items.
        """
        version = pinned_versions(workspace)["items"]
        model = find_model(Models(workspace.store), named)
        if model.lineage["job"] == "align":
            raise UsageError(
                f"The model {named} is an adapter that `raypipe align` made, and no recommender.",
                f"`raypipe align --system {model.lineage['system']} --adapter {named}` measures it; what is named here is made by "
                "`raypipe train`.",
            )
        users = Models(workspace.store).users(model)
        recommender, card = load_recommender(config.fetch(workspace, model), users=users)
        items = workspace.tables["items"].read(version).sort_by("index")
        check_catalogue(card.catalogue, items["item_id"].to_pylist(), named)
        return cls(model, recommender, card, items)


def is_builtin(named: str) -> bool:
    """Whether `builtin`, or `builtin/HASH`, is named."""
    return named.partition("/")[0] == BUILTIN


def find_builtin_lm(workspace: Workspace, option: str, named: str = BUILTIN) -> Model:
    """The workspace's own language model, the newest or that of `builtin/HASH`.

    Raises UsageError if there is none. The message tells to name another one with `option`.
    """
    _, _, content = named.partition("/")
    found = [model for model in Models(workspace.store).all("lm") if model.hash.startswith(content)]
    if not found:
        such = f" {content}" if content else ""
        raise UsageError(
            f"The workspace {workspace.uri} has no language model{such} of its own yet.",
            f"Run `raypipe lm` first, or name another with {option} PATH_OR_NAME.",
        )
    return found[-1]


@dataclass(frozen=True)
class ChosenLm:
    """The language model beside which something is trained: the folder of its checkpoint, and its content hash.

    `own` is the workspace's model if the language model is one of its own.
    """

    folder: Path
    hash: str
    own: Model | None

    @classmethod
    def of(cls, config: ModelCache, workspace: Workspace, named: str) -> ChosenLm:
        """Resolve what --lm names: `builtin`, `builtin/HASH`, a folder or a hub name.

        Raises UsageError if there is no such model.
        """
        own = find_builtin_lm(workspace, "--lm", named) if is_builtin(named) else None
        folder = resolve_checkpoint(named) if own is None else config.fetch(workspace, own)
        return cls(folder, checkpoint_hash(folder), own)

    @property
    def lineage(self) -> dict[str, str]:
        """What a model that was trained beside it has in its lineage.

        By `lm_model`, NAME/HASH, the language model is found again, and kept as long as the model.
        """
        named = "" if self.own is None else f"{self.own.name}/{self.own.hash}"
        return {"lm": self.hash, "lm_model": named, "lm_path": "" if named else str(self.folder)}


def lm_beside(config: ModelCache, workspace: Workspace, card: AdapterCard, named: str) -> Model:
    """The workspace's own language model that an adapter was trained beside, or the newest if it is none of them.

    `named`, the value of --engine.lm, is `builtin` or `builtin/HASH`. Raises UsageError if the workspace has none.
    """
    newest = find_builtin_lm(workspace, "--engine.lm", named)
    _, _, content = named.partition("/")
    stored = [model for model in Models(workspace.store).all("lm") if model.hash.startswith(content)]
    beside = (model for model in reversed(stored) if checkpoint_hash(config.fetch(workspace, model)) == card.lm)
    return next(beside, newest)
