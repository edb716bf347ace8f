"""`raypipe align --system trsr`: a language model that says yes or no to candidates, beside what ranks the same candidates without.

What comes next of every user is asked for, among the stored candidates; training reads what stands before the last `hold_out`
events. Summaries are read as `summarize --summaries.hold_out N` wrote them: of N as here for the asked, of larger N (or, where
they are recurrent, of blocks) for what training reads, so that no prompt tells of its own answer.

The ranks are stored with the model, by user: another model's, of the same candidates, are compared with them one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from raypipe.data.candidates import CandidateSets, candidate_sets
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, build_adapter
from raypipe.language.alignment import prepare_alignment
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.language.instructions import Catalogue
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.language.titles import distinct_titles
from raypipe.metrics.comparison import paired_bootstrap
from raypipe.metrics.ranking import candidate_metrics
from raypipe.pipeline.candidates import stored_candidates
from raypipe.pipeline.held_out import Cut, are_held_out
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.loaded import Loaded, find_builtin_lm, is_builtin
from raypipe.pipeline.past_summaries import past_summaries
from raypipe.pipeline.sequences import histories_hash, pinned_versions, read_histories
from raypipe.recommenders.floors import Floor, Popularity, Transitions
from raypipe.recommenders.ranking import batches_by_length, candidate_scores
from raypipe.recommenders.recommender import freeze
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.trainer import fit
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import mix
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import hold
from raypipe.storage.models import Model, Models, find_model
from raypipe.storage.workspace import Workspace
from raypipe.systems.trsr import NAME, Control, Past, PastSummaries, Trsr, TrsrConfig
from raypipe.systems.trsr_training import RankingTask, prepare_validation

if TYPE_CHECKING:
    from raypipe.pipeline.align import AlignConfig

STEP_VERSION = 1
_RANKS = "ranks.safetensors"
_SHOWN_EVERY_S = 10.0
_COMPARED = ("Recall@3", "MRR@3")
_ASKED_ANEW = {"recent", "history", "missing", "noise", "controls"}
"""Options that say how a stored one is asked."""
Ranks = dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
"""By scorer, of each asked user how many candidates stand above the chosen one, and how many beside it, itself included."""


@dataclass(frozen=True)
class _Inputs:
    """What is known up to the cut and by which models, and the users who are asked, by their `rows` in the histories."""

    past: Past
    lm: Path
    lm_hash: str
    loaded: Loaded
    sets: CandidateSets
    sets_key: str
    rows: NDArray[np.int64]

    @property
    def prefixes(self) -> Histories:
        """Of those who are asked."""
        histories = self.past.histories
        return histories.take(histories.starts[self.rows], histories.lengths[self.rows])


def run_trsr(config: AlignConfig) -> JobResult:
    """Train unless one of this recipe is stored, and measure it. Raises UsageError before work starts."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    versions = pinned_versions(workspace)
    models = Models(workspace.store)
    against = None if config.trsr.against is None else find_model(models, config.trsr.against)
    inputs = _read(config, workspace, versions)
    if config.adapter is not None:
        return _measured_anew(config, workspace, inputs, find_model(models, config.adapter), started)
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "trsr": config.trsr.shaping_values(),
            "lm": inputs.lm_hash,
            "recommender": f"{inputs.loaded.model.name}/{inputs.loaded.model.hash}",
            "histories": histories_hash(workspace, versions["histories"]),
            "catalogue": fingerprint({"lines": config.trsr.lines(inputs.past.catalogue)}),
            "summaries": fingerprint(
                {"texts": sorted((row, *mine) for row, mine in inputs.past.summaries.texts.items())}
            ),
        }
    )
    with hold(workspace.store, [f"models-{NAME}"], NAME, config.lock_lease_s):
        status = "nothing_to_do"
        if (model := models.newest(NAME, recipe)) is None:
            status, model = "ok", _train(config, workspace, inputs, recipe, versions)
        tracking.register(model)
    metrics = dict(model.lineage["metrics"])
    if against is not None:
        metrics |= _compared(config, workspace, model, against)
    if status == "ok":
        tracking.log_run(NAME, recipe, {"model": model.hash, "lm": inputs.lm_hash[:12]}, metrics)
    return _result(model, status, metrics, started)


def _read(config: AlignConfig, workspace: Workspace, versions: dict[str, int]) -> _Inputs:
    if not config.hold_out:
        raise UsageError("Every event is trained on, so that none is left to ask for.", "Set --hold_out to 1 or more.")
    cut = Cut(config.hold_out, config.held_out_share)
    loaded = Loaded.of(config, workspace, config.model)
    freeze(loaded.recommender)
    cut.check_events(loaded.model)
    if is_builtin(config.lm):
        model = find_builtin_lm(workspace, "--lm", config.lm)
        cut.check_events(model)
        lm = config.fetch(workspace, model)
    else:
        lm = resolve_checkpoint(config.lm)
    users, whole = read_histories(workspace, versions["histories"])
    ids = loaded.items["item_id"].to_pylist()
    catalogue = Catalogue(
        distinct_titles(loaded.items["title"].to_pylist(), ids),
        [dict(pairs) for pairs in loaded.items["attributes"].to_pylist()],
        loaded.items["text"].to_pylist(),
    )
    summaries = PastSummaries()
    if config.summaries is not None:
        first_learnt = config.hold_out + 1 + _left(config)
        needed = (config.hold_out, first_learnt)
        summaries = past_summaries(workspace, config.summaries, needed, config.trsr.block_items, users, whole.lengths)
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
    return _Inputs(past, lm, checkpoint_hash(lm), loaded, sets, key, rows)


