"""`raypipe align --system guided`: score items and users on attributes by a language model, tuned or as it is.

It stores `guided/HASH`: the scores, and the adapter of the language model tuned to recommend beside them. `train` puts
them into a recommender by `--recommender.guided.scores guided`. Nothing here reads an event at or after the cut: users
are scored by what stands before their last `hold_out` events, and the language model is tuned on the users who are not
held out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raypipe.engines.engine import Engine, EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, build_adapter, load_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.prompt import Prompt
from raypipe.pipeline.asked_anew import tell_trained
from raypipe.pipeline.forgotten import leave_out_forgotten
from raypipe.pipeline.held_out import Cut, are_held_out
from raypipe.pipeline.job import model_result
from raypipe.pipeline.loaded import ChosenLm
from raypipe.pipeline.sequences import catalogue_of, histories_hash, pinned_versions, read_histories
from raypipe.pipeline.training_folders import Training, prepared_once
from raypipe.recommenders.attribute_scores import AttributeScores, save_scores
from raypipe.recommenders.checkpoint import catalogue_card
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models, find_adapter
from raypipe.storage.workspace import Workspace
from raypipe.systems.guided import NAME, Rating
from raypipe.systems.guided_attributes import find_attributes
from raypipe.systems.guided_reading import ParseCounts, RatingPrompts, ranking_of_scores, read_expected, read_written
from raypipe.systems.guided_training import TuningTask, prepare_tuning
from raypipe.systems.source import drawn_places

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

STEP_VERSION = 5
_SHOWN_EVERY_S = 10.0
_BATCH_TOKENS = 4096  # tokens of one pass, padding and answers included
_OF_TRAINING = ("trainer", "users", "positions")  # options that mean nothing if nothing is trained
_ADAPTER = ("adapter.json", "adapter.safetensors")


@dataclass(frozen=True)
class _Inputs:
    """The users to score, the attributes to score them on, and the language model.

    `histories` end before the cut, and `held_out` is bool [users]. `unseen` is the share of all users that neither this
    tuning nor any of the models used has seen.
    """

    rating: Rating
    histories: Histories
    held_out: NDArray[np.bool_]
    unseen: float
    catalogue: dict[str, object]
    lm: ChosenLm
    adapter: Model | None

    @property
    def trains(self) -> bool:
        """Whether the language model is tuned here. Otherwise it is asked as it is, or as it was tuned before."""
        return self.rating.config.tuned and self.adapter is None

    def firsts(self, rows: NDArray[np.int64], events: NDArray[np.int64]) -> list[list[int]]:
        """The first `events` [n] items of the histories in `rows` [n]."""
        starts = self.histories.starts[rows]
        pairs = zip(starts.tolist(), (starts + events).tolist(), strict=True)
        return [self.histories.items[start:stop].tolist() for start, stop in pairs]


def run_guided(config: AlignConfig) -> JobResult:
    """Score items and users and store the scores, unless scores of this recipe are stored.

    Raises UsageError before work starts. After scoring it does so if no score could be read, or if no attribute tells
    items apart.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    inputs = _read(config, workspace, versions)
    rating = inputs.rating
    values = config.shaping_values()
    if not inputs.trains:
        values = {name: value for name, value in values.items() if name not in _OF_TRAINING}
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": values,
            "guided": rating.config.shaping_values(),
            "attributes": [one.shaping_values() for one in rating.attributes],
            "lm": inputs.lm.hash,
            "adapter": inputs.adapter and inputs.adapter.hash,
            "histories": histories_hash(workspace, versions["histories"]),
            "items": fingerprint({"lines": rating.item_lines()}),
        }
    )
    training = Training("align", NAME, recipe, config.lock_lease_s)
    model, status = config.trained_once(
        workspace, tracking, training, lambda: _scored(config, workspace, inputs, recipe, versions)
    )
    tell_trained(tracking, model, status, model.lineage["metrics"], lm=inputs.lm.hash[:12])
    return model_result("align", model, status, model.lineage["metrics"], started)


