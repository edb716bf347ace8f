"""`raypipe align --system trsr`: train a language model to say yes or no to candidates, and measure how it ranks them.

It is measured beside scorers that rank the same candidates without a language model. Everybody's next item is asked
for, among the stored candidates. Training reads what stands before the last `hold_out` events. Summaries are read as
`summarize --summaries.hold_out N` wrote them: with N as here for the users who are asked, and with larger N (or of
blocks, if they are recurrent) for what training reads, so that no prompt tells of its own answer.

The ranks are stored with the model, by user, so that another model's ranks of the same candidates can be compared with
them user by user.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe.data.candidates import CandidateSets, candidate_sets
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, build_adapter
from raypipe.language.alignment import prepare_alignment
from raypipe.language.backbone import load_backbone
from raypipe.pipeline.asked_anew import asked_anew, tell_trained, tell_unread
from raypipe.pipeline.candidates import stored_candidates
from raypipe.pipeline.forgotten import leave_out_forgotten
from raypipe.pipeline.held_out import Cut, are_held_out
from raypipe.pipeline.job import model_result
from raypipe.pipeline.loaded import ChosenLm, Loaded
from raypipe.pipeline.past_summaries import past_summaries
from raypipe.pipeline.sequences import catalogue_of, histories_hash, pinned_versions, read_histories
from raypipe.pipeline.training_folders import Training, prepared_once
from raypipe.pipeline.trsr_measures import (
    ModelRanks,
    RankingInputs,
    check_comparable,
    compared,
    measure,
    ranker_of,
    save_ranks,
    tell_shown,
)
from raypipe.recommenders.recommender import freeze
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import mix
from raypipe.storage.ledger import Usage
from raypipe.storage.models import Model, Models, find_adapter, find_model
from raypipe.storage.workspace import Workspace
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.trsr import NAME, Trsr, TrsrConfig
from raypipe.systems.trsr_past import Past, PastSummaries
from raypipe.systems.trsr_training import RankingTask, prepare_validation

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

STEP_VERSION = 6
_MANY_WITHOUT = 0.2


def run_trsr(config: AlignConfig) -> JobResult:
    """Train a model unless one of this recipe is stored, and measure it. Raises UsageError before work starts."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    models = Models(workspace.store)
    against = None if config.trsr.against is None else find_model(models, config.trsr.against)
    if config.adapter is not None:
        return _measured_anew(config, workspace, versions, find_adapter(models, config.adapter, NAME), against, started)
    inputs = _read(config, workspace, versions, cuts_of(config))
    if against is not None:
        check_comparable(against, inputs.sets_key)
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "trsr": config.trsr.shaping_values(),
            "lm": inputs.lm.hash,
            "recommender": inputs.recommender,
            "histories": histories_hash(workspace, versions["histories"]),
            "catalogue": fingerprint({"lines": config.trsr.lines(inputs.past.catalogue)}),
            "summaries": fingerprint(
                {"texts": sorted((row, *mine) for row, mine in inputs.past.summaries.texts.items())}
            ),
        }
    )
    spent: list[Usage] = []

    def train() -> Model:
        model, usage = _train(config, workspace, inputs, recipe, versions)
        spent.append(usage)
        return model

    training = Training("align", NAME, recipe, config.lock_lease_s)
    model, status = config.trained_once(workspace, tracking, training, train)
    metrics = dict(model.lineage["metrics"])
    if against is not None:
        metrics |= compared(ModelRanks.stored(workspace, model), workspace, against)
    tell_trained(tracking, model, status, metrics, lm=inputs.lm.hash[:12])
    return model_result("align", model, status, metrics, started, *spent)


def cuts_of(config: AlignConfig) -> range:
    """How many last events the summaries in prompts leave out.

    The range has a cut for the event that is asked about, for the one that is validated, and for every place that is
    learnt.
    """
    return range(config.hold_out, config.hold_out + _left(config) + config.positions + 1)