def _left(config: AlignConfig) -> int:
    """Events before the cut that training leaves to validation."""
    return int(config.trainer.validate_every is not None)


def _train(config: AlignConfig, workspace: Workspace, inputs: _Inputs, recipe: str, versions: dict[str, int]) -> Model:
    """Train, measure, and only then store: who finds the model finds its figures in the lineage, and its ranks beside it."""
    name = f"{NAME}-{recipe}"
    folder = config.training_folder(workspace, name)
    card = AdapterCard(config.trsr.adapter, {}, inputs.lm_hash, "")
    backbone = load_backbone(str(inputs.lm), device="cpu")
    trsr = _recommender(config.trsr, inputs, backbone)
    build_adapter(backbone, card)  # what cannot be built is told here, and not by a worker
    rng = np.random.default_rng(config.trainer.seed)
    if _left(config):
        _prepare_validation(config, inputs, trsr, folder / "data")
    try:
        counts = prepare_alignment(
            folder / "data",
            trsr.examples(config.users, config.positions, _left(config), rng),
            backbone,
            backbone.ends[0],
            backbone.context,
            str(inputs.lm),
            card,
            config.trainer.seed,
        )
    except ValueError as error:
        raise UsageError(str(error), "Ingest longer histories, or name a language model of a longer context.") from None
    say(f"{NAME}: training on {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    config.cluster.connect()
    trained = fit(RankingTask(folder / "data"), config.trainer, name, folder / "checkpoint")
    measured, ranks = _measure(config, config.trsr, inputs, trained.folder)
    metrics = {
        "loss_first": float(np.mean(trained.losses[:10])),
        "loss_last": float(np.mean(trained.losses[-10:])),
        "steps": trained.steps,
        "train_seconds": round(trained.seconds, 1),
        **counts,
        **inputs.past.summaries.cost,
        **measured,
    }
    if trained.validations:
        metrics["validation_recalls"] = round(max(value for _, value in trained.validations), 4)
    _save_ranks(trained.folder / _RANKS, inputs.sets.keys, ranks)
    lineage = {
        "job": "align",
        "versions": versions,
        "hold_out": config.hold_out,
        "held_out_share": config.held_out_share,
        "seed": config.trainer.seed,
        "system": NAME,
        "options": config.trsr.model_dump(mode="json"),
        "config": config.shaping_values(),
        "candidates": inputs.sets_key,
        "metrics": metrics,
    }
    model = Models(workspace.store).add(NAME, trained.folder, recipe, lineage)
    workspace.store.delete_folder(f"staging/{name}")
    return model


def _recommender(options: TrsrConfig, inputs: _Inputs, backbone: Backbone) -> Trsr:
    try:
        return Trsr(options, inputs.past, backbone, backbone.context)
    except ValueError as error:
        raise UsageError(str(error), "Name another language model with --lm.") from None


def _prepare_validation(config: AlignConfig, inputs: _Inputs, trsr: Trsr, folder: Path) -> None:
    """Of the asked the last event before the cut, among as many candidates, drawn anew."""
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
    events = histories.lengths[rows] - 1
    prompts = trsr.prompts(rows, events, sets.items, trsr.summaries(rows, events))
    prepare_validation(folder, prompts, sets.places, trsr.tokenizer, trsr.answers)


def _measure(
    config: AlignConfig, options: TrsrConfig, inputs: _Inputs, adapter: Path
) -> tuple[dict[str, float], Ranks]:
    """Figures and ranks of the model, of the model asked as its controls say, and of what ranks without it."""
    engine = EngineConfig(lm=str(inputs.lm), adapter=str(adapter)).build()
    trsr = _recommender(options, inputs, load_backbone(str(inputs.lm), device="cpu"))
    controls: tuple[Control, ...] = options.controls if inputs.past.summaries.texts else ()
    sets, ranks = inputs.sets, Ranks()
    metrics: dict[str, float] = {"asked": len(sets)}
    scores = np.zeros(sets.items.shape)
    for control in (None, *controls):
        started = told = time.monotonic()
        tokens = refused = 0
        for scored in trsr.scores(engine, inputs.rows, sets, control):
            scores[scored.part] = scored.yes
            tokens, refused = tokens + scored.tokens, refused + scored.refused
            if time.monotonic() - told > _SHOWN_EVERY_S:
                told = time.monotonic()
                say(
                    f"{NAME}: {control or 'candidates'}: {min(scored.part.stop, len(sets)):,} of {len(sets):,} users ranked"
                )
        ranks[control or ""] = sets.ranks(scores)
        if control is None:
            metrics["refused"], metrics["tokens_asked"] = refused, tokens
        metrics[_named(control, "seconds")] = round(time.monotonic() - started, 1)
    for name, scorer in _others(config, options, inputs).items():
        started = time.monotonic()
        ranks[name] = sets.ranks(scorer())
        metrics[_named(name, "seconds")] = round(time.monotonic() - started, 1)
    for name, mine in ranks.items():
        for figure, values in candidate_metrics(*mine).items():
            metrics[_named(name, figure)] = round(float(values.mean()), 4)
    return metrics, ranks


def _others(config: AlignConfig, options: TrsrConfig, inputs: _Inputs) -> dict[str, Callable[[], NDArray[np.floating]]]:
    """What ranks the same candidates without a language model, by name. The seconds of a floor and of the trees are those of
    learning too; a recommender was trained before."""
    prefixes, candidates, histories = inputs.prefixes, inputs.sets.items, inputs.past.histories
    catalogue, items = inputs.past.catalogue, len(inputs.past.catalogue.titles)

    def of_floor(floor: Floor) -> NDArray[np.floating]:
        found = np.zeros(candidates.shape, np.float32)
        for rows in batches_by_length(prefixes, max_length=options.history):
            told = floor.scores(prefixes.take(prefixes.starts[rows], prefixes.lengths[rows]))
            found[rows] = np.take_along_axis(told, candidates[rows], 1)
        return found

    def trees() -> NDArray[np.floating]:
        texts = [
            f"{line} {text}" for line, text in zip(catalogue.lines(SummaryPrompts()), catalogue.texts, strict=True)
        ]
        return options.trees.fit(histories, texts).scores(prefixes, candidates)

    others: dict[str, Callable[[], NDArray[np.floating]]] = {
        "popularity": lambda: of_floor(Popularity(histories, items)),
        "transitions": lambda: of_floor(Transitions(histories, items)),
        inputs.loaded.model.name: lambda: candidate_scores(inputs.loaded.recommender, prefixes, candidates),
    }
    return others | ({"boosted trees": trees} if config.beside else {})


def _named(scorer: str | None, figure: str) -> str:
    return f"{scorer}: {figure}" if scorer else figure


def _save_ranks(path: Path, keys: NDArray[np.int64], ranks: Ranks) -> None:
    arrays = {"keys": keys}
    for name, (above, same) in ranks.items():
        arrays |= {f"above/{name}": above.astype(np.int32), f"same/{name}": same.astype(np.int32)}
    save_file(arrays, path)


def _compared(config: AlignConfig, workspace: Workspace, model: Model, other: Model) -> dict[str, float]:
    """How far a model ranks the same candidates better than another one, with 95 % intervals over users."""
    if other.lineage.get("candidates") != model.lineage["candidates"]:
        raise UsageError(
            f"{other.name}/{other.hash} ranked other candidates than {model.name}/{model.hash}.",
            "Compare models of one cut and one --trsr.candidates.",
        )
    sides = []
    for one in (model, other):
        told = load_file(config.fetch(workspace, one) / _RANKS)
        sides.append((told["keys"], candidate_metrics(told["above/"].astype(np.int64), told["same/"].astype(np.int64))))
    _, mine, others = np.intersect1d(sides[0][0], sides[1][0], return_indices=True)
    found: dict[str, float] = {}
    for figure in _COMPARED:
        apart = paired_bootstrap(sides[0][1][figure][mine], sides[1][1][figure][others])
        name = f"above {other.hash[:12]}: {figure}"
        found |= {name: round(apart.value, 4), f"{name} low": round(apart.low, 4), f"{name} high": round(apart.high, 4)}
    return found


def _measured_anew(
    config: AlignConfig, workspace: Workspace, inputs: _Inputs, adapter: Model, started: float
) -> JobResult:
    """A stored model asked with what is given here: other summaries, fewer items, summaries that are missing or wrong."""
    if adapter.lineage.get("system") != NAME:
        raise UsageError(f"The model {adapter.name} is none of this system.", "Name one made by `align --system trsr`.")
    given = config.trsr.model_dump(include=_ASKED_ANEW & config.trsr.model_fields_set)
    options = TrsrConfig.model_validate({**adapter.lineage["options"], **given})
    metrics, _ = _measure(config, options, inputs, config.fetch(workspace, adapter))
    return _result(adapter, "ok", metrics, started)


def _result(model: Model, status: str, metrics: Mapping[str, float], started: float) -> JobResult:
    cost = cost_of(Usage(), time.monotonic() - started)
    return JobResult("align", status, model.recipe, models={model.name: model.hash}, metrics=metrics, cost=cost)
