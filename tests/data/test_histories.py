"""Spills and merges against a plain per-user reference, on random logs with ties, repeats and late events."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from raypipe.data.histories import MergedHistories, merge_histories
from raypipe.data.spills import Spill, bit_reversed, bucket_places, estimate_users, read_spill
from raypipe.storage.hashing import event_lanes, sequence_lanes, stable_hash, to_hex
from raypipe.storage.schemas import HISTORIES

ITEMS = 12
LANES = np.random.default_rng(0).integers(1, 2**64, (ITEMS + 1, 2), np.uint64)
NOTHING = HISTORIES.schema.empty_table()

Event = tuple[str, int, int]  # user, item index, time or order value


def random_log(seed: int, events: int, users: int = 9, times: int = 15) -> list[Event]:
    draw = random.Random(seed)
    return [(f"u{draw.randrange(users)}", draw.randint(1, ITEMS), draw.randrange(times)) for _ in range(events)]


def spill_of(events: Sequence[Event], chunk: int = 7, groups: int | None = None) -> bytes:
    spill = Spill()
    for start in range(0, len(events), chunk):
        part = events[start : start + chunk]
        spill.add(
            pa.array([user for user, _, _ in part], pa.string()),
            np.array([item for _, item, _ in part], np.int32),
            np.array([time for _, _, time in part], np.int64),
            np.array([item / 2 for _, item, _ in part], np.float32),
        )
    return spill.write(groups)


def merged(old: pa.Table, spills: Sequence[bytes], kind: str, bucket: int = 0, buckets: int = 1) -> MergedHistories:
    rows = [table for data in spills for table in read_spill(pa.BufferReader(data), bucket, buckets)]
    return merge_histories(old, rows, LANES, order_kind=kind == "order")


def reference(logs: Sequence[Sequence[Event]], kind: str) -> dict[str, list[tuple[int, int]]]:
    """Each user's (item, time): log after log, without repeats, sorted stably by time; or positions, logs in a row."""
    histories: dict[str, list[tuple[int, int]]] = {}
    for log in logs:
        fresh: dict[str, dict[tuple[int, int], None]] = {}
        for user, item, time in log:
            fresh.setdefault(user, {})[item, time] = None
        for user, events in fresh.items():
            new = sorted(events, key=lambda event: event[1])
            old = histories.get(user, [])
            if kind == "order":
                histories[user] = [(item, at) for at, (item, _) in enumerate([*old, *new])]
            else:
                kept = [event for event in new if event not in old]
                histories[user] = sorted([*old, *kept], key=lambda event: event[1])
    return histories


def as_dict(rows: pa.Table) -> dict[str, list[tuple[int, int]]]:
    return {row["user_id"]: list(zip(row["items"], row["times"], strict=True)) for row in rows.to_pylist()}


def with_bucket(rows: pa.Table) -> pa.Table:
    return rows.append_column("bucket", pa.repeat(pa.scalar(0, pa.int32()), rows.num_rows))


@pytest.mark.parametrize("kind", ["time", "order"])
@pytest.mark.parametrize("seed", range(5))
def test_merging_log_after_log_equals_the_plain_reference(seed: int, kind: str) -> None:
    logs = [random_log(seed * 10 + number, 60 + 30 * number) for number in range(3)]
    rows = NOTHING
    for number, log in enumerate(logs):
        before = as_dict(rows)
        result = merged(rows, [spill_of(log)], kind)
        expected = reference(logs[: number + 1], kind)
        assert as_dict(result.rows) == expected
        assert result.events_in == len(log)
        assert result.kept == sum(map(len, expected.values())) - sum(map(len, before.values()))
        assert result.changed == sum(before.get(user) != events for user, events in expected.items())
        assert result.rows["user_id"].to_pylist() == sorted(expected)
        rows = with_bucket(result.rows)


