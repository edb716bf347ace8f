"""`raypipe align`: joins a recommender to a language model, and measures what words can tell of users it never saw.

The recommender and the language model stay as they are; the adapter between them is trained on the states of users who are
not held out, and asked about those who are: beside it the same questions without any state, and with another user's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.config import free, shaping
from raypipe.engines.engine import Decoding, Engine, EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, AdapterConfig, LoraOptions, build_adapter
from raypipe.language.alignment import AlignmentTask, prepare_alignment
from raypipe.language.backbone import load_backbone
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.language.soft_prompts import Injection, SoftExample
from raypipe.language.titles import distinct_titles
from raypipe.pipeline.held_out import are_held_out
from raypipe.pipeline.job import JobConfig, JobResult, ModelCache, TrainingOptions, cost_of
from raypipe.pipeline.loaded import BUILTIN, Loaded, find_builtin_lm
from raypipe.pipeline.sequences import histories_hash, pinned_versions, read_histories
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.recommender import freeze, weights_hash
from raypipe.recommenders.windows import Histories
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import TrainerConfig, fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import hold
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.recinterpreter import (
    SOURCE,
    InterpreterConfig,
    Reading,
    examples,
    figures,
    questions,
)

JOB = "align"
MODEL = "recinterpreter"
STEP_VERSION = 1
_USERS_AT_ONCE = 256
_CONTROLS = ("", "shuffled states", "no states")


class AlignOptions(TrainingOptions, ModelCache):
    """What is joined to what, and how it is trained and measured."""

    model: str = shaping("sasrec", "a recommender's name, for its newest, or NAME/HASH")
    lm: str = free(BUILTIN, "checkpoint folder or hub name; builtin is the workspace's own")
    interpreter: InterpreterConfig = shaping(InterpreterConfig, "the exercises, and how states become tokens")
    injection: Injection = shaping("replace", "tokens of states replace what the model reads, or are added to a word")
    lora: LoraOptions | None = shaping(None, "unset: the language model is frozen")
    trainer: TrainerConfig = shaping(
        lambda: TrainerConfig(epochs=10, batch_size=16, lr=1e-3, weight_decay=1e-6),
        "training under Ray Train and DeepSpeed",
    )
    hold_out: int = shaping(1, "last events of every user that training never sees", ge=0)
    held_out_share: float = shaping(
        0.1, "share of the users, by hash, that are asked about and never trained on", gt=0, lt=1
    )
    users: int = shaping(20_000, "most users that are trained on", ge=1)
    positions: int = shaping(10, "most places in a history that training reads", ge=1)
    asked: int = shaping(1_000, "most held-out users that are asked about", ge=1)
    decoding: Decoding = shaping(lambda: Decoding(max_new_tokens=256), "of the answers")


class AlignConfig(AlignOptions, JobConfig):
    """Configuration of `align`."""


@dataclass(frozen=True)
class _Inputs:
    """The two that are joined, everybody's history up to the cut, and whether neither of the two saw who is held out."""

    loaded: Loaded
    recommender: str
    lm: Path
    lm_hash: str
    histories: Histories
    held_out: NDArray[np.bool_]
    titles: list[str]
    unseen: bool