def _read(config: AlignConfig, workspace: Workspace, versions: dict[str, int]) -> _Inputs:
    cut = Cut(config.hold_out, config.held_out_share)
    lm = ChosenLm.of(config, workspace, config.lm)
    seen = [] if lm.own is None else [lm.own]
    adapter = None if config.adapter is None else find_adapter(Models(workspace.store), config.adapter, NAME)
    if adapter is not None:
        seen.append(adapter)
        if not (config.fetch(workspace, adapter) / _ADAPTER[0]).is_file():
            raise UsageError(
                f"{adapter.name}/{adapter.hash} holds no tuned language model.",
                "Name scores that were made by a tuned one.",
            )
    for model in seen:
        cut.check_events(model)
    unseen = cut.least_share(seen)
    if unseen < config.held_out_share:
        say(
            f"{NAME}: the language model may have been trained on users who are asked about here: the figures are too good "
            f"unless trained with --held_out_share {config.held_out_share}"
        )
    users, histories = read_histories(workspace, versions["histories"])
    histories = histories.without_last(config.hold_out)
    if int(histories.lengths.max(initial=0)) < 2:
        raise UsageError(
            f"No user has two events before the last {config.hold_out}.",
            "Ingest longer histories, or lower --hold_out.",
        )
    items = workspace.tables["items"].read(versions["items"]).sort_by("index")
    ids = items["item_id"].to_pylist()
    catalogue = catalogue_of(items)
    guided = config.guided
    rating = Rating(guided, find_attributes(guided.domain, catalogue, guided.attributes), catalogue)
    held_out = are_held_out(users, config.held_out_share)
    return _Inputs(rating, histories, held_out, unseen, catalogue_card(ids), lm, adapter)


def _scored(config: AlignConfig, workspace: Workspace, inputs: _Inputs, recipe: str, versions: dict[str, int]) -> Model:
    """Tune, score, measure, and only then store."""
    name = f"{NAME}-{recipe}"
    folder = config.training_folder(workspace, name)
    out = folder / "scores"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rating = inputs.rating
    questions = RatingPrompts(rating, load_backbone(str(inputs.lm.folder), device="cpu"))
    metrics: dict[str, float] = {}
    curve: dict[str, Any] = {}
    if inputs.adapter is not None:
        _copy_adapter(config.fetch(workspace, inputs.adapter), out)
    elif inputs.trains:
        node = config.workers_node(workspace, config.cluster)
        told, curve = _tuned(config, inputs, questions, folder, name, node)
        metrics |= told
        _copy_adapter(folder / "checkpoint", out)
    reader = _Reader(config, inputs, questions, out)
    items = reader.read("items", questions.of_items())
    owners = np.flatnonzero(inputs.histories.lengths > 0)
    lengths = inputs.histories.lengths[owners]
    users = reader.read("users", questions.of_users(inputs.firsts(owners, lengths)))
    if np.isnan(items).all():
        raise UsageError(
            f"Not one score could be read from {reader.written.answers:,} answers: {dict(reader.written.reasons)}.",
            "Read expectations with --guided.reading expected, or name a language model that writes JSON.",
        )
    assert inputs.histories.users is not None
    keys = inputs.histories.users[owners]
    order = np.argsort(keys, kind="stable")
    nothing = np.full((1, items.shape[1]), np.nan, np.float32)
    scores = AttributeScores(
        rating.names, np.concatenate([nothing, items]), users[order], keys[order], inputs.catalogue
    )
    telling = [name for name, tells in zip(scores.names, scores.telling, strict=True) if tells]
    if not telling:
        raise UsageError(
            "The language model scores all items alike on every attribute, which tells nothing of them.",
            "Tune it more gently (--trainer.lr), ask it as it is with --no-guided.tuned, or name another.",
        )
    if len(telling) < len(scores.names):
        say(
            f"{NAME}: items are told apart by {len(telling)} of {len(scores.names)} attributes alone: {', '.join(telling)}"
        )
    save_scores(out, scores)
    metrics["telling"] = len(telling)
    metrics |= {"items": len(items), "users": len(users), **reader.told()}
    read = items[:, ~np.isnan(items).all(0)]  # An attribute may have been named in no answer.
    metrics["spread"] = round(float(np.nanstd(read, axis=0).mean()), 4) if read.size else 0.0
    metrics["unseen_by_all"] = int(inputs.unseen == config.held_out_share)
    metrics |= _measured(config, inputs, questions, reader, scores)
    lineage = {
        "job": "align",
        "system": NAME,
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": inputs.unseen,
        "seed": config.trainer.seed,
        "options": rating.config.model_dump(mode="json"),
        "attributes": [one.model_dump() for one in rating.attributes],
        **inputs.lm.lineage,
        "tuned": inputs.adapter and f"{inputs.adapter.name}/{inputs.adapter.hash}",
        "config": config.shaping_values(),
        "metrics": metrics,
        "training": curve,
    }
    leave_out_forgotten(workspace, out)
    model = Models(workspace.store).add(NAME, out, recipe, lineage)
    config.remove_training(workspace, name)
    return model


