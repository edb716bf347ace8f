"""A stored recommender, resolved by name and checked against the workspace's catalogue."""

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
    """The resolved model and what it is, and the catalogue it works on."""

    model: Model
    recommender: Recommender
    card: Card
    items: pa.Table

    @classmethod
    def of(cls, config: ModelCache, workspace: Workspace, named: str) -> Loaded:
        """`named` as for `find_model`. Raises UsageError for a model that is not there, is no recommender or knows other items."""
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

    Raises UsageError where there is none, with the option that names another.
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
    """The language model beside which something is trained: its checkpoint's folder, that one's content hash, and which of the
    workspace's own models it is, where it is one of them."""

    folder: Path
    hash: str
    own: Model | None

    @classmethod
    def of(cls, config: ModelCache, workspace: Workspace, named: str) -> ChosenLm:
        """By --lm: `builtin`, `builtin/HASH`, a folder or a hub name. Raises UsageError where there is none."""
        own = find_builtin_lm(workspace, "--lm", named) if is_builtin(named) else None
        folder = resolve_checkpoint(named) if own is None else config.fetch(workspace, own)
        return cls(folder, checkpoint_hash(folder), own)

    @property
    def lineage(self) -> dict[str, str]:
        """What a model that was trained beside it is stored with: `lm_model`, NAME/HASH, is found again and kept with it."""
        named = "" if self.own is None else f"{self.own.name}/{self.own.hash}"
        return {"lm": self.hash, "lm_model": named, "lm_path": "" if named else str(self.folder)}


def lm_beside(config: ModelCache, workspace: Workspace, card: AdapterCard, named: str) -> Model:
    """The workspace's own language model that an adapter was trained beside, or the newest, where it is none of them; `named`
    is `builtin` or `builtin/HASH`, by --engine.lm."""
    newest = find_builtin_lm(workspace, "--engine.lm", named)
    _, _, content = named.partition("/")
    stored = [model for model in Models(workspace.store).all("lm") if model.hash.startswith(content)]
    beside = (model for model in reversed(stored) if checkpoint_hash(config.fetch(workspace, model)) == card.lm)
    return next(beside, newest)