def _read(config: AlignConfig, workspace: Workspace, versions: dict[str, int], cuts: range) -> RankingInputs:
    """What is asked, with summaries of all but the last events that `cuts` tells."""
    if not config.hold_out:
        raise UsageError("Every event is trained on, so that none is left to ask for.", "Set --hold_out to 1 or more.")
    cut = Cut(config.hold_out, config.held_out_share)
    loaded = Loaded.of(config, workspace, config.model)
    freeze(loaded.recommender)
    cut.check_events(loaded.model)
    lm = ChosenLm.of(config, workspace, config.lm)
    if lm.own is not None:
        cut.check_events(lm.own)
    users, whole = read_histories(workspace, versions["histories"])
    catalogue = catalogue_of(loaded.items)
    summaries = PastSummaries()
    if config.summaries is not None:
        blocks = config.trsr.block_items
        summaries = past_summaries(workspace, config.summaries, cuts, blocks, users, whole.lengths)
    key, sets = stored_candidates(workspace, versions, config.hold_out, config.trsr.candidates)
    if not len(sets):
        raise UsageError(
            f"No user has two events before the last {config.hold_out} and leaves {config.trsr.candidates.negatives} items unseen.",
            "Ingest more users or items, or lower --trsr.candidates.negatives.",
        )
    chosen = np.sort(np.random.default_rng(0).permutation(len(sets))[: config.asked])
    sets = CandidateSets(sets.keys[chosen], sets.items[chosen], sets.places[chosen])
    assert whole.users is not None
    order = np.argsort(whole.users)
    rows = order[np.searchsorted(whole.users, sets.keys, sorter=order)]
    past = Past(whole.without_last(config.hold_out), are_held_out(users, config.held_out_share), catalogue, summaries)
    return RankingInputs(past, lm, loaded, sets, key, rows)


def _left(config: AlignConfig) -> int:
    """How many events before the cut training leaves to validation."""
    return int(config.trainer.validate_every is not None)


