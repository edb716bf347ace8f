"""Boosted trees on counts and text: what a scorer of candidates without a language model reaches.

Of a user and a candidate the trees see how popular it is, how often it followed the user's last items, how often it is chosen
together with any of them, how like their texts its text is, and when the user chose it before. They learn from the last events
of the training histories, each beside items drawn at random, with counts of what came before these events alone: counts that
hold the very event would give its item away.
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
    """What is known of users and candidates, by the counts of some histories."""

    def values(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """[n, candidates, features], of items int32 [n, candidates] after each prefix."""
        ...


class TreesConfig(Config):
    """Gradient boosting over histograms (scikit-learn's), of log loss."""

    events: int = shaping(3, "last events of every training history that are learnt", ge=1)
    negatives: int = shaping(20, "items drawn beside each of them", ge=1)
    iterations: int = shaping(200, "trees", ge=1)
    lr: float = shaping(0.05, "what each tree adds", gt=0)
    leaves: int = shaping(31, "of a tree, at most", ge=2)
    l2: float = shaping(1.0, "penalty of the leaves' values", ge=0)
    seed: int = shaping(0, "of the drawn items")

    def fit(self, training: Histories, items: int, features: Callable[[Histories], Features]) -> BoostedTrees:
        """From histories of so many items, seen by the features of counts. Raises ValueError where nothing can be learnt."""
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
        # Workers import this module and learn no trees, and scikit-learn takes as long to import as torch.
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
    """The trees, and features by the counts of all training histories."""

    trees: HistGradientBoostingClassifier
    features: Features

    def scores(self, prefixes: Histories, candidates: NDArray[np.int32]) -> NDArray[np.float64]:
        """[n, candidates], of items int32 [n, candidates] after each prefix."""
        features = self.features.values(prefixes, candidates)
        return self.trees.decision_function(features.reshape(-1, features.shape[2])).reshape(candidates.shape)


class CountsAndTexts:
    """Popularity, transitions, co-occurrence, likeness of texts and earlier choices, each for the last event, the last five and
    the last `history`; `vectors` [items + 1, terms] of the items' texts are of length 1."""

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
