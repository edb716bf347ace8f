"""What counts and texts tell of a candidate: the numbers of plain loops, graded from 0 to 9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raypipe.errors import UsageError
from raypipe.recommenders.windows import Histories
from raypipe.systems.candidate_facts import FORM, NAMES, Facts, chosen_by, text_neighbours, text_vectors

ITEMS, USERS, HISTORY = 30, 50, 4
WORDS = ["red", "blue", "green", "square", "round", "flat"]


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 3)) for _ in range(ITEMS - 1)] + [""]


def histories() -> Histories:
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, ITEMS + 1, rng.integers(1, 9)) for _ in range(USERS)]
    return Histories(np.concatenate(rows).astype(np.int32), np.cumsum([len(row) for row in rows]))


def facts(base: Histories) -> Facts:
    vectors = text_vectors(texts())
    return Facts.of(base, vectors, text_neighbours(vectors, 5), HISTORY)


def by_loops(base: Histories, history: list[int], candidate: int) -> list[float]:
    """In float64, with matrices of all items."""
    rows = [set(base.items[start:stop].tolist()) for start, stop in zip(base.starts, base.ends, strict=True)]
    together = np.array(
        [[sum({a, b} <= row for row in rows) for b in range(ITEMS + 1)] for a in range(ITEMS + 1)], float
    )
    np.fill_diagonal(together, 0)
    sums = np.maximum(together.sum(1), 1)
    together /= np.sqrt(sums[:, None] * sums[None])
    vectors = text_vectors(texts()).toarray().astype(float)
    alike = vectors @ vectors.T
    near = np.zeros_like(alike)
    for item in range(1, ITEMS + 1):
        least = np.sort(alike[item])[-5]
        near[item] = np.where((alike[item] >= least) & (alike[item] > 0), alike[item], 0)
        near[item] /= max(near[item].sum(), 1e-12)
    smooth = near @ together @ near.T
    after = np.zeros((ITEMS + 1, ITEMS + 1))
    for start, stop in zip(base.starts.tolist(), base.ends.tolist(), strict=True):
        for place in range(start, stop):
            for later in range(place + 1, min(place + 11, stop)):
                after[base.items[place], base.items[later]] += 1
    after /= np.maximum(after.sum(1, keepdims=True), 1)
    recent = history[-HISTORY:]
    return [
        np.log1p((base.items == candidate).sum()),
        recent.count(candidate),
        smooth[recent[-1], candidate],
        sum(smooth[item, candidate] for item in recent),
        alike[recent[-1], candidate],
        np.mean([alike[item, candidate] for item in recent]),
        sum((together @ together)[item, candidate] for item in recent),
        after[recent[-1], candidate],
        sum(after[item, candidate] for item in recent[-5:]),
    ]


def test_values_are_those_of_plain_loops() -> None:
    base = histories()
    rng = np.random.default_rng(2)
    rows = np.flatnonzero(base.lengths > 1)[:6]
    prefixes = base.take(base.starts[rows], base.lengths[rows])
    candidates = rng.integers(1, ITEMS + 1, (6, 4)).astype(np.int32)
    candidates[0, 0] = prefixes.items[0]
    values = facts(base).values(prefixes, candidates)
    assert values.shape == (6, 4, len(NAMES))
    for row in range(6):
        history = prefixes.items[prefixes.starts[row] : prefixes.ends[row]].tolist()
        for column in range(4):
            expected = by_loops(base, history, int(candidates[row, column]))
            np.testing.assert_allclose(values[row, column], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 600])
def test_values_are_those_of_whole_products_over_all_items(count: int) -> None:
    base, rng = histories(), np.random.default_rng(3)
    rows = rng.integers(0, USERS, count)
    prefixes = base.take(base.starts[rows], base.lengths[rows])
    candidates = rng.integers(1, ITEMS + 1, (count, 5)).astype(np.int32)
    mine = facts(base)
    whole = chosen_by(prefixes, ITEMS + 1, HISTORY).toarray().astype(float)
    last = chosen_by(prefixes, ITEMS + 1, 1).toarray().astype(float)
    together, near, vectors = (one.toarray().astype(float) for one in (mine.together, mine.neighbours, mine.vectors))
    smooth, alike = near @ together @ near.T, vectors @ vectors.T
    lengths = np.minimum(prefixes.lengths, HISTORY)[:, None]
    after = mine.followed.toarray().astype(float).T
    tables = [whole, last @ smooth, whole @ smooth, last @ alike, whole @ alike / lengths, whole @ together @ together]
    tables += [last @ after, whole @ after]  # Of four events that count, the last five are all.
    values = mine.values(prefixes, candidates)
    assert values.shape == (count, 5, len(NAMES))
    for fact, table in enumerate(tables, 1):
        np.testing.assert_allclose(
            values[:, :, fact], table[np.arange(count)[:, None], candidates], rtol=1e-5, atol=1e-6
        )


def test_numbers_go_from_nothing_to_nine_in_the_order_of_what_they_tell() -> None:
    base = histories()
    every = np.arange(1, ITEMS + 1, dtype=np.int32)[None]
    prefix = Histories(np.array([3, 3, 5], np.int32), np.array([3]))
    mine = facts(base)
    grades, values = mine.graded(prefix, every)[0], mine.values(prefix, every)[0]
    assert grades.min() == 0
    assert grades.max() == 9
    for fact in range(len(NAMES)):
        order = np.argsort(values[:, fact], kind="stable")
        assert (np.diff(grades[order, fact]) >= 0).all()
        np.testing.assert_array_equal(grades[:, fact] == 0, values[:, fact] == 0)
    assert grades[[2, 4, 0], NAMES.index("again")].tolist() == [2, 1, 0]
    ((told, *_),) = mine.told(prefix, every)
    assert told == FORM.format(*grades[0])


def test_stored_facts_tell_the_same_and_nothing_of_items_that_came_later(tmp_path: Path) -> None:
    every = np.arange(1, ITEMS + 3, dtype=np.int32)[None]
    prefix = Histories(np.array([3, ITEMS + 2, 5], np.int32), np.array([3]))
    mine = facts(histories())
    mine.save(tmp_path)
    grades = Facts.load(tmp_path, ITEMS + 2).graded(prefix, every)
    known = Histories(np.array([3, 5], np.int32), np.array([2]))
    apart = grades[:, :ITEMS] - mine.graded(known, every[:, :ITEMS])
    # The history is one event longer, by which likeness is a mean.
    assert (np.delete(apart, NAMES.index("alike"), 2) == 0).all()
    assert grades[0, ITEMS:, NAMES.index("again")].tolist() == [0, 1]
    assert (np.delete(grades[0, ITEMS:], NAMES.index("again"), 1) == 0).all()
    np.testing.assert_array_equal(
        Facts.load(tmp_path, ITEMS).graded(known, every[:, :ITEMS]), mine.graded(known, every[:, :ITEMS])
    )


def test_facts_that_another_version_stored_are_refused_with_the_remedy(tmp_path: Path) -> None:
    mine = facts(histories())
    mine.save(tmp_path)
    (file,) = tmp_path.iterdir()
    kept = {name: array for name, array in load_file(file).items() if not name.startswith("followed/")}
    save_file(kept, file)
    with pytest.raises(UsageError, match="of another version") as refused:
        Facts.load(tmp_path, ITEMS)
    assert "`raypipe align --system trsr`" in str(refused.value)


def test_twice_the_log_tells_the_same() -> None:
    once = histories()
    twice = Histories(np.tile(once.items, 2), np.concatenate([once.ends, once.ends + once.ends[-1]]))
    every = np.arange(1, ITEMS + 1, dtype=np.int32)[None]
    prefix = Histories(np.array([3, 7, 5], np.int32), np.array([3]))
    apart = facts(once).graded(prefix, every) - facts(twice).graded(prefix, every)
    assert (apart == 0).mean() > 0.9
    assert abs(apart).max() <= 1


@pytest.mark.parametrize("base", [Histories(np.zeros(0, np.int32), np.zeros(3, np.int64)), histories()])
def test_after_nothing_there_is_nothing_to_tell_but_what_is_popular(base: Histories) -> None:
    prefix = Histories(np.zeros(0, np.int32), np.zeros(1, np.int64))
    grades = facts(base).graded(prefix, np.array([[1, 2, 3]], np.int32))
    assert (grades[:, :, 1:] == 0).all()
    assert (grades[:, :, 0] > 0).all() == bool(len(base.items))
