"""`raypipe evaluate`: measure a stored recommender on every user's last event, beside the floors it has to beat."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from raypipe.config import free, shaping
from raypipe.errors import UsageError
from raypipe.metrics.published import published
from raypipe.metrics.ranking import Mean
from raypipe.pipeline.attribute_cards import SHARE, attribute_shares, write_attribute_cards
from raypipe.pipeline.held_out import Cut, are_held_out, share_of, some_of
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.loaded import Loaded
from raypipe.pipeline.made_of import parts_of, settings_of
from raypipe.pipeline.sequences import pinned_versions, read_histories
from raypipe.recommenders.evaluation import HeldOut, evaluate_floor, evaluate_model
from raypipe.recommenders.floors import Popularity, Transitions
from raypipe.runtime.job import JobConfig, JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace

JOB = "evaluate"
MOST_ASKED = 100_000
"""With so many users NDCG@10 is known to about 0.002. More users cost a machine hours and tell no more."""


class EvaluateConfig(JobConfig, ModelCache):
    """Configuration of `evaluate`."""

    model: str = shaping("sasrec", "a recommender's name, for its newest, or NAME/HASH")
    filter_seen: bool = shaping(True, "items of the prefix are no candidates")
    asked: int = shaping(MOST_ASKED, "users asked at most, chosen by the hashes of their ids", ge=1)
    cards: int = free(0, "users whose attributes and recommendations are drawn, of a model with guided scores", ge=0)


def run_evaluate(config: EvaluateConfig) -> JobResult:
    """Measure, print the table, log the figures.

    Raises UsageError for a model that saw all events or knows other items.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    workspace.require_info()
    loaded = Loaded.of(config, workspace, config.model)
    model = loaded.model
    held = held_out(workspace, [model], config.asked)
    options = {"filter_seen": config.filter_seen}
    if config.cards:
        page = write_attribute_cards(config, workspace, loaded, held, config.cards, config.lock_lease_s, **options)
        say(f"{JOB}: attributes are drawn in {page}")
    rows = {
        "popularity": evaluate_floor(Popularity(held.training, held.items), held, **options),
        "transitions": evaluate_floor(Transitions(held.training, held.items), held, **options),
        model.name: {
            **evaluate_model(loaded.recommender, held, **options),
            **attribute_shares(config, workspace, loaded, held, **options),
        },
    }
    record(workspace, model, rows, held, config.filter_seen)
    known = published(held.users, held.events, model.name)
    protocol = {**model.lineage["protocol"], "seen items": "filtered" if config.filter_seen else "kept"}
    if known is not None:
        rows["published"] = {name: Mean(value, 0.0) for name, value in known.values.items()}
    say(table(rows, protocol, len(held.targets)))
    if known is not None:
        say(f"published: {known.source}; {known.training}, seen items: filtered")
    metrics = {
        f"{row}.{name}": round(mean.value, 6)
        for row, means in rows.items()
        for name, mean in means.items()
        if not math.isnan(mean.value)  # a mean over nobody, as for cold items if there are none
    }
    run_key = fingerprint(
        {"job": JOB, "model": model.hash, "versions": pinned_versions(workspace), "config": config.shaping_values()}
    )
    # MLflow restricts the characters of a name, and attributes have whatever names the list gives them.
    numbers = {name: value for name, value in metrics.items() if SHARE not in name}
    tracking.log_run(JOB, run_key, {"model": model.hash, **protocol}, numbers)
    cost = cost_of(Usage(), time.monotonic() - started)
    return JobResult(JOB, "ok", run_key, models={model.name: model.hash}, metrics=metrics, cost=cost)


def record(
    workspace: Workspace, model: Model, rows: dict[str, dict[str, Mean]], held: HeldOut, filter_seen: bool
) -> None:
    """Store the figures as the record that `report` reads."""
    figures = {
        row: {
            name: Measured(round(mean.value, 6), round(mean.half_width, 6) if mean.half_width > 0 else None)
            for name, mean in means.items()
            if not math.isnan(mean.value)
        }
        for row, means in rows.items()
    }
    seen = "filtered" if filter_seen else "kept"
    # Figures of a part of the users belong to another protocol.
    asked = {} if held.asks_all else {"asked": len(held.targets)}
    whom = f"{len(held.targets):,} of {held.askable:,} users, " if asked else ""
    lineage = model.lineage
    cut = Cut(int(lineage["hold_out"]), share_of(model))
    settings = settings_of(lineage)
    Evaluations(workspace.store).put(
        Evaluation(
            job=JOB,
            name=model.name,
            hash=model.hash,
            recommender="",
            protocol=f"leave-one-out, {whom}whole catalogue, seen items {seen}, {cut.words}",
            seed=int(lineage["seed"]),
            figures=figures,
            switches=lineage["protocol"],
            settings=settings,
            training=lineage["training"],
            versions=lineage["versions"],
            parts=parts_of([Models(workspace.store)], settings),
        ),
        {"filter_seen": filter_seen, **asked},
    )


def held_out(workspace: Workspace, models: Sequence[Model], most: int) -> HeldOut:
    """The last event of every user who has an event before the cut of all models, or of `most` of these users.

    Raises UsageError if one of the models saw every event.
    """
    versions = pinned_versions(workspace)
    users, histories = read_histories(workspace, versions["histories"])
    seen_by_none = are_held_out(users, min(map(share_of, models)))
    hold_outs = [int(model.lineage["hold_out"]) for model in models]
    items = workspace.tables["items"].rows(versions["items"])
    # A model that was trained on every event cannot be asked, whatever another model left out.
    hold_out = max(hold_outs) if min(hold_outs) else 0
    asked = some_of(users, histories.lengths > hold_out, most)
    try:
        return HeldOut.of(histories, hold_out, items, ~seen_by_none, asked)
    except ValueError as error:
        raise UsageError(str(error), "Train with `--hold_out 2` for a model to evaluate.") from None


def table(rows: dict[str, dict[str, Mean]], protocol: dict[str, str], users: int) -> str:
    """The figures as text: metrics as lines, models and floors as columns, each figure with its 95 % interval."""
    switches = ", ".join(f"{name}: {value}" for name, value in protocol.items())
    told = (name for means in rows.values() for name, mean in means.items() if not math.isnan(mean.value))
    names = list(dict.fromkeys(told))
    wide = max(map(len, names))
    lines = [f"{users:,} users, the whole catalogue, {switches}", " " * wide + "".join(f"{row:>18}" for row in rows)]
    for name in names:
        cells = (_cell(means.get(name)) for means in rows.values())
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _cell(mean: Mean | None) -> str:
    if mean is None or math.isnan(mean.value):
        return ""
    return f"{mean.value:.4f} ± {mean.half_width:.4f}" if mean.half_width > 0 else f"{mean.value:.4f}         "
