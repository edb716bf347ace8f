"""`raypipe lm`: train the workspace's own language model on its catalogue and on histories before the cut.

A workspace summarises with this model if no other is named. Training reads item texts, and templated examples made from
histories without their last events, so that an evaluation that holds those out stays honest.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from raypipe.config import shaping
from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import histories_before_cut
from raypipe.language.pretraining import LmDataConfig, LmTask, prepare_lm
from raypipe.pipeline.held_out import are_held_out
from raypipe.pipeline.job import model_result
from raypipe.pipeline.sequences import pinned_versions
from raypipe.pipeline.training_folders import Training, TrainingOptions, prepared_once
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import TrainerConfig, fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import stable_hash
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace

JOB = "lm"
_LEARNT = ["user_id", "items", "history_key"]
MODEL = "lm"
STEP_VERSION = 3


class LmOptions(TrainingOptions):
    """What the model is, what it is trained on, and how."""

    data: LmDataConfig = shaping(LmDataConfig, "model size, prompts and examples")
    trainer: TrainerConfig = shaping(lambda: TrainerConfig(workers=2), "training under Ray Train and DeepSpeed")
    hold_out: int = shaping(1, "last events of every user that training never sees", ge=0)
    held_out_share: float = shaping(0.0, "share of the users, by hash, whom training never sees", ge=0, lt=1)
    histories: int = shaping(20_000, "most users whose histories are read, chosen by hash", ge=1)


class LmConfig(LmOptions, JobConfig):
    """Configuration of `lm`."""


def run_lm(config: LmConfig) -> JobResult:
    """Train the model unless one of this very recipe is stored, and register it.

    Raises UsageError for an empty workspace.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    versions = pinned_versions(workspace)
    items = workspace.tables["items"].read(versions["items"]).sort_by("index")
    histories = training_histories(workspace, versions["histories"], config.histories, config.held_out_share)
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "items": fingerprint({"hashes": items["content_hash"].to_pylist()}),
            "histories": fingerprint({"keys": histories["history_key"].to_pylist()}),
        }
    )
    metrics: dict[str, float] = {}

    def train() -> Model:
        model, figures = _train(config, workspace, recipe, items, histories, versions)
        metrics.update(figures)
        return model

    training = Training(JOB, MODEL, recipe, config.lock_lease_s)
    model, status = config.trained_once(workspace, tracking, training, train)
    if status == "ok":
        tracking.log_run(JOB, recipe, {"model": model.hash}, metrics)
    return model_result(JOB, model, status, metrics, started)


def _train(
    config: LmConfig, workspace: Workspace, recipe: str, items: pa.Table, histories: pa.Table, versions: dict[str, int]
) -> tuple[Model, dict[str, float]]:
    folder = config.training_folder(workspace, f"{MODEL}-{recipe}")
    node = config.workers_node(workspace, config.cluster)
    catalogue = Catalogue(
        items["title"].to_pylist(),
        [dict(pairs) for pairs in items["attributes"].to_pylist()],
        items["text"].to_pylist(),
    )
    before = histories_before_cut(histories["items"].to_pylist(), config.hold_out)
    data = folder / "data"
    counts = prepared_once(data, None, lambda: prepare_lm(data, before, catalogue, config.data))
    say(f"lm: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    config.cluster.connect()
    trained = fit(LmTask(data), config.trainer, folder.name, folder / "checkpoint", node)
    lineage = {
        "job": JOB,
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "users": histories.num_rows,
        "config": config.shaping_values(),
    }
    model = Models(workspace.store).add(MODEL, trained.folder, recipe, lineage)
    metrics = {
        **trained.figures(),
        **counts,
    }
    config.remove_training(workspace, f"{MODEL}-{recipe}")
    return model, metrics


def training_histories(workspace: Workspace, version: int, most: int, held_out_share: float = 0.0) -> pa.Table:
    """Item lists and keys of at most `most` users, none of them held out, sorted by id.

    Which users are chosen does not depend on their order in the table.
    """
    table = workspace.tables["histories"]
    users = table.read(version, ["user_id"])["user_id"].combine_chunks()
    hashes = np.sort(stable_hash(users.filter(pa.array(~are_held_out(users, held_out_share)))))
    parts = [table.spec.schema.empty_table().select(_LEARNT)]
    # One file at a time, as the item lists of everybody would not fit into this machine's memory.
    for file in table.files(version) if len(hashes) else ():
        rows = table.read_files([file], _LEARNT)
        users = rows["user_id"].combine_chunks()
        wanted = ~are_held_out(users, held_out_share) & (stable_hash(users) <= hashes[:most][-1])
        parts.append(rows.filter(pa.array(wanted)))
    rows = pa.concat_tables(parts)
    chosen = np.argsort(stable_hash(rows["user_id"].combine_chunks()), kind="stable")[:most]
    return rows.take(pa.array(chosen)).sort_by("user_id")
