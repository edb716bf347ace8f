"""`raypipe align`: train an adapter between a recommender and a language model, and measure it on users it never saw.

The recommender and the language model stay unchanged. The adapter between them is trained on the states of users who
are not held out, and asked about the held-out users. The controls ask the same questions without any state, and with
another user's state.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from raypipe.config import first_problem
from raypipe.engines.engine import Decoding, EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, build_adapter, load_adapter, read_card
from raypipe.language.alignment import AlignmentTask, prepare_alignment
from raypipe.language.backbone import load_backbone
from raypipe.pipeline.align_options import AlignConfig, AlignOptions
from raypipe.pipeline.align_record import record
from raypipe.pipeline.asked_anew import as_trained, asked_anew, tell_measured, tell_trained
from raypipe.pipeline.guided import run_guided
from raypipe.pipeline.held_out import Cut, are_held_out, share_of
from raypipe.pipeline.job import model_result
from raypipe.pipeline.judge_engines import Identities, identities_of, judge_params_of, spent_on_judges, with_judges
from raypipe.pipeline.lancer import run_lancer
from raypipe.pipeline.loaded import ChosenLm, Loaded
from raypipe.pipeline.past_summaries import summaries_before, unread_by_writers, variant_of
from raypipe.pipeline.replay import read_replay
from raypipe.pipeline.sampling_seeds import known_seeds, read_event_seeds
from raypipe.pipeline.sequences import catalogue_of, histories_hash, pinned_versions, read_histories
from raypipe.pipeline.training_folders import Training, prepared_once
from raypipe.pipeline.trsr import run_trsr
from raypipe.recommenders.recommender import freeze, weights_hash
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models, find_adapter
from raypipe.storage.tracking import Tracking
from raypipe.storage.workspace import Workspace
from raypipe.systems.projection import AdaptedLm
from raypipe.systems.source import Source
from raypipe.systems.system import System

JOB = "align"
STEP_VERSIONS = {"recinterpreter": 8, "recexplainer": 7}
_ASKED_AT_LEAST = 2


@dataclass(frozen=True)
class _Inputs:
    """The recommender (NAME/HASH) and the language model to join, and the data up to the cut.

    `unread` is the share of the users whom the language models that wrote summaries have not read, None if it is not
    known. `unseen` is True if no model involved was trained on the held-out users.
    """

    recommender: str
    lm: ChosenLm
    source: Source
    unread: float | None
    unseen: bool

    def check_room(self, system: System, answer_tokens: int) -> None:
        """Raise UsageError, before training, if answers are restricted to titles that are longer than an answer."""
        if held := system.choices(self.source):
            engine = EngineConfig(lm=str(self.lm.folder)).build()
            for choices in held:
                list(engine.generate([], Decoding(max_new_tokens=answer_tokens), choices))

    def measure(self, config: AlignConfig, system: System, adapter: Path) -> dict[str, float]:
        engine = EngineConfig(lm=str(self.lm.folder), adapter=str(adapter)).build()
        told = system.measured(self.source, engine, config.asked, config.answer_tokens)
        refused = {name.removeprefix("refused "): n for name, n in told.items() if name.startswith("refused ") and n}
        if refused:
            counts = ", ".join(f"{n:,.0f} of {task}" for task, n in refused.items())
            say(f"{JOB}: questions that could not be asked count as answers that say nothing: {counts}")
        if config.beside:
            backbone = load_backbone(str(self.lm.folder), device="cpu")
            adapted = AdaptedLm(backbone, load_adapter(adapter, backbone, self.lm.hash), read_card(adapter))
            bare = EngineConfig(lm=str(self.lm.folder)).build()
            sizes = (config.users, config.positions, config.asked, config.answer_tokens)
            told |= system.beside(self.source, adapted, bare, *sizes)
        return {"unseen_by_all": int(self.unseen), **told}


def run_align(config: AlignConfig) -> JobResult:
    """Train the adapter unless one of this recipe is stored, then measure it and record the figures.

    Raises UsageError before work starts.
    """
    # Before measuring and recording: both have to use the same cut and summaries.
    config = as_trained(config)
    result, judges = _joined(config)
    record(config, result, judges)
    return result


def _joined(config: AlignConfig) -> tuple[JobResult, Identities]:
    """The result, and who judged a stored adapter; a model that is trained has its judges in its lineage."""
    if config.system == "guided":
        return run_guided(config), {}
    if config.system == "trsr":
        return run_trsr(config), {}
    if config.system == "lancer":
        return run_lancer(config), {}
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    stored = None if config.adapter is None else find_adapter(Models(workspace.store), config.adapter, config.system)
    inputs = _read(config, workspace, versions["histories"], stored)
    if stored is not None:
        return _transferred(config, workspace, tracking, inputs, stored, started)
    system = with_judges(config, workspace, config.chosen()).build()
    catalogue = inputs.source.catalogue
    recipe = fingerprint(
        {
            "step": STEP_VERSIONS[config.system],
            "config": config.shaping_values(),
            "system": [system.name, config.chosen().shaping_values()],
            "recommender": inputs.recommender,
            "lm": inputs.lm.hash,
            "histories": histories_hash(workspace, versions["histories"]),
            "titles": list(catalogue.titles),
            "summaries": sorted(inputs.source.summaries.items()),
            "replay": [[example.prompt.text, example.answer] for example in inputs.source.replay],
            "attributes": [[name, list(values)] for item in catalogue.attributes for name, values in item.items()],
        }
    )
    inputs.check_room(system, config.answer_tokens)

    def train() -> Model:
        before = weights_hash(inputs.source.recommender)
        model = _train(config, workspace, inputs, system, recipe, versions)
        assert weights_hash(inputs.source.recommender) == before, "the recommender is frozen"
        return model

    training = Training(JOB, system.name, recipe, config.lock_lease_s)
    model, status = config.trained_once(workspace, tracking, training, train)
    result = model_result(JOB, model, status, model.lineage["metrics"], started, spent_on_judges(system))
    judged = judge_params_of(config.chosen(), system) if status == "ok" else {}
    made_of = {"recommender": inputs.recommender, "lm": inputs.lm.hash[:12], **judged}
    tell_trained(tracking, model, status, {**result.metrics, **result.cost}, **made_of)
    return result, {}


def _read(config: AlignConfig, workspace: Workspace, version: int, adapter: Model | None) -> _Inputs:
    loaded = Loaded.of(config, workspace, config.model)
    freeze(loaded.recommender)
    parts = [loaded.model] if adapter is None else [loaded.model, adapter]
    lm = ChosenLm.of(config, workspace, config.lm)
    parts += [] if lm.own is None else [lm.own]
    for part in parts:
        Cut(config.hold_out, 0.0).check_events(part)
    saw = [part.name for part in parts if share_of(part) < config.held_out_share]
    variant = None if config.summaries is None else variant_of(config.summaries, config.hold_out)
    unread = unread_by_writers(workspace, variant, adapter)
    if unread is not None and unread < config.held_out_share:
        saw.append("the language model that wrote the summaries")
    if saw:
        say(
            f"{JOB}: {' and '.join(saw)} may have been trained on users who are asked about here: the figures are too good "
            f"unless trained with --held_out_share {config.held_out_share}"
        )
    users, whole = read_histories(workspace, version)
    histories = whole.without_last(config.hold_out).within(loaded.recommender.items)
    seeds = None
    if loaded.recommender.samples:  # Labels and oracles take the same seeds as its lists.
        drawn = read_event_seeds(workspace, version, loaded.items)
        seeds = known_seeds(drawn, whole, config.hold_out, loaded.recommender.items)
    held_out = are_held_out(users, config.held_out_share)
    long_enough = histories.lengths > 1
    asked = min(int((held_out & long_enough).sum()), config.asked)
    if asked < _ASKED_AT_LEAST or not (~held_out & long_enough).any():
        raise UsageError(
            f"Of {len(users):,} users {int(held_out.sum()):,} are held out, and of those with two events {asked:,} are asked about. "
            f"Controls ask with another's state: it takes {_ASKED_AT_LEAST} of them, and somebody to learn from.",
            "Ingest more users, or change --held_out_share or --asked.",
        )
    # The recommender has no vectors of items that came after its training.
    catalogue = catalogue_of(loaded.items).first(loaded.recommender.items)
    replay = read_replay(config.replay) if config.replay is not None else []
    summaries = {}
    if config.summaries is not None:
        summaries = summaries_before(workspace, config.summaries, config.hold_out, users)
    source = Source(loaded.recommender, histories, held_out, catalogue, summaries, replay, seeds=seeds)
    return _Inputs(f"{loaded.model.name}/{loaded.model.hash}", lm, source, unread, not saw)


def _train(
    config: AlignConfig, workspace: Workspace, inputs: _Inputs, system: System, recipe: str, versions: dict[str, int]
) -> Model:
    """Train, measure, and only then store the model, so that a stored model always has its figures in its lineage."""
    judges = identities_of(system)  # a judge that cannot be asked is told before work starts
    name = f"{system.name}-{recipe}"
    folder = config.training_folder(workspace, name)
    node = config.workers_node(workspace, config.cluster)
    width = inputs.source.recommender.width
    card = AdapterCard(
        system.adapter, dict.fromkeys(system.adapter.projectors, width), inputs.lm.hash, inputs.recommender
    )
    backbone = load_backbone(str(inputs.lm.folder), device="cpu")
    build_adapter(backbone, card)  # fail here rather than in a worker if it cannot be built
    rng = np.random.default_rng(config.trainer.seed)

    def prepare() -> dict[str, int]:
        return prepare_alignment(
            folder / "data",
            system.examples(inputs.source, config.users, config.positions, rng),
            backbone,
            backbone.ends[0],
            backbone.context,
            str(inputs.lm.folder),
            card,
            config.trainer.seed,
        )

    try:
        counts = prepared_once(folder / "data", inputs.lm.folder, prepare)
    except ValueError as error:
        raise UsageError(str(error), "Ask for fewer titles, or name a language model of a longer context.") from None
    say(f"{JOB}: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    config.cluster.connect()
    trained = fit(AlignmentTask(folder / "data"), config.trainer, name, folder / "checkpoint", node)
    metrics = {
        **trained.figures(),
        **counts,
        **inputs.measure(config, system, trained.folder),
    }
    lineage = {
        "job": JOB,
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "system": config.system,
        "options": config.chosen().model_dump(mode="json"),
        "judges": judges or None,
        **inputs.lm.lineage,
        "recommender": inputs.recommender,
        "summaries": config.summaries,
        "summaries_held_out_share": inputs.unread,
        "replay": config.replay,
        "config": config.shaping_values(),
        "metrics": metrics,
        "training": trained.curve(),
    }
    model = Models(workspace.store).add(system.name, trained.folder, recipe, lineage)
    config.remove_training(workspace, name)
    return model


def _transferred(
    config: AlignConfig, workspace: Workspace, tracking: Tracking, inputs: _Inputs, adapter: Model, started: float
) -> tuple[JobResult, Identities]:
    """Measure a stored adapter on this recommender's states. The recommender need not be the one it was trained beside.

    Raises UsageError if their widths differ, or if the options given do not fit the adapter's.
    """
    folder = config.fetch(workspace, adapter)
    widths, width = set(read_card(folder).widths.values()), inputs.source.recommender.width
    if widths - {width}:
        raise UsageError(
            f"The adapter {adapter.name} reads vectors of {widths.pop()}, and {inputs.recommender}'s are of {width}.",
            "Name a recommender of the adapter's width with --model.",
        )
    name = config.system
    anew = asked_anew(name, getattr(config, name), adapter.lineage["options"])
    try:
        options = AlignOptions.model_validate({"system": name, name: anew})
    except ValidationError as error:
        raise UsageError(
            f"The adapter {adapter.name} cannot be measured so: {first_problem(error)}.",
            "Change the options of its system.",
        ) from None
    system = with_judges(config, workspace, options.chosen()).build()
    metrics = inputs.measure(config, system, folder)
    result = model_result(JOB, adapter, "ok", metrics, started, spent_on_judges(system))
    judges = identities_of(system)
    made_of = {
        "recommender": inputs.recommender,
        "lm": inputs.lm.hash[:12],
        **judge_params_of(options.chosen(), system),
    }
    tell_measured(tracking, config, result, {"options": anew, "judges": judges}, **made_of)
    return result, judges
