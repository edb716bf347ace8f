"""Surrogates of a recommender that is planted, against references, and between f itself and a scorer without an opinion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.losses import LossConfig
from raypipe.recommenders.recommender import Recommender, freeze
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories
from raypipe.systems.early_stopping import EarlyStopping
from raypipe.systems.source import Source
from raypipe.systems.surrogates import (
    HistoryFeatures,
    Lessons,
    LinearConfig,
    StudentConfig,
    TreeConfig,
    surrogate_figures,
)
from tests.systems.sources import HELD_OUT, LENGTHS, source_of

ITEMS, USERS = 30, 200
T1, T2, T3 = "T1 HR@5 unseen", "T2 NDCG@5", "T3 accuracy"


class Successors(Recommender):
    """After an item its own row of scores, whatever came before."""

    def __init__(self) -> None:
        super().__init__(ITEMS, ITEMS + 1, 50, LossConfig())
        self.table = nn.Parameter(torch.eye(ITEMS + 1))
        self.rows = nn.Parameter(torch.randn(ITEMS + 1, ITEMS + 1, generator=torch.Generator().manual_seed(0)))

    def encode_all(self, sequences: Sequences) -> Tensor:
        return self.rows[sequences.items]


@pytest.fixture(scope="module")
def source() -> Source:
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.choice(ITEMS, 8, replace=False) + 1 for _ in range(USERS)]).astype(np.int32)
    histories = Histories(items, np.arange(1, USERS + 1) * 8)
    catalogue = Catalogue([str(item) for item in range(1, ITEMS + 1)], [{}] * ITEMS)
    return Source(freeze(Successors()), histories, np.zeros(USERS, bool), catalogue)


@pytest.fixture(scope="module")
def learnt(source: Source) -> Lessons:
    return lessons(source, 0, 160, [2, 4, 6, 7])


@pytest.fixture(scope="module")
def asked(source: Source) -> Lessons:
    return lessons(source, 160, USERS, [3, 5, 8])


def lessons(source: Source, first: int, stop: int, events: list[int]) -> Lessons:
    rows = np.repeat(np.arange(first, stop), len(events))
    return Lessons.of(source, rows, np.tile(events, stop - first), np.random.default_rng(first))


class F:
    """The recommender itself."""

    def __init__(self, source: Source) -> None:
        self.model = source.recommender

    def scores(self, prefixes: Histories) -> np.ndarray:
        lists = np.split(prefixes.items, prefixes.ends[:-1])
        with torch.no_grad():
            return self.model.score(self.model.encode(Sequences.of(lists))).numpy()


class Frequent:
    """What f names most often."""

    def __init__(self, learnt: Lessons) -> None:
        self.counts = np.bincount(learnt.taught.favourites, minlength=ITEMS + 1).astype(np.float32)

    def scores(self, prefixes: Histories) -> np.ndarray:
        return np.tile(self.counts, (len(prefixes), 1))


class Constant:
    def scores(self, prefixes: Histories) -> np.ndarray:
        return np.ones((len(prefixes), ITEMS + 1), np.float32)


CONFIGS = {
    "linear": LinearConfig(l2=1.0),
    "tree": TreeConfig(leaves=40),
    "student": StudentConfig(
        recommender=RecommenderConfig(width=32, hidden=32, layers=1, max_length=8, dropout=0.0),
        training=EarlyStopping(lr=1e-2, batch_size=64, epochs=40),
    ),
    "gru4rec student": StudentConfig(
        recommender=RecommenderConfig(model="gru4rec", width=32, hidden=32, layers=1, max_length=8, dropout=0.0),
        training=EarlyStopping(lr=1e-2, batch_size=64, epochs=40),
    ),
}


def test_f_imitates_itself(source: Source, learnt: Lessons, asked: Lessons) -> None:
    figures = surrogate_figures(F(source), learnt, asked)
    assert [figures[name].value for name in (T1, "T1 NDCG@5 unseen", T2)] == pytest.approx([1, 1, 1])
    assert figures[T3].value > 0.97  # the unseen are 28 to 22, and the shares that are liked are rounded


def test_a_scorer_without_an_opinion_is_at_chance(learnt: Lessons, asked: Lessons) -> None:
    figures = surrogate_figures(Constant(), learnt, asked)
    unseen = ITEMS - asked.prefixes.lengths
    assert figures[T1].value == pytest.approx((5 / unseen).mean())
    assert figures[T2].value == pytest.approx(0.6131, abs=1e-4)
    assert figures[T3].value == 0.5


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_can_be_imitated_is(name: str, learnt: Lessons, asked: Lessons) -> None:
    figures = surrogate_figures(CONFIGS[name].fit(learnt), learnt, asked)
    assert figures[T1].value > 0.9
    # A student learns f's best item alone, and nothing of how the others stand.
    assert figures[T2].value > (0.63 if "student" in name else 0.9)
    assert figures[T3].value > (0.55 if "student" in name else 0.9)


@pytest.mark.parametrize("name", ["linear", "tree", "student"])
def test_what_f_says_of_others_teaches_nothing(name: str, learnt: Lessons, asked: Lessons) -> None:
    order = np.random.default_rng(0).permutation(len(learnt.users))
    taught = replace(learnt.taught, **{key: value[order] for key, value in vars(learnt.taught).items()})
    shuffled = replace(learnt, taught=taught, queries=learnt.queries[order])
    figures = surrogate_figures(CONFIGS[name].fit(shuffled), shuffled, asked)
    assert figures[T1].value < surrogate_figures(Frequent(learnt), learnt, asked)[T1].value + 0.1
    assert figures[T2].value < 0.7
    assert figures[T3].value < 0.65


def test_features_are_who_is_among_the_last_so_many() -> None:
    histories = Histories(np.array([1, 2, 1, 3, 3], np.int32), np.array([4, 5]))
    features = HistoryFeatures(windows=(1, 2)).of(histories, 3).toarray()
    assert features.dtype == np.float32
    assert features.tolist() == [[0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]]


def test_the_linear_surrogate_is_the_ridge_regression_of_the_scores_of_all_items() -> None:
    source = source_of("sasrec")
    rows = np.repeat(np.arange(8), 2)
    small = Lessons.of(source, rows, np.tile([1, 2], 8), np.random.default_rng(0))
    config = LinearConfig(features=HistoryFeatures(windows=(1,)), l2=0.5, steps=1000)
    features = config.features.of(small.prefixes, small.items).toarray()
    with_constant = np.hstack([features, np.ones((16, 1))])
    reference = Ridge(0.5, fit_intercept=False).fit(with_constant, small.queries @ small.table.T)
    expected = reference.predict(with_constant)
    np.testing.assert_allclose(config.fit(small).scores(small.prefixes), expected, atol=2e-3)


def test_a_leaf_of_the_tree_says_what_f_says_there_on_average() -> None:
    source = source_of("sasrec")
    rows = np.repeat(np.arange(8), 2)
    small = Lessons.of(source, rows, np.tile([1, 2], 8), np.random.default_rng(0))
    scores = small.queries @ small.table.T
    root = TreeConfig(rows_per_leaf=16).fit(small)
    np.testing.assert_allclose(root.scores(small.prefixes), np.tile(scores.mean(0), (16, 1)), atol=1e-5)
    split = TreeConfig(leaves=2, rows_per_leaf=1).fit(small)
    features = split.config.features.of(small.prefixes, small.items).toarray().astype(bool)
    centred = scores[:, 1:] - scores[:, 1:].mean(1, keepdims=True)

    def error(has: np.ndarray) -> float:
        parts = [centred[has], centred[~has]]
        return sum(((part - part.mean(0)) ** 2).sum() for part in parts if len(part))

    best = min(error(has) for has in features.T)
    assert error(features[:, split.tree.tree_.feature[0]]) == pytest.approx(best)


@pytest.mark.parametrize("model", ["sasrec", "dreamrec"])
def test_lessons_hold_the_scores_that_labels_are_made_of(model: str) -> None:
    source = source_of(model)
    rows = np.flatnonzero(HELD_OUT)
    found = Lessons.of(source, rows, LENGTHS[rows], np.random.default_rng(0))
    scores = found.queries @ found.table.T
    drawn = np.take_along_axis(scores, found.taught.candidates, 1)
    np.testing.assert_allclose(drawn, found.taught.scores, rtol=1e-4, atol=1e-4)
    assert found.prefixes.items.tolist() == [item for row in rows for item in source.before_cut(row)]


def test_a_student_that_has_no_scores_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="choose another model"):
        StudentConfig(recommender=RecommenderConfig(model="dreamrec"))