@pytest.mark.parametrize("kind", ["time", "order"])
def test_how_a_log_is_cut_into_splits_and_chunks_changes_nothing(kind: str) -> None:
    log = random_log(1, 200)
    whole = merged(NOTHING, [spill_of(log, chunk=1000)], kind).rows
    for splits, chunk in ((1, 3), (4, 7), (9, 1), (200, 5)):
        size = -(-len(log) // splits)
        parts = [spill_of(log[start : start + size], chunk) for start in range(0, len(log), size)]
        assert merged(NOTHING, parts, kind).rows.equals(whole), (splits, chunk)


@pytest.mark.parametrize("groups", [1, 4, 16, 64])
@pytest.mark.parametrize("buckets", [1, 4, 16, 64])
def test_a_spill_serves_any_number_of_buckets_decided_later(groups: int, buckets: int) -> None:
    log = random_log(2, 300, users=90)
    data = spill_of(log, chunk=50, groups=groups)
    found: dict[str, list[tuple[int, int]]] = {}
    for bucket in range(buckets):
        rows = merged(NOTHING, [data], "time", bucket, buckets).rows
        users = rows["user_id"].combine_chunks()
        assert (stable_hash(users) % np.uint64(buckets) == bucket).all()
        found.update(as_dict(rows))
    assert found == reference([log], "time")


def test_seqs_number_the_events_of_one_moment_and_weights_stay_with_their_events() -> None:
    log = [("a", 3, 5), ("a", 1, 5), ("a", 2, 4), ("a", 1, 5), ("b", 4, 5), ("a", 7, 6)]
    rows = merged(NOTHING, [spill_of(log)], "time").rows.to_pylist()
    assert [(row["items"], row["seqs"], row["weights"]) for row in rows] == [
        ([2, 3, 1, 7], [0, 0, 1, 0], [1.0, 1.5, 0.5, 3.5]),
        ([4], [0], [2.0]),
    ]


def test_a_history_key_is_the_hash_of_its_items_content_and_times_in_order() -> None:
    rows = merged(NOTHING, [spill_of([("a", 3, 5), ("a", 1, 4)])], "time").rows
    lanes = event_lanes(LANES[[1, 3]], np.array([4, 5]))
    assert rows["history_key"].to_pylist() == to_hex(sequence_lanes(lanes, np.array([2]))).to_pylist()


def test_a_late_event_goes_to_its_place_in_time_and_in_an_order_log_to_the_end() -> None:
    first, late = [("a", 1, 10), ("a", 2, 20)], [("a", 3, 15)]
    time = merged(with_bucket(merged(NOTHING, [spill_of(first)], "time").rows), [spill_of(late)], "time")
    order = merged(with_bucket(merged(NOTHING, [spill_of(first)], "order").rows), [spill_of(late)], "order")
    assert as_dict(time.rows) == {"a": [(1, 10), (3, 15), (2, 20)]}
    assert as_dict(order.rows) == {"a": [(1, 0), (2, 1), (3, 2)]}


@pytest.mark.parametrize("kind", ["time", "order"])
def test_a_new_user_with_the_very_history_of_another_is_still_a_change(kind: str) -> None:
    old = with_bucket(merged(NOTHING, [spill_of([("a", 1, 10)])], kind).rows)
    result = merged(old, [spill_of([("b", 1, 10)])], kind)
    assert as_dict(result.rows)["b"] == as_dict(result.rows)["a"]
    assert (result.kept, result.changed) == (1, 1)


def test_a_log_of_known_events_changes_nobody() -> None:
    log = random_log(3, 50)
    old = with_bucket(merged(NOTHING, [spill_of(log)], "time").rows)
    again = merged(old, [spill_of(log[::-1])], "time")
    assert (again.kept, again.changed, again.duplicates) == (0, 0, 50)
    assert with_bucket(again.rows).equals(old.cast(with_bucket(again.rows).schema))


def test_an_items_new_content_changes_exactly_the_users_who_touched_it() -> None:
    log = [("a", 1, 1), ("b", 2, 1), ("c", 1, 2), ("c", 2, 3)]
    old = with_bucket(merged(NOTHING, [spill_of(log)], "time").rows)
    lanes = LANES.copy()
    lanes[1] += np.uint64(1)
    result = merge_histories(old, [], lanes, order_kind=False)
    keys = dict(zip(old["user_id"].to_pylist(), old["history_key"].to_pylist(), strict=True))
    now = dict(zip(result.rows["user_id"].to_pylist(), result.rows["history_key"].to_pylist(), strict=True))
    assert {user for user in keys if keys[user] != now[user]} == {"a", "c"}
    assert result.changed == 2


def test_an_empty_spill_and_no_history_merge_to_nothing() -> None:
    result = merged(NOTHING, [spill_of([])], "time", 3, 4)
    assert (result.rows.num_rows, result.events_in, result.changed) == (0, 0, 0)


def test_the_groups_of_a_bucket_lie_side_by_side() -> None:
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    for buckets in (1, 2, 4, 8):
        places = [set(bucket_places(8, bucket, buckets)) for bucket in range(buckets)]
        assert set.union(*places) == set(range(8))
        assert sum(map(len, places)) == 8
        for bucket, mine in enumerate(places):
            assert {group for group in range(8) if bit_reversed(8)[group] in mine} == set(range(bucket, 8, buckets))


@pytest.mark.parametrize(("users", "tolerance"), [(0, 0), (700, 0), (30_000, 0.1)])
def test_users_are_counted_exactly_when_few_and_nearly_when_many(users: int, tolerance: float) -> None:
    sketches = []
    for first in (0, users // 3):  # the two splits share users
        spill = Spill()
        names = pa.array([f"user {n}" for n in range(first, users)], pa.string())
        ones = np.ones(len(names))
        spill.add(names, ones.astype(np.int32), ones.astype(np.int64), ones.astype(np.float32))
        spill.write()
        sketches.append(spill.sketch())
    assert estimate_users(sketches) == pytest.approx(users, rel=tolerance, abs=0)
