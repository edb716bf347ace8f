"""Evaluation over the whole catalogue: brute force, floors by hand, models that know fewer items than the log."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raypipe.recommenders import evaluation
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.evaluation import METRICS, HeldOut, evaluate_floor, evaluate_model, ranks_of_floor
from raypipe.recommenders.floors import Popularity, Transitions
from raypipe.recommenders.ranking import batches_by_length, target_ranks, top_lists
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.scoring import UNRANKED
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories

ITEMS = 25


def of(lists: list[list[int]]) -> Histories:
    return Histories(
        np.array([i for items in lists for i in items], np.int32), np.cumsum([len(items) for items in lists])
    )


@pytest.fixture
def lists() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, ITEMS + 1, length).tolist() for length in (3, 12, 30, 2, 7, 1, 60)]


@pytest.fixture
def model() -> Recommender:
    return RecommenderConfig(model="sasrec", width=8, hidden=8, max_length=10).build(ITEMS).eval()


@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_are_those_of_sorting_every_item(lists: list[list[int]], model: Recommender, filter_seen: bool) -> None:
    held = HeldOut.of(of(lists), 2, ITEMS)
    assert len(held.targets) == 5  # users with a training event
    above, same = target_ranks(model, held.prefixes, held.targets, filter_seen=filter_seen)
    asked = [items for items in lists if len(items) > 2]
    for user, items in enumerate(asked):
        scores = model.score(model.encode(Sequences.of([items[:-1]])))[0].detach().numpy().copy()
        own = scores[items[-1]]
        scores[0] = -np.inf
        if filter_seen:
            scores[items[:-1]] = -np.inf
        scores[items[-1]] = -np.inf
        assert (above[user], same[user]) == ((scores > own).sum(), 1)


def test_a_trained_on_log_has_nothing_left_to_ask(lists: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="none is left to ask for"):
        HeldOut.of(of(lists), 0, ITEMS)


def test_what_was_learnt_from_is_what_floors_and_cold_items_count(lists: list[list[int]]) -> None:
    learnt_from = np.arange(len(lists)) % 2 == 0
    held = HeldOut.of(of(lists), 2, ITEMS, learnt_from)
    everybody = HeldOut.of(of(lists), 2, ITEMS)
    assert held.targets.tolist() == everybody.targets.tolist(), "everybody is asked all the same"
    assert held.training.items.tolist() == [item for items in lists[::2] for item in items[:-2]]
    assert (held.users, held.events) == (len(lists), sum(map(len, lists)))


def test_some_are_asked_and_all_are_learnt_from(lists: list[list[int]]) -> None:
    everybody, long_enough = HeldOut.of(of(lists), 2, ITEMS), [items for items in lists if len(items) > 2]
    asked = np.arange(len(lists)) % 2 == 0
    held = HeldOut.of(of(lists), 2, ITEMS, asked=asked)
    wanted = [items for items in lists[::2] if len(items) > 2]
    assert held.targets.tolist() == [items[-1] for items in wanted]
    assert held.prefixes.items.tolist() == [item for items in wanted for item in items[:-1]]
    assert held.training.items.tolist() == everybody.training.items.tolist()
    assert (held.askable, held.asks_all, everybody.asks_all) == (len(long_enough), False, True)


def test_floors_count_what_they_say() -> None:
    training = of([[1, 2, 3], [1, 2], [4, 2, 1]])
    popularity = Popularity(training, 5).scores(of([[1], [4]]))
    assert popularity.tolist() == [[0, 3, 3, 1, 1, 0]] * 2
    near = Transitions(training, 5, window=1, recent=1).scores(of([[9 - 8], [4, 2], [2, 3]]))
    assert near.tolist() == [[0, 0, 2, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    wide = Transitions(training, 5, window=2, recent=2).scores(of([[4, 2]]))
    assert wide.tolist() == [[0, 2, 1, 1, 0, 0]]


def test_a_floor_without_an_opinion_is_at_chance(lists: list[list[int]]) -> None:
    class Constant:
        def scores(self, prefixes: Histories) -> np.ndarray:
            return np.ones((len(prefixes), ITEMS + 1), np.float32)

    held = HeldOut.of(of(lists), 2, ITEMS)
    above, same = ranks_of_floor(Constant(), held, filter_seen=False)
    assert (above.tolist(), same.tolist()) == ([0] * 5, [ITEMS] * 5)
    assert evaluate_floor(Constant(), held, filter_seen=False)["HR@5"].value == pytest.approx(5 / ITEMS)


def test_a_floor_is_asked_for_so_many_scores_at_a_time(lists: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(Transitions):
        most = 0

        def scores(self, prefixes: Histories) -> np.ndarray:
            found = super().scores(prefixes)
            Watched.most = max(Watched.most, found.size)
            return found

    held = HeldOut.of(of(lists * 40), 2, ITEMS)
    floor = Watched(held.training, ITEMS)
    whole = ranks_of_floor(floor, held, filter_seen=True)
    assert Watched.most > 1000
    Watched.most = 0
    monkeypatch.setattr(evaluation, "BLOCK_SCORES", 1000)
    pieces = ranks_of_floor(floor, held, filter_seen=True)
    assert 500 < Watched.most <= 1000
    assert [found.tolist() for found in pieces] == [found.tolist() for found in whole]


def test_lists_of_a_catalogue_of_fewer_than_ten_items_hold_all_of_it() -> None:
    model = RecommenderConfig(width=8, hidden=8, max_length=10).build(6).eval()
    held = HeldOut.of(of([[1, 2, 3], [4, 5, 6, 1], [2, 2, 2]]), 1, 6)
    metrics = evaluate_model(model, held, filter_seen=False)
    assert (metrics["coverage@10"].value, metrics["HR@10"].value) == (1.0, 1.0)


def test_what_a_model_never_saw_is_left_out_and_never_hit(model: Recommender) -> None:
    new = ITEMS + 3
    lists = [[1, 2, new, 3, 4], [1, 2, 3, 4, new], [new, new, new, new, 5]]
    held = HeldOut.of(of(lists), 1, new)
    above, same = target_ranks(model, held.prefixes, held.targets)
    known = target_ranks(model, of([[1, 2, 3]]), np.array([4], np.int32))
    assert (above[0], same[0]) == (known[0][0], known[1][0])
    assert (above[1:].tolist(), same[1:].tolist()) == ([UNRANKED, UNRANKED], [1, 1])
    assert evaluate_model(model, held)["HR@20"].value <= 1 / 3
    assert top_lists(model, held.prefixes, 3)[2].tolist() == [0, 0, 0]


def test_batches_hold_every_row_once_and_stay_small(lists: list[list[int]]) -> None:
    histories = of(lists)
    batches = list(batches_by_length(histories, max_length=10, positions=25))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lists)))
    padded = [len(batch) * min(10, int(histories.lengths[batch].max())) for batch in batches]
    assert max(padded) <= 25
    assert len(batches) < len(lists)


def test_lists_beyond_accuracy_are_told(lists: list[list[int]], model: Recommender) -> None:
    torch.manual_seed(0)
    metrics = evaluate_model(model, HeldOut.of(of(lists), 2, ITEMS))
    assert 0 < metrics["coverage@10"].value <= 1
    assert metrics["novelty@10"].value > 0
    assert 0 < metrics["diversity@10"].value < 2
    assert 0 < metrics["collapse"].value < 1
    assert metrics["HR@10 length 1–10"].value >= 0
    assert math.isnan(metrics["HR@10 length > 200"].value), "nobody has so many events"
    assert tuple(metrics) == METRICS
