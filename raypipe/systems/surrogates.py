"""Surrogates of a recommender f, learnt from f's answers: the baselines of a language model that imitates f.

They are functions of the history alone: the distilled student of RecExplainer (arXiv 2311.10947), and two that people
can read. Of these, the linear one has a weight for every item and how lately it was chosen; the tree asks questions
about the same. Each gives scores for prefixes, as a `Floor` does. `surrogate_figures` measures anything that does,
floors and f itself too.

Measured for a SASRec of width 64 on MovieLens-100k, learnt at 8,480 places of 848 users and asked after the last event
of 95 other users (T1 HR@5 unseen, T2, T3): linear .67, .93, .96 in 8 s on one core; tree .22, .86, .90 in 2 s; student
.46, .77, .79 in 24 s, because it learns only f's best item; transitions .40, .84, .89.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import lsqr

from raypipe.config import Config, shaping
from raypipe.metrics.alignment import decisions, order_ndcg, unseen_retrieval_metrics
from raypipe.metrics.ranking import Mean
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.floors import Floor
from raypipe.recommenders.losses import softmax_loss
from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import Filters, ranks_among
from raypipe.recommenders.windows import Histories
from raypipe.systems.early_stopping import EarlyStopping
from raypipe.systems.source import Source
from raypipe.systems.teacher import Taught, teach

if TYPE_CHECKING:
    from sklearn.tree import DecisionTreeRegressor

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
_LONGEST = 200


@dataclass(frozen=True)
class Lessons:
    """What f says after each of n prefixes, to learn from or to be asked about.

    `users` int64 [n] are the prefixes' users. `taught` are the labels of RecExplainer's tasks. f's scores of all items
    are the product of `queries` float32 [n, width] and `table` [items + 1, width], whose row 0 is padding.
    """

    prefixes: Histories
    users: Integers
    taught: Taught
    queries: Floats
    table: Floats

    @classmethod
    @torch.no_grad()
    def of(cls, source: Source, rows: Integers, events: Integers, rng: np.random.Generator) -> Lessons:
        """Lessons after the first `events` [n] of the histories in `rows` [n]. Raises ValueError as `teach` does."""
        taught = teach(source, rows, events, rng)
        queries = source.queries(taught.states, rows, events)
        prefixes = source.histories.take(source.histories.starts[rows], events)
        return cls(prefixes, rows, taught, queries.float().cpu().numpy(), source.item_states)

    @property
    def items(self) -> int:
        return len(self.table) - 1


class HistoryFeatures(Config):
    """The features of a history that the surrogates which people can read are given."""

    windows: tuple[int, ...] = shaping(
        (1, 2, 3, 5, 10, 20, 50), "whether an item is among the last so many; and whether it is there at all"
    )

    def of(self, prefixes: Histories, items: int) -> csr_array:
        """Features 0 or 1, float32 [n, (windows + 1) × (items + 1)]; the columns of one window are adjacent."""
        blocks = []
        for kept in [*(np.minimum(prefixes.lengths, window) for window in self.windows), prefixes.lengths]:
            recent = prefixes.take(prefixes.ends - kept, kept)
            # int32, because scikit-learn's trees do not read wider indices.
            owners = np.repeat(np.arange(len(kept), dtype=np.int32), kept)
            pairs = np.unique(np.stack([owners, recent.items]), axis=1)
            ones = np.ones(pairs.shape[1], np.float32)
            blocks.append(csr_array((ones, (pairs[0], pairs[1])), shape=(len(kept), items + 1)))
        return hstack(blocks, format="csr")


class LinearConfig(Config):
    """A ridge regression of f's scores."""

    features: HistoryFeatures = shaping(HistoryFeatures)
    l2: float = shaping(100.0, "penalty of the squared weights", ge=0)
    steps: int = shaping(100, "of the solver, at most", ge=1)

    def fit(self, learnt: Lessons) -> LinearSurrogate:
        # f's scores are linear in its queries: regressing the queries equals regressing all items' scores, and is far
        # smaller.
        features = _with_constant(self.features.of(learnt.prefixes, learnt.items))
        options = {"damp": self.l2**0.5, "iter_lim": self.steps, "atol": 1e-4, "btol": 1e-4}
        weights = [lsqr(features, column, **options)[0] for column in learnt.queries.T]
        return LinearSurrogate(self, np.stack(weights, 1).astype(np.float32), learnt.table)


@dataclass(frozen=True)
class LinearSurrogate:
    """A fitted linear surrogate.

    `weights` [features + 1, width], the constant's last; their product with the table's rows weighs each item's score.
    """

    config: LinearConfig
    weights: Floats
    table: Floats

    def scores(self, prefixes: Histories) -> Floats:
        """[n, items + 1]; column 0 has no meaning."""
        features = self.config.features.of(prefixes, len(self.table) - 1)
        return (_with_constant(features) @ self.weights) @ self.table.T


class TreeConfig(Config):
    """A regression tree of f's scores of all items at once."""

    features: HistoryFeatures = shaping(HistoryFeatures)
    leaves: int = shaping(256, "at most", ge=2)
    rows_per_leaf: int = shaping(5, "at least", ge=1)

    def fit(self, learnt: Lessons) -> TreeSurrogate:
        # Imported here: every worker that explains imports this module, and scikit-learn imports as slowly as torch.
        from sklearn.tree import DecisionTreeRegressor

        features = self.features.of(learnt.prefixes, learnt.items)
        # In these coordinates, squared distances of queries are those of all items' scores, less what all items share.
        centred = learnt.table[1:] - learnt.table[1:].mean(0)
        lengths, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
        coordinates = learnt.queries @ (axes * np.sqrt(np.maximum(lengths, 0)))
        tree = DecisionTreeRegressor(max_leaf_nodes=self.leaves, min_samples_leaf=self.rows_per_leaf, random_state=0)
        leaves = tree.fit(features, coordinates).apply(features)
        counts = np.bincount(leaves, minlength=tree.tree_.node_count)
        sums = np.zeros((len(counts), learnt.queries.shape[1]))
        np.add.at(sums, leaves, learnt.queries)
        queries = sums / np.maximum(counts, 1)[:, None]
        return TreeSurrogate(self, tree, queries.astype(np.float32), learnt.table)


