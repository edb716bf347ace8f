"""`raypipe align --system lancer`: train a language model to write the next item, and measure how often it is right.

Training reads what stands before the last `hold_out` events of a history. Everybody's last event is asked for, over the
whole catalogue, beside popularity and item transitions of the same training events. A stored model can be measured with
other options, or on the data of another workspace than its own: `--adapter lancer --adapter_workspace URI`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raypipe.engines.engine import Choices, Decoding, EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, build_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.catalogue import Catalogue
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.language.prefixes import PREFIX
from raypipe.pipeline.asked_anew import asked_anew, tell_trained, tell_unread
from raypipe.pipeline.evaluate import table
from raypipe.pipeline.held_out import Cut, are_held_out
from raypipe.pipeline.job import model_result
from raypipe.pipeline.loaded import ChosenLm
from raypipe.pipeline.sequences import catalogue_of, histories_hash, pinned_versions, read_histories
from raypipe.pipeline.training_folders import Training
from raypipe.recommenders.evaluation import HeldOut, ranks_of_floor
from raypipe.recommenders.floors import Floor, Popularity, Transitions
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import TrainingResult, fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models, find_adapter, find_model
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import NAME, LancerConfig
from raypipe.systems.lancer_examples import FIRST, LancerTrainingData, prepare_lancer
from raypipe.systems.lancer_figures import EvaluationSet, measured, rank_figures
from raypipe.systems.lancer_lists import load_writer
from raypipe.systems.lancer_training import LancerTask, store_vectors

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

STEP_VERSION = 3


@dataclass(frozen=True)
class _Inputs:
    """The catalogue, everybody's whole histories, and the language model.

    `held_out` bool [users] are not trained on here. `unseen` bool [users] were not trained on either when the language
    model and a stored adapter were made.
    """

    catalogue: Catalogue
    histories: Histories
    held_out: NDArray[np.bool_]
    unseen: NDArray[np.bool_]
    lm: ChosenLm

    def evaluation_set(self, hold_out: int, most: int) -> EvaluationSet:
        """At most `most` users, drawn, and the item that each chose last.

        Raises UsageError if nobody has more than `hold_out` events.
        """
        held = HeldOut.of(self.histories, hold_out, len(self.catalogue.titles), ~self.held_out)
        if not len(held.targets):
            raise UsageError(
                f"No user has more than the {hold_out} events that are held out.", "Ingest longer histories."
            )
        rows = np.sort(np.random.default_rng(0).permutation(len(held.targets))[:most])
        prefixes = held.prefixes.take(held.prefixes.starts[rows], held.prefixes.lengths[rows])
        everybody = np.flatnonzero(self.histories.lengths > hold_out)
        part = replace(held, prefixes=prefixes, targets=held.targets[rows])
        return EvaluationSet(part, self.unseen[everybody[rows]])


@dataclass(frozen=True)
class _Figures:
    """Means by name, and the half-widths of the 95 % intervals of those that are means over users."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, float]

    @classmethod
    def of(cls, model: Model) -> _Figures:
        """The figures that were measured when the model was trained."""
        return cls(model.lineage["metrics"], model.lineage["intervals"])


