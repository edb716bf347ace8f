"""Figures of LANCER's answers: lists over the whole catalogue, their grounding, and controls of what they depend on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.metrics.ranking import Mean, hit_rate, ndcg
from raypipe.recommenders.evaluation import HeldOut, list_metrics
from raypipe.systems.lancer import NAME, Frame, LancerConfig, grounding_figures, ranks_of_lists
from raypipe.systems.lancer_lists import Lists, ListWriter

CONTROL = "shuffled items"
"""The reasoning prompt is made of the items of the next user."""
_CUTOFFS = (5, 10)
_LENGTHS = (10, 20, 50, 100, 200)
_TOLD_EVERY_S = 10.0


@dataclass(frozen=True)
class EvaluationSet:
    """The users who are evaluated and what they chose last; `unseen` bool [users] marks those held out of training."""

    held: HeldOut
    unseen: NDArray[np.bool_]

    def histories(self) -> list[list[int]]:
        """For every user, all items before the last."""
        prefixes = self.held.prefixes
        return [mine.tolist() for mine in np.split(prefixes.items, prefixes.ends[:-1])]


def measured(
    evaluated: EvaluationSet, writer: ListWriter, tell: Callable[[str, int, int], None]
) -> dict[str, dict[str, Mean]]:
    """Figures of the model as it is (`NAME`), asked in other frames (`perturbed 1` and so on), and of the control.

    The control is asked with the reasoning prompt of the next user, if there is a reasoning prompt and a second user.
    """
    config, histories, targets = writer.lancer.config, evaluated.histories(), evaluated.held.targets.tolist()
    vectors = _item_vectors(writer)
    found: dict[str, dict[str, Mean]] = {}
    frames: dict[str, Frame | None] = {NAME: None}
    frames |= {f"perturbed {number}": frame for number, frame in enumerate(config.prompts.perturbed_frames, 1)}
    for name, frame in frames.items():
        lists = writer.lists(histories, frame=frame, targets=targets, tell=_progress(tell, name))
        found[name] = _figures(lists, evaluated, config, vectors if name == NAME else None)
    if config.reasoning and len(histories) > 1:
        others = [*histories[1:], *histories[:1]]
        lists = writer.lists(histories, others, targets=targets, tell=_progress(tell, CONTROL))
        found[CONTROL] = _figures(lists, evaluated, config, None)
    return found


def rank_figures(
    above: NDArray[np.int64], same: NDArray[np.int64], evaluated: EvaluationSet, config: LancerConfig
) -> dict[str, Mean]:
    """Recall and NDCG of all users, and Recall@5 of groups.

    The groups are: users by length of history, users of few events, items of few events, and users held out of
    training. A group without users is left out.
    """
    found: dict[str, Mean] = {}
    for k in _CUTOFFS:
        # With one relevant item, the hit rate is the recall.
        found[f"Recall@{k}"] = Mean.of(hit_rate(above, same, k))
        found[f"NDCG@{k}"] = Mean.of(ndcg(above, same, k))
    hits, lengths = hit_rate(above, same, _CUTOFFS[0]), evaluated.held.prefixes.lengths
    counts = evaluated.held.training.counts(evaluated.held.items)[evaluated.held.targets]
    groups = {
        "cold users": lengths < config.cold_events,
        "cold items": counts < config.cold_events,
        "unseen users": evaluated.unseen,
    }
    for low, high in zip((0, *_LENGTHS), (*_LENGTHS, None), strict=True):
        name = f"length {low + 1}–{high}" if high is not None else f"length > {low}"
        groups[name] = (lengths > low) & (lengths <= high if high is not None else True)
    found |= {f"Recall@{_CUTOFFS[0]} {name}": Mean.of(hits[rows]) for name, rows in groups.items() if rows.any()}
    return found


def _figures(
    lists: Lists, evaluated: EvaluationSet, config: LancerConfig, vectors: NDArray[np.float32] | None
) -> dict[str, Mean]:
    """All figures if the items' `vectors` are given, otherwise only those to compare: Recall and NDCG of all users."""
    candidates, targets = np.full(len(lists.items), evaluated.held.items), evaluated.held.targets.tolist()
    if config.filter_seen:
        pairs = zip(evaluated.histories(), targets, strict=True)
        candidates = candidates - [len(set(mine) - {target}) for mine, target in pairs]
    figures = rank_figures(*ranks_of_lists(lists.items, targets, candidates.tolist()), evaluated, config)
    if vectors is None:
        return {name: figures[name] for name in figures if name.split("@")[-1] in {str(k) for k in _CUTOFFS}}
    told = {
        "refused": float(sum(outcome.error is not None for outcome in lists.outcomes)),
        "tokens_asked": float(sum(outcome.tokens_in for outcome in lists.outcomes)),
    }
    told["listed"] = float(np.mean([len(mine) for mine in lists.items]))
    told |= {f"grounding {name}": value for name, value in grounding_figures(lists.exact, lists.margins).items()}
    figures |= list_metrics(_as_served(lists, evaluated, config), vectors, evaluated.held)
    figures |= {name: Mean(value, 0.0) for name, value in told.items()}
    return {name: mean for name, mean in figures.items() if not math.isnan(mean.value)}


def _as_served(lists: Lists, evaluated: EvaluationSet, config: LancerConfig) -> NDArray[np.int64]:
    """The lists as they would be served, int64 [users, longest], 0 for no item.

    With `filter_seen`, all seen items are left out, including a target that the user had chosen before.
    """
    found = np.zeros((len(lists.items), max([1, *map(len, lists.items)])), np.int64)
    for row, (mine, seen) in enumerate(zip(lists.items, evaluated.histories(), strict=True)):
        without = set(seen) if config.filter_seen else set()
        kept = [item for item in mine if item not in without]
        found[row, : len(kept)] = kept
    return found


def _item_vectors(writer: ListWriter) -> NDArray[np.float32]:
    """Embeddings of the items' lines, as used by grounding: float32 [items + 1, hidden], row 0 no item.

    They do not depend on which prompts there are.
    """
    table = writer.grounding.table.float().cpu().numpy()
    return np.concatenate([np.zeros((1, table.shape[1]), np.float32), table])


def _progress(tell: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    last = [time.monotonic()]

    def told(done: int, of: int) -> None:
        if time.monotonic() - last[0] > _TOLD_EVERY_S:
            last[0] = time.monotonic()
            tell(name, done, of)

    return told