@dataclass(frozen=True)
class TreeSurrogate:
    """A fitted tree; `queries` [nodes, width] are each leaf's mean query, whose products with `table` are scores."""

    config: TreeConfig
    tree: DecisionTreeRegressor
    queries: Floats
    table: Floats

    def scores(self, prefixes: Histories) -> Floats:
        """[n, items + 1]; column 0 has no meaning."""
        leaves = self.tree.apply(self.config.features.of(prefixes, len(self.table) - 1))
        return self.queries[leaves] @ self.table.T


class StudentConfig(Config):
    """A small recommender that learns f's best item and nothing about what users did next."""

    recommender: RecommenderConfig = shaping(
        lambda: RecommenderConfig(width=32, hidden=64, layers=1, max_length=50), "the loss it names does not matter"
    )
    training: EarlyStopping = shaping(EarlyStopping)

    @model_validator(mode="after")
    def _scores_are_products_with_states(self) -> StudentConfig:
        if self.recommender.model == "dreamrec":
            raise ValueError("dreamrec learns item vectors and no scores: choose another model for the student")
        return self

    def fit(self, learnt: Lessons) -> Student:
        """Train a student. Raises ValueError if the lessons are of fewer than two users."""
        model = self.recommender.build(learnt.items, self.training.seed)
        favourites = torch.from_numpy(learnt.taught.favourites)

        def loss(rows: Integers) -> torch.Tensor:
            states = model.encode(sequences_of(learnt.prefixes, rows, model.max_length))
            return softmax_loss(states, model.item_states(), favourites[rows]) / len(rows)

        self.training.run(model, loss, learnt.users)
        return Student(model)


@dataclass(frozen=True)
class Student:
    model: Recommender

    @torch.no_grad()
    def scores(self, prefixes: Histories) -> Floats:
        """[n, items + 1]; column 0 has no meaning."""
        scores = np.empty((len(prefixes), self.model.items + 1), np.float32)
        for rows in batches_by_length(prefixes, self.model.max_length):
            states = self.model.encode(sequences_of(prefixes, rows, self.model.max_length))
            scores[rows] = self.model.score(states).numpy()
        return scores


def surrogate_figures(surrogate: Floor, learnt: Lessons, asked: Lessons) -> dict[str, Mean]:
    """Figures of T1 to T3 on `asked`, named as in `alignment`.

    T1: HR@5 and NDCG@5 of f's best unseen item. T2: NDCG@5 of the five candidates. T3: accuracy, where an item's rank
    among the unseen items decides: the answer is yes up to the rank that is right most often on `learnt`.
    """
    threshold = _threshold(*_answers(surrogate, learnt)[2:])
    favourites, ndcgs, liked, disliked = _answers(surrogate, asked)
    ranks = np.concatenate([liked, disliked])
    right = decisions(-ranks, np.full(len(ranks), -threshold), np.arange(len(ranks)) < len(liked))
    return {
        **unseen_retrieval_metrics(favourites[:, 0], favourites[:, 1]),
        "T2 NDCG@5": Mean.of(ndcgs),
        "T3 accuracy": Mean.of(right),
    }


def _answers(
    surrogate: Floor, asked: Lessons
) -> tuple[Integers, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Answers of a surrogate to the tasks.

    Returns the number of unseen items above f's best item and tied with it [n, 2], the NDCG@5 of the candidates [n],
    and the mean ranks of the liked item and of the disliked item, [n] each.
    """
    taught = asked.taught
    ordered = np.take_along_axis(taught.candidates, taught.orders, 1)
    wanted = (taught.favourites, taught.liked, taught.disliked)
    places, ndcgs = np.empty((3, len(ordered), 2), np.int64), np.empty(len(ordered))
    for rows in batches_by_length(asked.prefixes, max_length=_LONGEST):
        scores = surrogate.scores(asked.prefixes.take(asked.prefixes.starts[rows], asked.prefixes.lengths[rows]))
        ndcgs[rows] = order_ndcg(np.take_along_axis(scores, ordered[rows], 1))
        seen = Filters(excluded=sequences_of(asked.prefixes, rows))
        for task, items in enumerate(wanted):
            found = ranks_among(torch.from_numpy(scores), torch.from_numpy(items[rows]), seen)
            places[task, rows] = torch.stack(found, 1).numpy()
    above, same = places[1:, :, 0], places[1:, :, 1]
    liked, disliked = above + (same + 1) / 2
    return places[0], ndcgs, liked, disliked


def _threshold(liked: NDArray[np.float64], disliked: NDArray[np.float64]) -> float:
    """The rank that best separates liked items (up to it) from disliked ones (beyond); it lies between given ranks."""
    ranks = np.unique(np.concatenate([liked, disliked]))
    cuts = np.concatenate([[ranks[0] - 1], (ranks[:-1] + ranks[1:]) / 2, [ranks[-1] + 1]])
    right = np.searchsorted(np.sort(liked), cuts) - np.searchsorted(np.sort(disliked), cuts)
    return float(cuts[right.argmax()])


def _with_constant(features: csr_array) -> csr_array:
    return hstack([features, csr_array(np.ones((features.shape[0], 1), np.float32))], format="csr")