def _train(
    config: AlignConfig, workspace: Workspace, inputs: RankingInputs, recipe: str, versions: dict[str, int]
) -> tuple[Model, Usage]:
    """Train, measure, and only then store the model, so that a stored model always has its figures in its lineage.

    Its ranks are stored beside it. Returns the model, and what asking it took.
    """
    name = f"{NAME}-{recipe}"
    folder = config.training_folder(workspace, name)
    node = config.workers_node(workspace, config.cluster)
    card = AdapterCard(config.trsr.adapter, {}, inputs.lm.hash, "")
    backbone = load_backbone(str(inputs.lm.folder), device="cpu")
    trsr = ranker_of(config.trsr, inputs, backbone)
    build_adapter(backbone, card)  # fail here rather than in a worker if it cannot be built
    shown = tell_shown(trsr, inputs, backbone.context)
    rng = np.random.default_rng(config.trainer.seed)

    def prepare() -> dict[str, int]:
        left_out = {}
        if _left(config):
            left_out["validation_left_out"] = _prepare_validation(
                config, inputs, trsr, backbone.context, folder / "data"
            )
        return left_out | prepare_alignment(
            folder / "data",
            trsr.examples(config.users, config.positions, _left(config), rng),
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
        raise UsageError(str(error), "Ingest longer histories, or name a language model of a longer context.") from None
    say(f"{NAME}: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    if config.summaries is not None:
        counts["learnt_without_summary"] = _without_summary(config, inputs)
    config.cluster.connect()
    trained = fit(RankingTask(folder / "data"), config.trainer, name, folder / "checkpoint", node)
    measured = measure(config, trsr, inputs, trained.folder)
    metrics = {
        **trained.figures(),
        **counts,
        **inputs.past.summaries.cost,
        **shown,
        **measured.metrics,
    }
    if trained.validations:
        metrics["validation_recalls"] = round(max(value for _, value in trained.validations), 4)
    if config.trsr.facts:
        trsr.facts().save(trained.folder)
    save_ranks(trained.folder, inputs.sets.keys, measured.ranks)
    leave_out_forgotten(workspace, trained.folder)
    lineage = {
        "job": "align",
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "system": NAME,
        "options": config.trsr.model_dump(mode="json"),
        "config": config.shaping_values(),
        "training": trained.curve(),
        **inputs.lm.lineage,
        "recommender": inputs.recommender,
        "summaries": config.summaries,
        "candidates": inputs.sets_key,
        "metrics": metrics,
    }
    model = Models(workspace.store).add(NAME, trained.folder, recipe, lineage)
    config.remove_training(workspace, name)
    return model, measured.usage


def _without_summary(config: AlignConfig, inputs: RankingInputs) -> float:
    """The share of the learnt places without a summary of what came before. Warns if it is large."""
    past, backs = inputs.past, range(_left(config) + 1, _left(config) + config.positions + 1)
    rows = np.flatnonzero(~past.held_out)
    told = [
        past.summaries.at(row, length - back) is not None
        for row, length in zip(rows.tolist(), past.histories.lengths[rows].tolist(), strict=True)
        for back in backs
        if length > back
    ]
    share = 1 - sum(told) / max(1, len(told))
    if share > _MANY_WITHOUT:
        cuts = ", ".join(str(config.hold_out + back) for back in backs)
        say(
            f"{NAME}: {share:.0%} of what is learnt has no summary of what came before it, and what is asked has one, so that the "
            f"language model hardly learns to read them: write those without the last {cuts} events too, with `raypipe summarize "
            f"--summaries.paradigm {config.summaries} --summaries.hold_out N`",
            "warning",
        )
    return round(share, 4)


def _prepare_validation(config: AlignConfig, inputs: RankingInputs, trsr: Trsr, context: int, folder: Path) -> int:
    """Prepare the questions that validate; return how many are left out.

    They ask for the last event before the cut of the asked users who are not held out, among as many candidates, drawn
    anew. Raises UsageError if nobody can validate.
    """
    histories, options = inputs.past.histories, config.trsr.candidates
    rows = inputs.rows[~inputs.past.held_out[inputs.rows]]
    seen = histories.take(histories.starts[rows], histories.lengths[rows])
    assert seen.users is not None
    seeds = mix(seen.users.view(np.uint64) ^ np.uint64(options.seed))
    targets = histories.items[histories.ends[rows] - 1]
    sets, filled = candidate_sets(
        seen.users, seeds, targets, seen.items, seen.lengths, len(trsr.lines), options.negatives
    )
    rows = rows[filled]
    if not len(rows):
        raise UsageError(
            f"Of the {len(inputs.rows):,} users who are asked nobody can validate: they are held out from training, or leave fewer "
            f"than {options.negatives} items unseen.",
            "Raise --asked, lower --held_out_share, or set --trainer.validate_every to null.",
        )
    prompts = trsr.prompts(rows, 1, sets.items, trsr.summaries(rows, 1))
    return prepare_validation(folder, prompts, sets.places, trsr.tokenizer, trsr.answers, context)


def _measured_anew(
    config: AlignConfig,
    workspace: Workspace,
    versions: dict[str, int],
    adapter: Model,
    against: Model | None,
    started: float,
) -> JobResult:
    """Measure a stored model as it is asked here.

    It may be asked with other summaries, fewer items, or summaries or events that are missing or wrong. Nothing is learnt, so that
    only summaries of what stands before the cut are needed.
    """
    tell_unread(NAME, config.trsr, adapter.lineage["options"])
    options = TrsrConfig.model_validate(asked_anew(NAME, config.trsr, adapter.lineage["options"]))
    cuts = range(config.hold_out, config.hold_out + 1)
    inputs = _read(config.model_copy(update={NAME: options}), workspace, versions, cuts)
    if against is not None:
        check_comparable(against, inputs.sets_key)
    folder = config.fetch(workspace, adapter)
    if options.facts:
        Facts.load(folder, len(inputs.past.catalogue.titles))  # refuses those of another version
    backbone = load_backbone(str(inputs.lm.folder), device="cpu")
    trsr = ranker_of(options, inputs, backbone)
    shown = tell_shown(trsr, inputs, backbone.context)
    measured = measure(config, trsr, inputs, folder)
    metrics = {**shown, **measured.metrics}
    if against is not None:
        metrics |= compared(ModelRanks(inputs.sets.keys, *measured.ranks[""]), workspace, against)
    return model_result("align", adapter, "ok", metrics, started, measured.usage)
