"""Training windows: every event is a target once an epoch, whatever the workers, the lengths and the interruptions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from raypipe.recommenders.windows import Histories, Windows, tie_groups

LENGTHS = [1, 2, 3, 9, 10, 11, 25, 40, 0, 7]


@pytest.fixture
def histories() -> Histories:
    """Event n of user u is item 100 u + n + 1, so that an item tells where it comes from."""
    items = [100 * user + n + 1 for user, length in enumerate(LENGTHS) for n in range(length)]
    return Histories(np.array(items, np.int32), np.cumsum(LENGTHS))


def test_every_event_but_the_first_is_a_target_exactly_once(histories: Histories) -> None:
    windows = Windows(histories, 10)
    targets: Counter[int] = Counter()
    for step in range(windows.steps_per_epoch(1)):
        batch = windows.batch(step, seed=0, rank=0, world=1, batch_size=1)
        assert batch.lengths.sum() == len(batch.items) == len(batch.targets) == batch.count
        assert batch.lengths.max() <= 10
        assert (batch.targets == batch.items + 1).all()  # the event right after, of the same user
        targets.update(batch.targets.tolist())
    expected = {100 * user + n + 1 for user, length in enumerate(LENGTHS) for n in range(1, length)}
    assert targets == Counter(expected)


def test_the_newest_window_has_the_most_context(histories: Histories) -> None:
    windows = Windows(histories, 10)
    of_user = {user: windows.lengths[windows.users == user].tolist() for user in (5, 6, 7)}
    assert of_user == {5: [10], 6: [10, 10, 4], 7: [10, 10, 10, 9]}


def test_whole_windows_hold_every_event_once(histories: Histories) -> None:
    windows = Windows(histories, 10, whole=True)
    seen: Counter[int] = Counter()
    for step in range(windows.steps_per_epoch(1)):
        batch = windows.batch(step, 0, 0, 1, 1)
        assert batch.lengths.max() <= 10
        seen.update(batch.items.tolist())
    assert seen == Counter(histories.items.tolist())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_one_batch(histories: Histories, world: int) -> None:
    windows = Windows(histories, 10)
    whole = windows.batch(1, 7, 0, 1, 4)
    shares = [windows.batch(1, 7, rank, world, 4) for rank in range(world)]
    assert sorted(item for share in shares for item in share.items) == sorted(whole.items)
    assert {share.count for share in shares} == {whole.count}


def test_a_batch_is_a_function_of_seed_and_step(histories: Histories) -> None:
    first, fresh = Windows(histories, 10), Windows(histories, 10)
    for step in range(9):
        first.batch(step, 7, 0, 1, 4)
    for step in (8, 3):
        assert first.batch(step, 7, 0, 1, 4).items.tolist() == fresh.batch(step, 7, 0, 1, 4).items.tolist()
    epochs = [fresh.batch(0, seed, 0, 1, 4).items.tolist() for seed in range(5)]
    assert len({tuple(items) for items in epochs}) > 1


def test_cut_histories_keep_order_and_may_become_empty(histories: Histories) -> None:
    cut = histories.without_last(2)
    assert cut.lengths.tolist() == [max(0, length - 2) for length in LENGTHS]
    assert cut.items[cut.starts[6] : cut.ends[6]].tolist() == list(range(601, 624))


def test_events_of_one_time_come_in_another_order_in_every_epoch(histories: Histories) -> None:
    times = np.array([n // 3 for length in LENGTHS for n in range(length)])  # three events at a time
    ties = tie_groups(times, histories.ends)
    group = dict(zip(histories.items.tolist(), ties.tolist(), strict=True))
    windows = Windows(histories, 50, ties=ties)
    long = histories.items[histories.starts[7] : histories.ends[7]].tolist()
    orders = set()
    for epoch in range(4):
        steps = range(epoch * windows.steps_per_epoch(1), (epoch + 1) * windows.steps_per_epoch(1))
        batches = [windows.batch(step, 7, 0, 1, 1) for step in steps]
        (found,) = (batch for batch in batches if batch.users[0] == 7)
        order = [*found.items.tolist(), int(found.targets[-1])]
        assert found.targets[:-1].tolist() == order[1:-1]
        assert sorted(order) == long
        assert [group[item] for item in order] == [group[item] for item in long]
        orders.add(tuple(order))
    assert len(orders) == 4
    assert tuple(long) not in orders
    again = Windows(histories, 50, ties=ties)
    step = windows.steps_per_epoch(1) + 3
    assert again.batch(step, 7, 0, 1, 1).items.tolist() == windows.batch(step, 7, 0, 1, 1).items.tolist()


def test_ties_end_where_a_time_or_a_history_does() -> None:
    times = np.array([5, 5, 6, 6, 6, 7, 7, 7])
    assert tie_groups(times, np.array([3, 3, 6, 8])).tolist() == [1, 1, 2, 3, 3, 4, 5, 5]


def test_no_histories_have_no_starts_either(histories: Histories) -> None:
    nobody = np.array([], np.int64)
    for none in (Histories(np.array([], np.int32), nobody), histories.take(nobody, nobody)):
        assert (len(none), len(none.starts), len(none.ends), len(none.lengths)) == (0, 0, 0, 0)
