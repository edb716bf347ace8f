"""A recommender that nobody trained, stored in a workspace: for tests and benchmarks of what does not depend on weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

from raypipe.pipeline.sequences import catalogue_card
from raypipe.recommenders.checkpoint import Card, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace


def store_untrained(uri: str, config: RecommenderConfig) -> Model:
    """The model of seed 0 over the workspace's catalogue."""
    workspace = Workspace(uri)
    table = workspace.tables["items"]
    items = table.read(table.version(), ["item_id", "index"]).sort_by("index")["item_id"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        save_recommender(Path(folder), Card(config, catalogue_card(items), []), config.build(len(items)).state_dict())
        return Models(workspace.store).add(config.model, Path(folder), "untrained", {"hold_out": 2})
