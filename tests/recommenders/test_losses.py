"""Every loss against its definition in float64, written with one [positions × catalogue] tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raypipe.recommenders import losses
from raypipe.recommenders.losses import bce_loss, gbce_loss, sampled_softmax_loss, softmax_loss

POSITIONS, ITEMS, WIDTH = 57, 40, 6
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    states = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, generator=rng)
    table = torch.randn(ITEMS + 1, WIDTH, dtype=torch.float64, generator=rng)
    return states, table, torch.randint(1, ITEMS + 1, (POSITIONS,), generator=rng)


NEGATIVES = torch.tensor([3, 9, 1, 30, 17, 22])
EXPECTED = torch.linspace(0.05, 0.9, ITEMS + 1, dtype=torch.float64)
OWN = torch.arange(POSITIONS) % ITEMS + 1


def textbook_sampled(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    scores = states @ table.T
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        negatives = [n for n in NEGATIVES.tolist() if n != target]
        estimate = scores[row, target].exp() + (scores[row, negatives].exp() / EXPECTED[negatives]).sum()
        total = total - scores[row, target] + estimate.log()
    return total


def textbook_gbce(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    alpha = len(NEGATIVES) / (ITEMS - 1)
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    scores = states @ table.T
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        negatives = [n for n in NEGATIVES.tolist() if n != target]
        total = (
            total - (scores[row, target].sigmoid() ** beta).log() - (1 - scores[row, negatives].sigmoid()).log().sum()
        )
    return total / (len(NEGATIVES) + 1)


def textbook_bce(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    scores = states @ table.T
    rows = torch.arange(POSITIONS)
    ones, zeros = torch.ones(POSITIONS, dtype=torch.float64), torch.zeros(POSITIONS, dtype=torch.float64)
    return functional.binary_cross_entropy_with_logits(
        scores[rows, targets], ones, reduction="sum"
    ) + functional.binary_cross_entropy_with_logits(scores[rows, OWN], zeros, reduction="sum")


PAIRS = {
    "softmax": (
        softmax_loss,
        lambda s, t, y: functional.cross_entropy(s @ t[1:].T, y - 1, reduction="sum"),
    ),
    "sampled_softmax": (lambda s, t, y: sampled_softmax_loss(s, t, y, NEGATIVES, EXPECTED), textbook_sampled),
    "gbce": (lambda s, t, y: gbce_loss(s, t, y, NEGATIVES, 0.75), textbook_gbce),
    "bce": (lambda s, t, y: bce_loss(s, t, y, OWN), textbook_bce),
}


@pytest.mark.parametrize("scores_at_once", [1, 400, 10**6])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_loss_and_its_gradients_are_those_of_the_textbook(
    inputs: tuple[Tensor, Tensor, Tensor], kind: str, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK_SCORES", scores_at_once)
    found = []
    for function in PAIRS[kind]:
        states, table = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
        loss = function(states, table, inputs[2])
        (loss * 3).backward()
        found.append((loss.detach(), states.grad, table.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_no_tensor_is_positions_times_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    states, table = torch.randn(512, 8, requires_grad=True), torch.randn(50_001, 8, requires_grad=True)
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(self: Tensor, other: Tensor) -> Tensor:
        nonlocal largest
        product = matmul(self, other)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    softmax_loss(states, table, torch.arange(1, 513)).backward()
    assert 50_000 <= largest <= losses._BLOCK_SCORES


def test_sampled_softmax_with_logq_correction_estimates_the_full_loss() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    items, width = 200, 8
    states, table, targets = torch.randn(300, width), torch.randn(items + 1, width), torch.randint(1, items + 1, (300,))
    shares = 1 / np.arange(1, items + 1)
    shares /= shares.sum()
    inclusion = torch.tensor(np.concatenate([[1.0], -np.expm1(100 * np.log1p(-shares))]), dtype=torch.float32)
    samples = [torch.from_numpy(np.unique(rng.choice(items, 100, p=shares) + 1)) for _ in range(50)]

    def mean_over_samples(expected: Tensor) -> float:
        return float(np.mean([sampled_softmax_loss(states, table, targets, n, expected) for n in samples]))

    full = float(softmax_loss(states, table, targets))
    assert mean_over_samples(inclusion) == pytest.approx(
        full, rel=0.08
    )  # the logarithm of an estimate is biased downwards
    assert mean_over_samples(torch.ones(items + 1)) < 0.9 * full