def _tuned(
    config: AlignConfig, inputs: _Inputs, questions: RatingPrompts, folder: Path, name: str, node: str | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Tune the language model into `folder/checkpoint`. Returns figures of the training, and its curve."""
    guided = inputs.rating.config
    rng = np.random.default_rng(config.trainer.seed)
    there = np.flatnonzero(~inputs.held_out & (inputs.histories.lengths > 1))
    rows = rng.permutation(there)[: config.users]
    owners, events = drawn_places(rows, inputs.histories.lengths[rows] - 1, config.positions, rng)
    targets = inputs.histories.items[inputs.histories.starts[owners] + events]
    card = AdapterCard(guided.adapter, {}, inputs.lm.hash, "")

    def prepare() -> dict[str, int]:
        return prepare_tuning(
            folder / "data",
            questions.ids(questions.of_items()),
            questions.ids(questions.of_users(inputs.firsts(owners, events))),
            targets.tolist(),
            questions.form,
            str(inputs.lm.folder),
            card,
            guided,
            config.trainer.seed,
        )

    try:
        counts = prepared_once(folder / "data", inputs.lm.folder, prepare)
    except ValueError as error:
        raise UsageError(str(error), "Ingest more users, or lower --held_out_share.") from None
    build_adapter(questions.backbone, card)  # fail here rather than in a worker if it cannot be built
    say(f"{NAME}: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    config.cluster.connect()
    trained = fit(TuningTask(folder / "data"), config.trainer, name, folder / "checkpoint", node)
    metrics = {
        **trained.figures(),
        **counts,
    }
    return metrics, trained.curve()


class _Reader:
    """Reads scores from the language model, with the adapter in `folder` if there is one."""

    def __init__(self, config: AlignConfig, inputs: _Inputs, questions: RatingPrompts, folder: Path) -> None:
        self.questions, self.answer_tokens = questions, config.answer_tokens
        self.written = ParseCounts()
        self.tokens = 0
        adapter = folder if (folder / _ADAPTER[0]).is_file() else None
        if inputs.rating.config.reading == "parsed":
            self.engine: Engine | None = EngineConfig(lm=str(inputs.lm.folder), adapter=str(adapter or "")).build()
            return
        self.engine, backbone = None, load_backbone(str(inputs.lm.folder))
        self.lm: Any = backbone.model
        if adapter is not None:
            self.lm = load_adapter(adapter, backbone, inputs.lm.hash).lm

    def read(self, what: str, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """The scores of prompts, [prompts, attributes], NaN for those that could not be read.

        `what` names the prompts in messages.
        """
        ids = self.questions.ids(prompts)
        self.tokens += sum(map(len, ids))
        found = np.full((len(prompts), self.questions.form.slots), np.nan, np.float32)
        parts = (
            read_expected(self.lm, self.questions.form, ids, _BATCH_TOKENS)
            if self.engine is None
            else read_written(self.engine, self.questions.rating, prompts, self.answer_tokens, self.written)
        )
        done, told = 0, time.monotonic()
        for places, values in parts:
            found[places] = values
            done += len(places)
            if time.monotonic() - told > _SHOWN_EVERY_S:
                told = time.monotonic()
                say(f"{NAME}: {done:,} of {len(prompts):,} {what} scored")
        return found

    def told(self) -> dict[str, float]:
        """Figures of all reading so far."""
        if self.engine is None:
            return {"tokens_read": self.tokens}
        written = self.written
        return {"tokens_read": self.tokens, "unparsed": written.unparsed, "missing_scores": written.missing}


def _measured(
    config: AlignConfig, inputs: _Inputs, questions: RatingPrompts, reader: _Reader, scores: AttributeScores
) -> dict[str, float]:
    """Measure how the scores alone rank the last event before the cut of held-out users, who were not tuned on.

    These users are scored by what is before that event. Empty if there are none.
    """
    there = np.flatnonzero(inputs.held_out & (inputs.histories.lengths > 1))
    rows = np.random.default_rng(0).permutation(there)[: config.asked]
    if not len(rows):
        return {}
    prompts = questions.of_users(inputs.firsts(rows, inputs.histories.lengths[rows] - 1))
    users = reader.read("held-out users", prompts)
    targets = inputs.histories.items[inputs.histories.ends[rows] - 1].astype(np.int64)
    return ranking_of_scores(scores, users, targets)


def _copy_adapter(source: Path, out: Path) -> None:
    for name in _ADAPTER:
        shutil.copyfile(source / name, out / name)
