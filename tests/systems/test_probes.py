"""Probes of planted vectors: what they hold is read, what they do not is not, and shuffled ones tell nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raypipe.systems.early_stopping import EarlyStopping
from raypipe.systems.probes import LabelledVectors, Probe, ProbeConfig, probe_figures

ITEMS, WIDTH, USERS = 60, 32, 120
QUICK = EarlyStopping(lr=1e-2, epochs=40)
CODES = np.random.default_rng(9).normal(size=(ITEMS + 1, WIDTH)).astype(np.float32)


def sets_of(seed: int, users: int = USERS, noise: float = 0.0) -> LabelledVectors:
    """Five rows a user; a vector is the sum of the codes of its four items."""
    rng = np.random.default_rng(seed)
    targets = [(1 + rng.choice(ITEMS, 4, replace=False)).tolist() for _ in range(5 * users)]
    vectors = np.stack([CODES[mine].sum(0) for mine in targets])
    vectors += noise * rng.normal(size=vectors.shape).astype(np.float32)
    return LabelledVectors(vectors, targets, np.repeat(np.arange(users), 5))


def pairs_of(seed: int, users: int = USERS) -> LabelledVectors:
    """Two vectors side by side, and the one item that tells them apart: which of them comes first does not matter."""
    rng = np.random.default_rng(seed)
    items, sign = 1 + rng.integers(ITEMS, size=5 * users), rng.choice([-1, 1], (5 * users, 1))
    before = rng.normal(size=(5 * users, WIDTH))
    vectors = np.concatenate([before, before + sign * CODES[items]], 1).astype(np.float32)
    return LabelledVectors(vectors, items[:, None].tolist(), np.repeat(np.arange(users), 5))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_vectors_hold_of_users_never_seen_is_read_and_of_another_user_is_not(kind: str) -> None:
    figures = probe_figures(ProbeConfig(kind=kind, training=QUICK).fit(sets_of(0), ITEMS), sets_of(1))
    assert figures["recovered"].value > 0.8
    assert figures["shuffled states: recovered"].value == pytest.approx(4 / ITEMS, abs=0.03)


def test_less_is_read_of_noisier_vectors_and_of_noise_nothing() -> None:
    config = ProbeConfig(kind="linear", training=QUICK)
    read = {
        noise: probe_figures(config.fit(sets_of(0, noise=noise), ITEMS), sets_of(1, noise=noise))["recovered"].value
        for noise in (0.0, 3.0, 1000.0)
    }
    assert read[0.0] > read[3.0] + 0.2 > read[1000.0] + 0.3
    assert read[1000.0] == pytest.approx(4 / ITEMS, abs=0.03)


def test_what_was_seen_takes_no_place_among_the_best_five() -> None:
    probe = ProbeConfig(kind="linear", training=QUICK).fit(sets_of(0), ITEMS)
    told = sets_of(1)
    seen, seventh = [[1, 2, 3, 4, 5, 6]] * len(told.users), replace(told, targets=[[7]] * len(told.users))
    with torch.no_grad():
        probe.layers.bias[:] = -torch.arange(ITEMS + 1) * 1e4  # the smaller an item, the better, whatever the vector
    assert "unseen hit@5" not in probe_figures(probe, seventh)
    figures = probe_figures(probe, replace(seventh, seen=seen))
    assert figures["hit@5"].value == 0
    assert figures["unseen hit@5"].value == figures["shuffled states: unseen hit@5"].value == 1


def test_a_hidden_layer_reads_what_is_not_linear() -> None:
    linear = probe_figures(ProbeConfig(kind="linear", training=QUICK).fit(pairs_of(0, 400), ITEMS), pairs_of(1))
    mlp = probe_figures(ProbeConfig(training=QUICK).fit(pairs_of(0, 400), ITEMS), pairs_of(1))
    assert linear["recovered"].value < 0.1
    assert mlp["recovered"].value > 0.5
    assert mlp["hit@5"].value > mlp["recovered"].value
    assert mlp["shuffled states: hit@5"].value == pytest.approx(5 / ITEMS, abs=0.05)


def test_figures_are_those_of_sorting_the_scores() -> None:
    probe, rows = ProbeConfig(training=EarlyStopping(epochs=2)).fit(sets_of(0), ITEMS), sets_of(1, 20)
    figures = probe_figures(probe, rows)
    with torch.no_grad():
        scores = probe(torch.from_numpy(rows.vectors)).numpy()
    best = 1 + np.argsort(-scores[:, 1:], axis=1)
    recovered = [len({*order[:4]} & {*mine}) / 4 for order, mine in zip(best, rows.targets, strict=True)]
    hits = [len({*order[:5]} & {*mine}) / 4 for order, mine in zip(best, rows.targets, strict=True)]
    assert figures["recovered"].value == pytest.approx(np.mean(recovered))
    assert figures["hit@5"].value == pytest.approx(np.mean(hits))


def test_a_probe_without_an_opinion_is_at_chance_and_repeated_targets_count_once() -> None:
    probe = ProbeConfig(kind="linear", training=EarlyStopping(epochs=1)).fit(sets_of(0), ITEMS)
    assert isinstance(probe.layers, nn.Linear)
    nn.init.zeros_(probe.layers.weight)
    nn.init.zeros_(probe.layers.bias)
    rows = sets_of(1, 4)
    twice = LabelledVectors(rows.vectors, [mine * 2 for mine in rows.targets], rows.users)
    assert probe_figures(probe, twice)["recovered"].value == pytest.approx(4 / ITEMS)


def test_a_column_that_never_changed_in_training_says_nothing_later() -> None:
    rows = sets_of(0)
    rows.vectors[:, 3] = 0.1
    probe = ProbeConfig(training=EarlyStopping(epochs=1)).fit(rows, ITEMS)
    changed = rows.vectors[:5].copy()
    changed[:, 3] = 1e6
    with torch.no_grad():
        torch.testing.assert_close(probe(torch.from_numpy(changed)), probe(torch.from_numpy(rows.vectors[:5])))


def test_the_control_gives_every_row_the_vector_of_another_user() -> None:
    users = np.array([3, 1, 3, 2, 1, 3])
    rows = LabelledVectors(np.arange(6, dtype=np.float32)[:, None], [[1]] * 6, users)
    given = rows.of_others().vectors[:, 0].astype(int)
    assert sorted(given) == list(range(6))
    assert (users[given] != users).all()
    with pytest.raises(ValueError, match="Half of the rows at most"):
        LabelledVectors(rows.vectors[:5], [[1]] * 5, np.array([3, 1, 3, 2, 3])).of_others()


def test_equal_seeds_give_equal_probes_and_one_user_is_too_few() -> None:
    config = ProbeConfig(training=EarlyStopping(epochs=2))
    one, other = (config.fit(sets_of(0), ITEMS).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert isinstance(config.fit(sets_of(0), ITEMS), Probe)
    with pytest.raises(ValueError, match="at least two"):
        config.fit(sets_of(0, 1), ITEMS)
