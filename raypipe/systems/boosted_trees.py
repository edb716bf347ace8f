"""Boosted trees on counts and text: a baseline that scores candidates without a language model.

The trees see a candidate's popularity, how often it followed the user's last items, how often it is chosen together
with any of them, how similar its text is to theirs, and how lately the user chose it before. They learn from the last
events of the training histories; each event's item stands beside items drawn at random. The counts cover only what came
before these events: counts that include the event itself would give its item away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from raypipe.config import Config, shaping
from raypipe.data.candidates import draw_unseen
from raypipe.recommenders.floors import Transitions
from raypipe.recommenders.windows import Histories
from raypipe.storage.hashing import mix
from raypipe.systems.candidate_facts import chosen_by, chosen_together

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingClassifier

_USERS_AT_ONCE = 512
_WINDOWS = (1, 5, None)


class Features(Protocol):
    """Features of users and candidates, computed from the counts of some histories."""

    def values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """Features float32 [n, candidates, features] of the items int32 [n, candidates] after each prefix."""
        ...


class TreesConfig(Config):
    """Options of scikit-learn's histogram-based gradient boosting, with log loss."""

    events: int = shaping(3, "last events of every training history that are learnt", ge=1)
    negatives: int = shaping(20, "items drawn beside each of them", ge=1)
    iterations: int = shaping(200, "trees", ge=1)
    lr: float = shaping(0.05, "what each tree adds", gt=0)
    leaves: int = shaping(31, "of a tree, at most", ge=2)
    l2: float = shaping(1.0, "penalty of the leaves' values", ge=0)
    seed: int = shaping(0, "of the drawn items")

    def fit(self, training: Histories, items: int, features: Callable[[Histories], Features]) -> BoostedTrees:
        """Train the trees on histories over a catalogue of `items` items.

        `features` makes the features from the histories that may be counted. Raises ValueError if no history has two
        events and leaves enough items unseen to draw from.
        """
        learnt = [np.zeros((0, 0, 0), np.float32)]
        for back in range(1, self.events + 1):
            before = training.without_last(back)
            rows = np.flatnonzero(before.lengths)
            if not len(rows):
                break
            seeds = mix(mix(rows.astype(np.uint64)) ^ mix(np.array([self.seed * self.events + back], np.uint64)))
            seen = training.take(training.starts[rows], before.lengths[rows] + 1)
            drawn, filled = draw_unseen(seeds, seen.items, seen.lengths, items, self.negatives)
            rows, drawn = rows[filled], drawn[filled]
            targets = training.items[training.ends[rows] - back]
            prefixes = before.take(before.starts[rows], before.lengths[rows])
            candidates = np.concatenate([targets[:, None], drawn], 1)
            learnt.append(features(before).values(prefixes, candidates))
        seen_by = np.concatenate(learnt[1:]) if learnt[1:] else learnt[0]
        if not len(seen_by):
            raise ValueError("No history has two events and leaves its user items enough that were never chosen.")
        chosen = np.zeros(seen_by.shape[:2], bool)
        chosen[:, 0] = True
        # Imported here: workers import this module without training trees, and scikit-learn imports as slowly as torch.
        from sklearn.ensemble import HistGradientBoostingClassifier

        trees = HistGradientBoostingClassifier(
            learning_rate=self.lr,
            max_iter=self.iterations,
            max_leaf_nodes=self.leaves,
            l2_regularization=self.l2,
            early_stopping=False,
            random_state=self.seed,
        )
        trees.fit(seen_by.reshape(-1, seen_by.shape[2]), chosen.ravel())
        return BoostedTrees(trees, features(training))


@dataclass(frozen=True)
class BoostedTrees:
    """The trained trees, and features computed from the counts of all training histories."""

    trees: HistGradientBoostingClassifier
    features: Features

    def scores(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float64]:
        """Scores float64 [n, candidates] of the items int32 [n, candidates] after each prefix."""
        features = self.features.values(prefixes, candidates)
        return self.trees.decision_function(features.reshape(-1, features.shape[2])).reshape(candidates.shape)


class CountsAndTexts:
    """Features from counts and texts.

    Popularity and the history's length stand once. Transitions, co-occurrence, text similarity and earlier choices
    stand once each for the last event, the last five and the last `history` events. `vectors` [items + 1, terms] are
    the text vectors of the items, of length 1.
    """

    def __init__(self, base: Histories, vectors: csr_array, history: int) -> None:
        self.vectors, self.history = vectors, history
        items = vectors.shape[0] - 1
        self.popularity = np.log1p(base.counts(items)).astype(np.float32)
        together = chosen_together(base, items)
        scale = diags_array(1 / np.sqrt(np.maximum(together.diagonal(), 1)).astype(np.float32))
        following = [Transitions(base, items, window).followers for window in (1, 10)]
        self.related = [csr_array(one) for one in (*following, together, scale @ together @ scale)]

    def values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        kept = np.minimum(prefixes.lengths, self.history)
        parts = [np.zeros((0, 0, 0), np.float32)]
        for start in range(0, len(candidates), _USERS_AT_ONCE):
            part = slice(start, start + _USERS_AT_ONCE)
            parts.append(self._values(prefixes.take((prefixes.ends - kept)[part], kept[part]), candidates[part]))
        return np.concatenate(parts[1:]) if parts[1:] else parts[0]

    def _values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        rows = np.arange(len(candidates))[:, None]
        lengths = np.broadcast_to(prefixes.lengths[:, None], candidates.shape)
        found: list[NDArray[Any]] = [self.popularity[candidates], lengths]
        for window in _WINDOWS:
            history = chosen_by(prefixes, self.vectors.shape[0], window)
            events = np.maximum(history.sum(1), 1)[:, None]
            found += [(history @ related).toarray()[rows, candidates] for related in self.related]
            found.append(((history @ self.vectors) @ self.vectors.T).toarray()[rows, candidates] / events)
            found.append(history.toarray()[rows, candidates])
        return np.stack(found, 2).astype(np.float32)
