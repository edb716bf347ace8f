"""What ranks stored candidates, how well, and at what cost: LLM-TRSR, its controls, and what does without a language model.

Everybody sees the last `history` events of a user, but for summaries, which tell of what `summarize` reads of the same history.
Counts and recommenders know nothing from the cut on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raypipe.data.candidates import CandidateSets
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.metrics.comparison import paired_bootstrap
from raypipe.metrics.ranking import candidate_metrics
from raypipe.pipeline.loaded import ChosenLm, Loaded
from raypipe.recommenders.floors import Floor, Popularity, Transitions
from raypipe.recommenders.ranking import batches_by_length, candidate_scores
from raypipe.recommenders.windows import Histories
from raypipe.runtime.progress import say
from raypipe.storage.model_users import write_users
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.boosted_trees import CountsAndTexts, Features
from raypipe.systems.candidate_facts import Facts
from raypipe.systems.trsr import NAME, Control, Past, Trsr, TrsrConfig

if TYPE_CHECKING:
    from raypipe.pipeline.align import AlignConfig

_SHOWN_EVERY_S = 10.0
_COMPARED = ("Recall@3", "MRR@3")
_LENGTHS = (2, 5, 10, 25, 100, 10_000)  # of histories, whose users are told apart
Ranks = dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
"""By scorer, of each asked user how many candidates stand above the chosen one, and how many beside it, itself included."""


@dataclass(frozen=True)
class RankingInputs:
    """What is known up to the cut and by which models, the candidates, and the users they are of, by their `rows` in the histories."""

    past: Past
    lm: ChosenLm
    loaded: Loaded
    sets: CandidateSets
    sets_key: str
    rows: NDArray[np.int64]

    @property
    def recommender(self) -> str:
        """NAME/HASH of the one that ranks the same candidates."""
        return f"{self.loaded.model.name}/{self.loaded.model.hash}"

    def prefixes(self, most: int) -> Histories:
        """The last events before the cut, as many at most, of those who are asked."""
        histories = self.past.histories
        kept = np.minimum(histories.lengths[self.rows], most)
        return histories.take(histories.ends[self.rows] - kept, kept)


def ranker_of(options: TrsrConfig, inputs: RankingInputs, backbone: Backbone) -> Trsr:
    try:
        return Trsr(options, inputs.past, backbone, backbone.context)
    except ValueError as error:
        raise UsageError(str(error), "Name another language model with --lm.") from None


def measure(
    config: AlignConfig, options: TrsrConfig, inputs: RankingInputs, adapter: Path
) -> tuple[dict[str, float], Ranks]:
    """Figures and ranks of the model, of the model asked as its controls say, and of what ranks without it."""
    engine = EngineConfig(lm=str(inputs.lm.folder), adapter=str(adapter)).build()
    trsr = ranker_of(options, inputs, load_backbone(str(inputs.lm.folder), device="cpu"))
    controls: tuple[Control, ...] = options.controls if inputs.past.summaries.texts else ()
    sets, ranks = inputs.sets, Ranks()
    metrics: dict[str, float] = {"asked": len(sets)}
    scores = np.zeros(sets.items.shape)
    for control in (None, *controls):
        started = told = time.monotonic()
        tokens = refused = 0
        for scored in trsr.scores(engine, inputs.rows, sets, control):
            scores[scored.part] = scored.yes
            tokens, refused = tokens + int(scored.tokens.sum()), refused + len(scored.errors)
            if time.monotonic() - told > _SHOWN_EVERY_S:
                told = time.monotonic()
                say(f"{NAME}: {control or 'candidates'}: {scored.part.stop:,} of {len(sets):,} users ranked")
        ranks[control or ""] = sets.ranks(scores)
        if control is None:
            metrics["refused"], metrics["tokens_asked"] = refused, tokens
        metrics[_named(control, "seconds")] = round(time.monotonic() - started, 1)
    for name, scorer in _others(config, options, inputs).items():
        started = time.monotonic()
        ranks[name] = sets.ranks(scorer())
        metrics[_named(name, "seconds")] = round(time.monotonic() - started, 1)
    lengths = inputs.past.histories.lengths[inputs.rows]
    for name, mine in ranks.items():
        figures = candidate_metrics(*mine)
        for figure, values in figures.items():
            metrics[_named(name, figure)] = round(float(values.mean()), 4)
        if name in ("", inputs.loaded.model.name):
            for low, high in pairwise(_LENGTHS):
                if (some := (low <= lengths) & (lengths < high)).any():
                    figure = f"{_COMPARED[0]} after {low} to {high - 1} events"
                    metrics[_named(name, figure)] = round(float(figures[_COMPARED[0]][some].mean()), 4)
    return metrics, ranks


def _others(
    config: AlignConfig, options: TrsrConfig, inputs: RankingInputs
) -> dict[str, Callable[[], NDArray[np.floating]]]:
    """What ranks the same candidates without a language model, by name. The seconds of a floor and of the trees are those of
    learning too; a recommender was trained before."""
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
    """Raises UsageError for a model that ranked other candidates than those of the key."""
    if other.lineage.get("candidates") != sets_key:
        raise UsageError(
            f"{other.name}/{other.hash} ranked other candidates than these.",
            "Compare models of one cut and one --trsr.candidates.",
        )


@dataclass(frozen=True)
class ModelRanks:
    """Of each asked user, by key [users], how many candidates a model puts above the chosen one, and how many beside it."""

    keys: NDArray[np.int64]
    above: NDArray[np.int64]
    same: NDArray[np.int64]

    @classmethod
    def stored(cls, workspace: Workspace, model: Model) -> ModelRanks:
        """As they were measured when the model was trained."""
        told = Models(workspace.store).users(model)
        assert told is not None, f"{model.name}/{model.hash} has ranked candidates"
        return cls(told["keys"], told["above/"].astype(np.int64), told["same/"].astype(np.int64))


def compared(ranks: ModelRanks, workspace: Workspace, other: Model) -> dict[str, float]:
    """How far the same candidates are ranked better than by a stored model, with 95 % intervals over users."""
    sides = [(one.keys, candidate_metrics(one.above, one.same)) for one in (ranks, ModelRanks.stored(workspace, other))]
    _, mine, others = np.intersect1d(sides[0][0], sides[1][0], return_indices=True)
    found: dict[str, float] = {}
    for figure in _COMPARED:
        apart = paired_bootstrap(sides[0][1][figure][mine], sides[1][1][figure][others])
        name = f"above {other.hash[:12]}: {figure}"
        found |= {name: round(apart.value, 4), f"{name} low": round(apart.low, 4), f"{name} high": round(apart.high, 4)}
    return found
