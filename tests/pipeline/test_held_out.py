"""Held-out users: the same ones everywhere, of the size asked for, and no bucket's alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raypipe.pipeline.held_out import are_held_out, some_of
from raypipe.pipeline.lm import training_histories
from raypipe.pipeline.sequences import read_histories, read_ties
from raypipe.storage.hashing import stable_hash
from raypipe.storage.workspace import Workspace

USERS = pa.array([f"user {n}" for n in range(20_000)])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_so_many_are_held_out(share: float) -> None:
    assert are_held_out(USERS, share).mean() == pytest.approx(share, abs=0.01)


def test_it_follows_from_the_id_alone_and_shares_are_nested() -> None:
    tenth, half = are_held_out(USERS, 0.1), are_held_out(USERS, 0.5)
    assert not (tenth & ~half).any()
    assert np.array_equal(are_held_out(USERS.take(pa.array([5, 3])), 0.5), half[[5, 3]])


def test_every_bucket_has_its_share_of_them() -> None:
    buckets = stable_hash(USERS).astype(np.uint64) % 16
    held = are_held_out(USERS, 0.2)
    assert max(abs(held[buckets == bucket].mean() - 0.2) for bucket in range(16)) < 0.05


def test_some_are_as_many_of_those_there_are_and_the_same_whoever_else_is_there() -> None:
    among = np.arange(len(USERS)) % 3 > 0
    some = some_of(USERS, among, 1_000)
    assert (some.sum(), (some & ~among).sum()) == (1_000, 0)
    assert not (some_of(USERS, among, 500) & ~some).any()
    # Nor are they those whom no training sees.
    assert are_held_out(USERS, 0.2)[some].mean() == pytest.approx(0.2, abs=0.05)
    backwards = some_of(USERS.take(pa.array(np.arange(len(USERS))[::-1])), among[::-1], 1_000)
    assert np.array_equal(backwards[::-1], some)
    assert np.array_equal(some_of(USERS, among, len(USERS)), among)


def test_neither_a_recommender_nor_a_language_model_reads_them(ingested: str) -> None:
    workspace = Workspace(ingested)
    version = workspace.tables["histories"].version()
    everyone, whole = read_histories(workspace, version)
    kept = ~are_held_out(everyone, 0.5)
    assert 5 < kept.sum() < 20
    users, histories = read_histories(workspace, version, 0.5)
    assert users.to_pylist() == everyone.filter(pa.array(kept)).to_pylist()
    assert histories.items.tolist() == whole.take(whole.starts[kept], whole.lengths[kept]).items.tolist()
    assert len(read_ties(workspace, version, 0.5).items) == len(histories.items)
    for_lm = training_histories(workspace, version, 100, 0.5)["items"].to_pylist()
    assert sorted(map(len, for_lm)) == sorted(histories.lengths.tolist())
    few = training_histories(workspace, version, 5, 0.5)["user_id"].to_pylist()
    first = users.take(pa.array(np.argsort(stable_hash(users))[:5])).to_pylist()
    assert few == sorted(first)
    assert training_histories(workspace, version, 5, 1.0).num_rows == 0