def run_align(config: AlignConfig) -> JobResult:
    """Train the adapter unless one of this recipe is stored, and measure it. Raises UsageError before work starts."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    inputs = _read(config, workspace, versions["histories"])
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "recommender": inputs.recommender,
            "lm": inputs.lm_hash,
            "histories": histories_hash(workspace, versions["histories"]),
            "titles": inputs.titles,
        }
    )
    with hold(workspace.store, [f"models-{MODEL}"], JOB, config.lock_lease_s):
        models = Models(workspace.store)
        if (model := models.newest(MODEL, recipe)) is not None:
            return _result(model, "nothing_to_do", started)
        before = weights_hash(inputs.loaded.recommender)
        model = _train(config, workspace, inputs, recipe, versions)
        assert weights_hash(inputs.loaded.recommender) == before, "the recommender is frozen"
        tracking.register(model)
    params = {"model": model.hash, "recommender": inputs.recommender, "lm": inputs.lm_hash[:12]}
    tracking.log_run(JOB, recipe, params, model.lineage["metrics"])
    return _result(model, "ok", started)


def _read(config: AlignConfig, workspace: Workspace, version: int) -> _Inputs:
    loaded = Loaded.of(config, workspace, config.model)
    freeze(loaded.recommender)
    parts = [loaded.model]
    if config.lm == BUILTIN:
        parts.append(find_builtin_lm(workspace, "--lm"))
        lm = config.fetch(workspace, parts[-1])
    else:
        lm = resolve_checkpoint(config.lm)
    saw = [part.name for part in parts if part.lineage.get("held_out_share", 0.0) < config.held_out_share]
    if saw:
        say(
            f"{JOB}: {' and '.join(saw)} may have been trained on users who are asked about here: the figures are too good "
            f"unless trained with --held_out_share {config.held_out_share}"
        )
    users, histories = read_histories(workspace, version)
    histories = histories.without_last(config.hold_out).within(loaded.recommender.items)
    held_out = are_held_out(users, config.held_out_share)
    long_enough = histories.lengths > 1
    if not (held_out & long_enough).any() or not (~held_out & long_enough).any():
        raise UsageError(
            f"Of {len(users):,} users {int(held_out.sum()):,} are held out, and one side has no history of two events.",
            "Ingest more users, or change --held_out_share.",
        )
    titles = distinct_titles(loaded.items["title"].to_pylist(), loaded.items["item_id"].to_pylist())
    name = f"{loaded.model.name}/{loaded.model.hash}"
    return _Inputs(loaded, name, lm, checkpoint_hash(lm), histories, held_out, titles, not saw)


def _train(config: AlignConfig, workspace: Workspace, inputs: _Inputs, recipe: str, versions: dict[str, int]) -> Model:
    """Train, measure, and only then store: who finds the model finds its figures in the lineage."""
    folder = config.training_folder(workspace, f"{MODEL}-{recipe}")
    adapter = AdapterConfig(projectors=config.interpreter.projectors, injection=config.injection, lora=config.lora)
    card = AdapterCard(adapter, {SOURCE: inputs.loaded.recommender.width}, inputs.lm_hash, inputs.recommender)
    backbone = load_backbone(str(inputs.lm), device="cpu")
    build_adapter(backbone, card)  # what cannot be built is told here, and not by a worker
    try:
        counts = prepare_alignment(
            folder / "data",
            _examples(config, inputs),
            backbone,
            backbone.ends[0],
            backbone.context,
            str(inputs.lm),
            card,
            config.trainer.seed,
        )
    except ValueError as error:
        raise UsageError(str(error), "Ask for fewer titles, or name a language model of a longer context.") from None
    say(f"{JOB}: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    config.cluster.connect()
    trained = fit(AlignmentTask(folder / "data"), config.trainer, f"{MODEL}-{recipe}", folder / "checkpoint")
    metrics = {
        "loss_first": float(np.mean(trained.losses[:10])),
        "loss_last": float(np.mean(trained.losses[-10:])),
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 1),
        **counts,
        "unseen_by_both": int(inputs.unseen),
        **_measured(config, inputs, trained.folder),
    }
    lineage = {
        "job": JOB,
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "config": config.shaping_values(),
        "metrics": metrics,
    }
    model = Models(workspace.store).add(MODEL, trained.folder, recipe, lineage)
    workspace.store.delete_folder(f"staging/{MODEL}-{recipe}")
    return model


def _examples(config: AlignConfig, inputs: _Inputs) -> Iterator[SoftExample]:
    """The exercises of users who are not held out, at so many places of each history."""
    rng = np.random.default_rng(config.trainer.seed)
    lengths = inputs.histories.lengths
    rows = rng.permutation(np.flatnonzero(~inputs.held_out & (lengths > 1)))[: config.users].tolist()
    places = {
        row: sorted((1 + rng.choice(lengths[row], min(config.positions, lengths[row]), replace=False)).tolist())
        for row in rows
    }
    for row, items, states in _states(config, inputs, places):
        yield from examples(items, states, inputs.titles, config.interpreter, places[row], rng)


def _states(
    config: AlignConfig, inputs: _Inputs, places: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, list[int], NDArray[np.float32]]]:
    """Of each row its items, and the states [events, width] that exercises at its places need; the others are no numbers."""
    rows, histories = list(places), inputs.histories
    for start in range(0, len(rows), _USERS_AT_ONCE):
        chosen = rows[start : start + _USERS_AT_ONCE]
        needed = {
            row: sorted({events for place in places[row] for events in config.interpreter.states_needed(place)})
            for row in chosen
        }
        owners = np.repeat(chosen, [len(needed[row]) for row in chosen])
        events = np.array([number for row in chosen for number in needed[row]], np.int64)
        found = prefix_states(inputs.loaded.recommender, histories, owners, events)
        at = 0
        for row in chosen:
            items = histories.items[histories.starts[row] : histories.ends[row]].tolist()
            states = np.full((len(items), found.shape[1]), np.nan, np.float32)
            states[np.array(needed[row]) - 1] = found[at : at + len(needed[row])]
            at += len(needed[row])
            yield row, items, states


def _measured(config: AlignConfig, inputs: _Inputs, adapter: Path) -> dict[str, float]:
    """What the adapter tells of held-out users after their last event before the cut, and what the controls do."""
    rows = np.flatnonzero(inputs.held_out & (inputs.histories.lengths > 1))
    rows = np.random.default_rng(0).permutation(rows)[: config.asked]
    places = {row: [int(inputs.histories.lengths[row])] for row in rows.tolist()}
    readings = [
        Reading.of(items, states, inputs.titles, config.interpreter)
        for _, items, states in _states(config, inputs, places)
    ]
    engine = EngineConfig(lm=str(inputs.lm), adapter=str(adapter)).build()
    found: dict[str, float] = {"asked": len(readings)}
    for control in _CONTROLS:
        prefix = f"{control}: " if control else ""
        for name, value in _asked(engine, readings, inputs.titles, config, control).items():
            found[prefix + name] = round(value, 4)
        say(
            f"{JOB}: {control or 'the adapter'}: recovery {found[prefix + 'recovery']}, residual {found[prefix + 'residual']}"
        )
    return found


def _asked(
    engine: Engine, readings: Sequence[Reading], titles: Sequence[str], config: AlignConfig, control: str
) -> dict[str, float]:
    prompts = questions(readings, config.interpreter, control)
    answers = [""] * len(prompts)
    for outcome in engine.generate(prompts, config.decoding):
        answers[outcome.index] = outcome.text
    return figures(answers, readings, set(titles))


def _result(model: Model, status: str, started: float) -> JobResult:
    cost = cost_of(Usage(), time.monotonic() - started)
    metrics = model.lineage["metrics"]
    return JobResult(JOB, status, model.recipe, models={MODEL: model.hash}, metrics=metrics, cost=cost)
