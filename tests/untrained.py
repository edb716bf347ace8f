"""Models that nobody trained, stored in a workspace: for tests and benchmarks of what does not depend on weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from raypipe.language.adapters import AdapterCard, build_adapter, save_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.language.prefixes import PREFIX
from raypipe.pipeline.sequences import catalogue_of, read_histories
from raypipe.recommenders.checkpoint import Card, catalogue_card, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.lancer import NAME as LANCER
from raypipe.systems.lancer import LancerConfig
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.trsr import NAME as TRSR
from raypipe.systems.trsr import TrsrConfig
from raypipe.systems.trsr_past import Past

OF_LM = {"job": "lm", "hold_out": 1, "held_out_share": 0.0}
"""Lineage of a language model."""
_OF_ADAPTER = {
    "job": "align",
    "hold_out": 1,
    "held_out_share": 0.0,
    "seed": 0,
    "config": {},
    "training": {},
    "versions": {},
}


def store_untrained(uri: str, config: RecommenderConfig) -> Model:
    """The model of seed 0 over the workspace's catalogue."""
    workspace = Workspace(uri)
    table = workspace.tables["items"]
    items = table.read(table.version(), ["item_id", "index"]).sort_by("index")["item_id"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        save_recommender(Path(folder), Card(config, catalogue_card(items), []), config.build(len(items)).state_dict())
        lineage = {"job": "train", "hold_out": 2, "held_out_share": 0.0}
        return Models(workspace.store).add(config.model, Path(folder), "untrained", lineage)


def store_untrained_adapter(
    uri: str, config: ExplainerConfig | InterpreterConfig, recommender: Model, width: int, lm: Path
) -> Model:
    """A system's adapter of that recommender and of the language model in the folder `lm`."""
    system, store = config.build(), Workspace(uri).store
    widths = dict.fromkeys(system.adapter.projectors, width)
    card = AdapterCard(system.adapter, widths, checkpoint_hash(lm), f"{recommender.name}/{recommender.hash}")
    model = build_adapter(load_backbone(str(lm), device="cpu"), card)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    name = "recexplainer" if isinstance(config, ExplainerConfig) else "recinterpreter"
    options = config.model_dump(mode="json")
    lineage = {**_OF_ADAPTER, "system": name, "options": options, "recommender": card.recommender}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), card, weights)
        return Models(store).add(system.name, Path(folder), f"untrained {name}", lineage)


def store_untrained_writer(uri: str, config: LancerConfig, lm: Path, **told: object) -> Model:
    """A LANCER of the language model in the folder `lm` all of whose weights were changed at random; `told` is lineage."""
    hidden = load_backbone(str(lm), device="cpu").model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    card = AdapterCard(config.adapter, {PREFIX: hidden} if config.reasoning else {}, checkpoint_hash(lm), "")
    model = build_adapter(load_backbone(str(lm), device="cpu"), card)
    torch.manual_seed(0)
    weights = {
        name: one.detach() + 0.1 * torch.randn_like(one) for name, one in model.named_parameters() if one.requires_grad
    }
    lineage = {
        **_OF_ADAPTER,
        "system": LANCER,
        "options": config.model_dump(mode="json"),
        "lm": card.lm,
        "lm_model": "",
        "lm_path": str(lm),
        **told,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), card, weights)
        return Models(Workspace(uri).store).add(LANCER, Path(folder), "untrained", lineage)


def store_untrained_ranker(uri: str, config: TrsrConfig, lm: Path, **told: object) -> Model:
    """An LLM-TRSR of the language model in the folder `lm` whose updates are random, with the counts of all histories if it is
    shown any; `told` is lineage."""
    workspace = Workspace(uri)
    card = AdapterCard(config.adapter, {}, checkpoint_hash(lm), "")
    model = build_adapter(load_backbone(str(lm), device="cpu"), card)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(one) * 0.3 for name, one in model.named_parameters() if one.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), card, weights)
        if config.facts:
            _, histories = read_histories(workspace, workspace.tables["histories"].version())
            table = workspace.tables["items"]
            past = Past(
                histories, np.zeros(len(histories), bool), catalogue_of(table.read(table.version()).sort_by("index"))
            )
            Facts.of(histories, past.vectors, past.neighbours, config.history).save(Path(folder))
        options = config.model_dump(mode="json")
        lineage = {**_OF_ADAPTER, "system": TRSR, "options": options, "summaries": None, **told}
        return Models(workspace.store).add(TRSR, Path(folder), "untrained", lineage)
