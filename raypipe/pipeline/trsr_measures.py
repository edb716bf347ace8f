"""How well stored candidates are ranked, and at what cost: by LLM-TRSR, its controls, and other scorers.

The other scorers do without a language model. Every scorer sees the last `history` events of a user. Only summaries
tell more: what `summarize` reads of the same history. Counts and recommenders know nothing from the cut on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raypipe.data.candidates import CandidateSets
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.language.backbone import Backbone
from raypipe.metrics.comparison import paired_bootstrap
from raypipe.metrics.ranking import Values, candidate_metrics
from raypipe.pipeline.loaded import ChosenLm, Loaded
from raypipe.recommenders.floors import Floor, Popularity, Transitions
from raypipe.recommenders.ranking import batches_by_length, candidate_scores
from raypipe.recommenders.windows import Histories
from raypipe.runtime.progress import say
from raypipe.storage.ledger import Usage
from raypipe.storage.model_users import write_users
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.boosted_trees import CountsAndTexts, Features
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.trsr import NAME, Control, Trsr, TrsrConfig
from raypipe.systems.trsr_past import Past

if TYPE_CHECKING:
    from raypipe.pipeline.align_options import AlignConfig

_SHOWN_EVERY_S = 10.0
_COMPARED = ("Recall@3", "MRR@3")
_ITSELF = {
    "no summaries": "its own without summaries",
    "shuffled summaries": "its own with shuffled summaries",
}
"""Controls with which a model is compared user by user, in words.

