"""Who ends a training, and which weights it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from raypipe.systems.early_stopping import EarlyStopping

USERS = np.repeat(np.arange(20), 3)


def test_no_user_is_both_learnt_from_and_asked() -> None:
    learnt, asked = EarlyStopping(validated=0.2).split(USERS)
    assert sorted([*learnt, *asked]) == list(range(60))
    assert len(set(USERS[asked])) == 4
    assert not set(USERS[learnt]) & set(USERS[asked])
    with pytest.raises(ValueError, match="at least two"):
        EarlyStopping().split(np.zeros(5, np.int64))


def trained(options: EarlyStopping, noise: float) -> tuple[float, float]:
    """Squared error of a model on the rows that end its training, and on unseen ones."""
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(200, 50)).astype(np.float32))
    values = vectors[:, :1] + noise * torch.from_numpy(rng.normal(size=(200, 1)).astype(np.float32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(50, 1)
    users = np.arange(100)

    def error(rows: np.ndarray) -> torch.Tensor:
        return functional.mse_loss(model(vectors[rows]), values[rows])

    options.run(model, error, users)
    assert not model.training
    with torch.no_grad():
        return float(error(options.split(users)[1])), float(error(np.arange(100, 200)))


def test_training_ends_before_noise_is_learnt_by_heart() -> None:
    patient, long = (
        EarlyStopping(lr=1e-2, patience=10, validated=0.2),
        EarlyStopping(lr=1e-2, epochs=2000, patience=2000),
    )
    assert trained(patient, 3.0)[1] < 13  # the noise alone is 9
    # Even when it may go on for ever, the best weights are left.
    assert trained(long, 3.0)[0] <= trained(long.model_copy(update={"epochs": 20}), 3.0)[0]


def test_equal_seeds_give_equal_weights_and_leave_the_callers_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert trained(EarlyStopping(epochs=3), 1.0) == trained(EarlyStopping(epochs=3), 1.0)
    assert torch.equal(torch.rand(3), expected)
    assert trained(EarlyStopping(epochs=3, seed=1), 1.0) != trained(EarlyStopping(epochs=3), 1.0)
