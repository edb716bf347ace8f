"""`raypipe train`: train one recommender on the workspace's histories, and keep the weights of the best validation.

Training never sees the last `hold_out` events of any history. Validation asks for the first of them, and `evaluate` for
the last. A model of this very recipe over these very histories is not trained twice.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
from pydantic import model_validator

from raypipe.config import shaping
from raypipe.errors import UsageError
from raypipe.pipeline.forgotten import leave_out_forgotten
from raypipe.pipeline.held_out import Cut
from raypipe.pipeline.job import model_result
from raypipe.pipeline.sequences import histories_hash, pinned_versions, read_histories, read_ties
from raypipe.pipeline.starts import resolved, start_of
from raypipe.pipeline.training_folders import Training, TrainingOptions
from raypipe.recommenders.checkpoint import catalogue_card
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobConfig, JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import TrainerConfig, TrainingResult, fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace

JOB = "train"
# Raised for a model whose training changes what it does, so that models from before are not taken for current.
STEP_VERSIONS = {"bert4rec": 2}


def _trainer() -> TrainerConfig:
    return TrainerConfig(
        epochs=200,
        batch_size=128,
        lr=1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=100,
        validate_every=1,
        patience=10,
    )


class TrainOptions(TrainingOptions, ModelCache):
    """Which recommender, and how it is trained."""

    recommender: RecommenderConfig = shaping(RecommenderConfig, "the model and its loss")
    trainer: TrainerConfig = shaping(_trainer, "training under Ray Train and DeepSpeed")
    shuffle_ties: bool = shaping(False, "events of a user at one time come in another order in every epoch")
    hold_out: int = shaping(2, "last events of every user that training never sees", ge=0)
    held_out_share: float = shaping(0.0, "share of the users, by hash, whom training never sees", ge=0, lt=1)

    @model_validator(mode="after")
    def _validation_needs_an_event(self) -> TrainOptions:
        if self.trainer.validate_every is not None and self.hold_out < 2:
            raise ValueError(
                "validation asks for a held-out event, and the last one is for `evaluate`: set hold_out to 2 or more, or "
                "validate_every to null"
            )
        return self


class TrainConfig(TrainOptions, JobConfig):
    """Configuration of `train`."""


def run_train(config: TrainConfig) -> JobResult:
    """Train the recommender unless one of this recipe is stored; see the module. Raises UsageError for bad input."""
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    config = config.model_copy(update={"recommender": resolved(config.recommender, workspace)})
    name = config.recommender.model
    versions = pinned_versions(workspace)
    rows = workspace.tables["items"].read(versions["items"], ["item_id", "index"]).sort_by("index")
    items = rows["item_id"].to_pylist()
    card = catalogue_card(items)
    recipe = fingerprint(
        {
            "step": STEP_VERSIONS.get(name, 1),
            "config": config.shaping_values(),
            "catalogue": card,
            "histories": histories_hash(workspace, versions["histories"]),
        }
    )
    training = Training(JOB, name, recipe, config.lock_lease_s)
    facts: dict[str, float] = {}

    def train() -> Model:
        trained, told = _train(config, workspace, versions, items, config.training_folder(workspace, training.folder))
        facts.update(told)
        lineage = {
            "job": JOB,
            "versions": versions,
            "hold_out": config.hold_out,
            "held_out_share": config.held_out_share,
            "seed": config.trainer.seed,
            "catalogue": card,
            "protocol": protocol(config),
            "config": config.shaping_values(),
            **facts,
            "training": trained.curve(),
        }
        (trained.folder / "README.md").write_text(model_card(name, lineage))
        leave_out_forgotten(workspace, trained.folder)
        model = Models(workspace.store).add(name, trained.folder, recipe, lineage)
        config.remove_training(workspace, training.folder)
        return model

    model, status = config.trained_once(workspace, tracking, training, train)
    if status == "ok":
        tracking.log_run(JOB, recipe, {"model": model.hash, **protocol(config)}, facts)
    return model_result(JOB, model, status, facts, started)


def protocol(config: TrainOptions) -> dict[str, str]:
    """The switches that move recommenders' figures most, in words."""
    return {
        "loss": config.recommender.objective,
        "history": f"last {config.recommender.items_seen} items",
        "windows": "all positions",
    }


def model_card(name: str, lineage: dict[str, object]) -> str:
    """What a stranger should know of a stored model, as Markdown."""
    told = {key: lineage[key] for key in ("users", "events", "hold_out", "seed", "steps", "versions")}
    lines = [f"# {name}", "", "A sequential recommender trained by `raypipe train`.", ""]
    lines += [f"- {key}: {json.dumps(value)}" for key, value in told.items()]
    if "validation_ndcg" in lineage:
        lines += [f"- validation NDCG@10, best of {lineage['validations']}: {lineage['validation_ndcg']}"]
    lines += [f"- {key}: {value}" for key, value in lineage["protocol"].items()]  # type: ignore[attr-defined]
    lines += ["", "Configuration:", "", "```json", json.dumps(lineage["config"], indent=1, sort_keys=True), "```", ""]
    return "\n".join(lines)


def _train(
    config: TrainConfig,
    workspace: Workspace,
    versions: dict[str, int],
    items: list[str],
    folder: Path,
) -> tuple[TrainingResult, dict[str, float]]:
    node = config.workers_node(workspace, config.cluster)
    users, histories = read_histories(workspace, versions["histories"], config.held_out_share)
    seen = histories.without_last(config.hold_out)
    ties = None
    if config.shuffle_ties:
        ties = read_ties(workspace, versions["histories"], config.held_out_share).without_last(config.hold_out).items
    cut = Cut(config.hold_out, config.held_out_share)
    start = start_of(config, workspace, config.recommender, seen, cut, items, config.trainer.seed)
    try:
        prepare_training(
            folder / "data",
            seen,
            _held(histories, config.hold_out),
            catalogue_card(items),
            config.recommender,
            config.trainer.seed,
            start,
            ties,
            ids=users,
        )
    except ValueError as error:
        raise UsageError(
            str(error), f"Training leaves out the last {config.hold_out} events of every history; ingest longer ones."
        ) from None
    say(f"{JOB}: {config.recommender.model} on {len(seen.items):,} events of {len(seen):,} users")
    config.cluster.connect()
    trained = fit(RecommenderTask(folder / "data"), config.trainer, folder.name, folder / "checkpoint", node)
    facts: dict[str, float] = {
        "users": int(np.count_nonzero(seen.lengths)),
        "events": len(seen.items),
        **trained.figures(),
        "validations": len(trained.validations),
    }
    known = [value for _, value in trained.validations if math.isfinite(value)]
    return trained, facts | ({"validation_ndcg": round(max(known), 6)} if known else {})


def _held(histories: Histories, hold_out: int) -> np.ndarray:
    """The first held-out event of every history; 0 if there is no training prefix before it."""
    held = np.zeros(len(histories), np.int32)
    asked = histories.lengths > hold_out
    if hold_out:
        held[asked] = histories.items[histories.ends[asked] - hold_out]
    return held