Both sides come from one training, so the interval over users covers all chance. The comparison tells what the model
does with the summaries that it is shown, not how well a model would rank that had learnt to do without.
"""
_LENGTHS = (2, 5, 10, 25, 100, 10_000)  # bounds of the lengths of histories by which users are told apart
Ranks = dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
"""By scorer, for each asked user: how many candidates score above the chosen one, and how many the same, itself
included."""


@dataclass(frozen=True)
class RankingInputs:
    """What is known up to the cut, the models, and the candidates with their key.

    `rows` are the places of the candidates' users in the histories.
    """

    past: Past
    lm: ChosenLm
    loaded: Loaded
    sets: CandidateSets
    sets_key: str
    rows: NDArray[np.int64]

    @property
    def recommender(self) -> str:
        """NAME/HASH of the recommender that ranks the same candidates."""
        return f"{self.loaded.model.name}/{self.loaded.model.hash}"

    def prefixes(self, most: int) -> Histories:
        """The last events before the cut of each asked user, `most` at most."""
        histories = self.past.histories
        kept = np.minimum(histories.lengths[self.rows], most)
        return histories.take(histories.ends[self.rows] - kept, kept)


def ranker_of(options: TrsrConfig, inputs: RankingInputs, backbone: Backbone) -> Trsr:
    try:
        return Trsr(options, inputs.past, backbone, backbone.context)
    except ValueError as error:
        raise UsageError(str(error), "Name another language model with --lm.") from None


def tell_shown(trsr: Trsr, inputs: RankingInputs, context: int) -> dict[str, float]:
    """How many last items the prompts show on average, and the share of prompts that are cut.

    A prompt is cut if its `context`, in tokens, ends before all items that were to be shown. Warns if there are such
    prompts.
    """
    rows, sets = inputs.rows, inputs.sets
    shown, wanted = trsr.shown(rows, 0, sets.items, trsr.summaries(rows, 0))
    cut = shown < wanted
    if cut.any():
        say(
            f"{NAME}: {cut.mean():.1%} of the prompts do not fit the context of {context:,} tokens with all items that they were "
            f"to show: they are cut from {wanted[cut].mean():.1f} to {shown[cut].mean():.1f} items on average. Name a language "
            "model of a longer context (`raypipe lm --data.model.context`), or lower --trsr.recent or --trsr.history",
            "warning",
        )
    return {"items_shown": round(float(shown.mean()), 2), "items_cut": round(float(cut.mean()), 4)}


@dataclass(frozen=True)
class Measurement:
    """Figures and ranks of the model, of its controls, and of the scorers without it.

    `usage` is how many prompts of how many tokens all that took.
    """

    metrics: dict[str, float]
    ranks: Ranks
    usage: Usage


def measure(config: AlignConfig, trsr: Trsr, inputs: RankingInputs, adapter: Path) -> Measurement:
    """Ask the model in the folder `adapter` by the prompts of `trsr`, and measure it.

    Its controls and the scorers without it are measured beside it.
    """
    engine = EngineConfig(lm=str(inputs.lm.folder), adapter=str(adapter)).build()
    options = trsr.config
    controls: tuple[Control, ...] = options.controls if inputs.past.summaries.texts else ()
    sets, ranks, usage = inputs.sets, Ranks(), Usage()
    metrics: dict[str, float] = {"asked": len(sets)}
    scores = np.zeros(sets.items.shape)
    for control in (None, *controls):
        started = told = time.monotonic()
        asked, refused = Usage(), 0
        for scored in trsr.scores(engine, inputs.rows, sets, control):
            scores[scored.part] = scored.yes
            asked += Usage(calls=scored.yes.size, tokens_in=int(scored.tokens.sum()))
            refused += len(scored.errors)
            if time.monotonic() - told > _SHOWN_EVERY_S:
                told = time.monotonic()
                say(f"{NAME}: {control or 'candidates'}: {scored.part.stop:,} of {len(sets):,} users ranked")
        ranks[control or ""] = sets.ranks(scores)
        usage += asked
        metrics[_named(control, "refused")] = refused
        metrics[_named(control, "calls")], metrics[_named(control, "tokens_asked")] = asked.calls, asked.tokens_in
        metrics[_named(control, "seconds")] = round(time.monotonic() - started, 1)
    for name, scorer in _others(config, options, inputs).items():
        started = time.monotonic()
        ranks[name] = sets.ranks(scorer())
        metrics[_named(name, "seconds")] = round(time.monotonic() - started, 1)
    recommender = inputs.loaded.model
    if (seconds := recommender.lineage.get("training", {}).get("seconds")) is not None:
        metrics[_named(recommender.name, "train_seconds")] = seconds
    lengths = inputs.past.histories.lengths[inputs.rows]
    by_scorer = {name: candidate_metrics(*mine) for name, mine in ranks.items()}
    for name, figures in by_scorer.items():
        for figure, values in figures.items():
            metrics[_named(name, figure)] = round(float(values.mean()), 4)
        if name in ("", recommender.name):
            for low, high in pairwise(_LENGTHS):
                if (some := (low <= lengths) & (lengths < high)).any():
                    figure = f"{_COMPARED[0]} after {low} to {high - 1} events"
                    metrics[_named(name, figure)] = round(float(figures[_COMPARED[0]][some].mean()), 4)
    for name, words in _ITSELF.items():
        if name in by_scorer:
            metrics |= _above(words, by_scorer[""], by_scorer[name])
    return Measurement(metrics, ranks, usage)


def _others(
    config: AlignConfig, options: TrsrConfig, inputs: RankingInputs
) -> dict[str, Callable[[], NDArray[np.floating]]]:
    """The scorers that rank the same candidates without a language model, by name.

    The seconds of a floor and of the trees include learning. The recommender was trained before.
    """
    prefixes, candidates, past = inputs.prefixes(options.history), inputs.sets.items, inputs.past
    items = len(past.catalogue.titles)

    def of_floor(floor: Floor) -> NDArray[np.floating]:
        found = np.zeros(candidates.shape, np.float32)
        for rows in batches_by_length(prefixes, options.history):
            told = floor.scores(prefixes.take(prefixes.starts[rows], prefixes.lengths[rows]))
            found[rows] = np.take_along_axis(told, candidates[rows], 1)
        return found

    def trees(features: Callable[[Histories], Features]) -> NDArray[np.floating]:
        return options.trees.fit(past.learnable, items, features).scores(prefixes, candidates)

    others: dict[str, Callable[[], NDArray[np.floating]]] = {
        "popularity": lambda: of_floor(Popularity(past.learnable, items)),
        "transitions": lambda: of_floor(Transitions(past.learnable, items)),
        inputs.loaded.model.name: lambda: candidate_scores(inputs.loaded.recommender, prefixes, candidates),
    }
    if not config.beside:
        return others
    return others | {
        "boosted trees": lambda: trees(lambda base: CountsAndTexts(base, past.vectors, options.history)),
        "boosted trees on facts": lambda: trees(
            lambda base: Facts.of(base, past.vectors, past.neighbours, options.history)
        ),
    }


def _named(scorer: str | None, figure: str) -> str:
    return f"{scorer}: {figure}" if scorer else figure


def save_ranks(folder: Path, keys: NDArray[np.int64], ranks: Ranks) -> None:
    arrays = {"keys": keys}
    for name, (above, same) in ranks.items():
        arrays |= {f"above/{name}": above.astype(np.int32), f"same/{name}": same.astype(np.int32)}
    write_users(folder, arrays)


def check_comparable(other: Model, sets_key: str) -> None:
    """Raise UsageError for a model that ranked other candidates than those of the key."""
    if other.lineage.get("candidates") != sets_key:
        raise UsageError(
            f"{other.name}/{other.hash} ranked other candidates than these.",
            "Compare models of one cut and one --trsr.candidates.",
        )


@dataclass(frozen=True)
class ModelRanks:
    """A model's ranks of the chosen items, by user: `keys` [users] are the users' keys.

    `above` [users] is how many candidates the model puts above the chosen one, and `same` [users] how many beside it,
    itself included.
    """

    keys: NDArray[np.int64]
    above: NDArray[np.int64]
    same: NDArray[np.int64]

    @classmethod
    def stored(cls, workspace: Workspace, model: Model) -> ModelRanks:
        """The ranks that were measured when the model was trained."""
        told = Models(workspace.store).users(model)
        assert told is not None, f"{model.name}/{model.hash} has ranked candidates"
        return cls(told["keys"], told["above/"].astype(np.int64), told["same/"].astype(np.int64))


def compared(ranks: ModelRanks, workspace: Workspace, other: Model) -> dict[str, float]:
    """How much better the same candidates are ranked than by a stored model, with 95 % intervals over users.

    The two were trained apart, and trainings of one recipe differ by their seeds. The intervals hold what other users
    would change, and not what other seeds would. They tell whether this model ranks better than that one. Whether one
    way to make models is better, such as with summaries or without, takes several seeds to tell. What a model gains
    from the summaries that it is shown, with no training between, is told by its own controls: `above its own without
    summaries`.
    """
    theirs = ModelRanks.stored(workspace, other)
    _, mine, others = np.intersect1d(ranks.keys, theirs.keys, return_indices=True)
    return _above(
        other.hash[:12],
        candidate_metrics(ranks.above[mine], ranks.same[mine]),
        candidate_metrics(theirs.above[others], theirs.same[others]),
    )


def _above(other: str, mine: Mapping[str, Values], theirs: Mapping[str, Values]) -> dict[str, float]:
    """By how much the mean over the same users is higher, and the ends of its interval."""
    found: dict[str, float] = {}
    for figure in _COMPARED:
        apart = paired_bootstrap(mine[figure], theirs[figure])
        name = f"above {other}: {figure}"
        found |= {name: round(apart.value, 4), f"{name} low": round(apart.low, 4), f"{name} high": round(apart.high, 4)}
    return found