def run_lancer(config: AlignConfig) -> JobResult:
    """Train a model unless one of this recipe is stored, and measure it. Raises UsageError before work starts."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    if not config.hold_out:
        raise UsageError("Every event is trained on, so that none is left to ask for.", "Set --hold_out to 1 or more.")
    if config.adapter is not None:
        return _measured_anew(config, workspace, versions, config.adapter, started)
    if config.trainer.validate_every is not None and config.hold_out < 2:
        raise UsageError(
            "The event that validates is the one before the last, and training would see it.",
            "Set --hold_out 2, or leave --trainer.validate_every out.",
        )
    inputs = _read(config, workspace, versions)
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "lancer": config.lancer.shaping_values(),
            "lm": inputs.lm.hash,
            "histories": histories_hash(workspace, versions["histories"]),
            "items": fingerprint(
                {"lines": config.lancer.lines(inputs.catalogue), "contents": config.lancer.contents(inputs.catalogue)}
            ),
        }
    )
    training = Training("align", NAME, recipe, config.lock_lease_s)
    model, status = config.trained_once(
        workspace, tracking, training, lambda: _train(config, workspace, inputs, recipe, versions)
    )
    tell_trained(tracking, model, status, model.lineage["metrics"], lm=inputs.lm.hash[:12])
    return _result(model, status, _Figures.of(model), started)


def _result(model: Model, status: str, figures: _Figures, started: float) -> JobResult:
    return replace(model_result("align", model, status, figures.metrics, started), intervals=figures.intervals)


def _read(config: AlignConfig, workspace: Workspace, versions: dict[str, int]) -> _Inputs:
    lm = ChosenLm.of(config, workspace, config.lm)
    cut, trained = Cut(config.hold_out, config.held_out_share), [] if lm.own is None else [lm.own]
    for model in trained:
        cut.check_events(model)
    inputs = _Inputs(*_known(workspace, versions, cut, trained), lm)
    check_lines(config.lancer, inputs.catalogue, lm.folder, config.answer_tokens)
    return inputs


def check_lines(options: LancerConfig, catalogue: Catalogue, lm: Path, answer_tokens: int) -> None:
    """Raise UsageError if answers are restricted to lines that cannot serve.

    That is so if two lines are the same, or if one is longer than an answer may be.
    """
    if not options.constrained:
        return
    first: dict[str, int] = {}
    for item, line in enumerate(options.lines(catalogue)):
        if (other := first.setdefault(line, item)) != item:
            raise UsageError(
                f"The items {catalogue.titles[other]!r} and {catalogue.titles[item]!r} are both written {line!r}, so that answers "
                "held to the lines could not tell them apart.",
                "Write them otherwise with --lancer.prompts.line, or leave out --lancer.constrained.",
            )
    engine = EngineConfig(lm=str(lm), device="cpu").build()
    list(engine.generate([], Decoding(max_new_tokens=answer_tokens), Choices(tuple(first))))


def _known(
    workspace: Workspace, versions: dict[str, int], cut: Cut, trained: Sequence[Model]
) -> tuple[Catalogue, Histories, NDArray[np.bool_], NDArray[np.bool_]]:
    """The catalogue in words, everybody's histories, and two masks of users, bool [users].

    The first are the users held out by this cut, the second those held out by it and from the training of all of
    `trained`.
    """
    items = workspace.tables["items"].read(versions["items"]).sort_by("index")
    catalogue = catalogue_of(items)
    users, histories = read_histories(workspace, versions["histories"])
    held_out, unseen = (are_held_out(users, share) for share in (cut.held_out_share, cut.least_share(trained)))
    return catalogue, histories, held_out, unseen


def _train(config: AlignConfig, workspace: Workspace, inputs: _Inputs, recipe: str, versions: dict[str, int]) -> Model:
    """Train, measure, and only then store the model, so that a stored model always has its figures in its lineage."""
    name = f"{NAME}-{recipe}"
    folder = config.training_folder(workspace, name)
    node = config.workers_node(workspace, config.cluster)
    evaluated = inputs.evaluation_set(config.hold_out, config.asked)
    counts, trained = _trained(config, inputs, folder, name, node)
    metrics = {
        **trained.figures(),
        **counts,
    }
    if trained.validations:
        step, best = max(trained.validations, key=lambda told: told[1])
        metrics |= {"validation_logprob": round(best, 4), "validation_step": step}
    figures = _measure(config, config.lancer, inputs, evaluated, trained.folder)
    lineage = {
        "job": "align",
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "system": NAME,
        "options": config.lancer.model_dump(mode="json"),
        **inputs.lm.lineage,
        "config": config.shaping_values(),
        "metrics": {**metrics, **figures.metrics},
        "intervals": figures.intervals,
        "training": trained.curve(),
    }
    model = Models(workspace.store).add(NAME, trained.folder, recipe, lineage)
    config.remove_training(workspace, name)
    return model


def _trained(
    config: AlignConfig, inputs: _Inputs, folder: Path, name: str, node: str | None
) -> tuple[dict[str, float], TrainingResult]:
    """Run both stages of the training.

    Returns counts, and the result of the second stage, whose checkpoint is to be stored.
    """
    lancer = config.lancer
    validated = int(config.trainer.validate_every is not None)
    seen = inputs.histories.without_last(config.hold_out - validated).of(~inputs.held_out)
    chosen = np.sort(np.random.default_rng(config.trainer.seed).permutation(len(seen))[: config.users])
    seen = seen.take(seen.starts[chosen], seen.lengths[chosen])
    backbone = load_backbone(str(inputs.lm.folder), device="cpu")
    hidden = backbone.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    card = AdapterCard(lancer.adapter, {PREFIX: hidden} if lancer.reasoning else {}, inputs.lm.hash, "")
    told = LancerTrainingData(lancer.lines(inputs.catalogue), lancer.contents(inputs.catalogue), seen, validated)
    data, seed = folder / "data", config.trainer.seed
    try:
        counts: dict[str, float] = dict(prepare_lancer(data, told, backbone, str(inputs.lm.folder), card, lancer, seed))
    except ValueError as error:
        raise UsageError(str(error), "Ingest longer histories, or lower --hold_out.") from None
    build_adapter(backbone, card, seed)  # fail here rather than in a worker if it cannot be built
    say(f"{NAME}: {counts['targets']:,} items of {len(seen):,} users are learnt, of {counts['items']:,} lines")
    config.cluster.connect()
    if lancer.first_epochs and lancer.prefix is not None:
        trainer = config.trainer.model_copy(
            update={"epochs": lancer.first_epochs, "steps": None, "validate_every": None, "average": 0.0}
        )
        first_task = LancerTask(data, "first", config.positions, config.asked)
        first = fit(first_task, trainer, f"{name}-first", folder / "first", node)
        shutil.copyfile(first.folder / FIRST, data / FIRST)
        counts |= {f"first_{figure}": value for figure, value in first.figures().items()}
    if lancer.reads_once:
        store_vectors(data)
    task = LancerTask(data, "second", config.positions, config.asked)
    return counts, fit(task, config.trainer, name, folder / "checkpoint", node)


def _measure(
    config: AlignConfig, options: LancerConfig, inputs: _Inputs, evaluated: EvaluationSet, adapter: Path
) -> _Figures:
    """The figures of the model, of the same model asked otherwise, and of the floors. They are printed as a table."""
    found = measured(
        evaluated, load_writer(options, inputs.catalogue, str(inputs.lm.folder), adapter, config.answer_tokens), _tell
    )
    training, items = evaluated.held.training, evaluated.held.items
    floors: dict[str, Floor] = {
        "popularity": Popularity(training, items),
        "transitions": Transitions(training, items),
    }
    for name, floor in floors.items():
        ranks = ranks_of_floor(floor, evaluated.held, filter_seen=options.filter_seen)
        found[name] = rank_figures(*ranks, evaluated, options)
    users = len(evaluated.held.targets)
    protocol = {"hold_out": str(config.hold_out), "seen items": "filtered" if options.filter_seen else "kept"}
    say(table(found, protocol, users))
    named = {
        figure if name == NAME else f"{name}: {figure}": mean
        for name, figures in found.items()
        for figure, mean in figures.items()
    }
    return _Figures(
        {"asked": users, "askable": evaluated.held.askable}
        | {name: round(mean.value, 4) for name, mean in named.items()},
        # For one user alone the half-width is no number.
        {name: round(mean.half_width, 6) for name, mean in named.items() if mean.half_width > 0},
    )


def _tell(what: str, done: int, of: int) -> None:
    say(f"{NAME}: {what}: {done:,} of {of:,} users asked")


def _measured_anew(
    config: AlignConfig, workspace: Workspace, versions: dict[str, int], named: str, started: float
) -> JobResult:
    """Measure a stored model on this workspace's data, which need not be what it was trained on."""
    home = workspace if config.adapter_workspace is None else Workspace(config.adapter_workspace)
    adapter = find_adapter(Models(home.store), named, NAME)
    cut, trained = Cut(config.hold_out, config.held_out_share), list[Model]()
    lm = _language_model(config, home, adapter)
    if home.store.uri == workspace.store.uri:
        trained = [adapter] if lm.own is None else [adapter, lm.own]
    inputs = _Inputs(*_known(workspace, versions, cut, trained), lm)
    tell_unread(NAME, config.lancer, adapter.lineage["options"])
    options = LancerConfig.model_validate(asked_anew(NAME, config.lancer, adapter.lineage["options"]))
    check_lines(options, inputs.catalogue, lm.folder, config.answer_tokens)
    figures = _measure(
        config, options, inputs, inputs.evaluation_set(config.hold_out, config.asked), config.fetch(home, adapter)
    )
    return _result(adapter, "ok", figures, started)


def _language_model(config: AlignConfig, home: Workspace, adapter: Model) -> ChosenLm:
    """The language model beside which the adapter was trained.

    Raises UsageError if --lm has to name it and names another.
    """
    if named := adapter.lineage["lm_model"]:
        own = find_model(Models(home.store), named)
        return ChosenLm(config.fetch(home, own), adapter.lineage["lm"], own)
    folder = resolve_checkpoint(config.lm)
    if (content := checkpoint_hash(folder)) != adapter.lineage["lm"]:
        raise UsageError(
            f"The adapter {adapter.name} was trained beside another language model than {config.lm}.",
            "Name that one with --lm.",
        )
    return ChosenLm(folder, content, None)
