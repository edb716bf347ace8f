"""Dropout against its definition: rate, scale, gradient, seed; and attention that is dropped against the plain formula."""

from __future__ import annotations

import pytest
import torch

from raypipe.recommenders.attention import Attention
from raypipe.recommenders.dropout import Dropout
from raypipe.recommenders.sequences import Sequences


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_values_are_dropped_at_the_rate_and_the_rest_scaled_up(rate: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(1000, 1001, requires_grad=True)
    dropped = Dropout(rate)(values)
    zero = dropped == 0
    # Every byte position of a word draws alike.
    for place in range(8):
        assert zero.flatten()[place::8].float().mean().item() == pytest.approx(rate, abs=0.006)
    assert dropped.mean().item() == pytest.approx(1, abs=0.005)
    assert dropped[~zero].unique().numel() == 1
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, dropped.detach())


def test_draws_follow_the_seed_and_nothing_is_dropped_in_eval_mode() -> None:
    values, dropout = torch.ones(10_000), Dropout(0.3)
    torch.manual_seed(1)
    first, second = dropout(values), dropout(values)
    torch.manual_seed(1)
    assert torch.equal(dropout(values), first)
    assert not torch.equal(first, second)
    # Neighbours know nothing of each other.
    kept = (first > 0).float() - 0.7
    assert abs((kept[1:] * kept[:-1]).mean().item()) < 0.01
    assert torch.equal(dropout.eval()(values), values)
    assert torch.equal(Dropout(0.001).train()(values), values)


@pytest.mark.parametrize("causal", [True, False])
def test_dropped_attention_is_attention_on_average(causal: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 0.2, causal=causal, rotary=False)
    sequences = Sequences.of([[1] * 5, [1] * 3])
    states = torch.randn(8, 16)
    with torch.no_grad():
        drawn = torch.stack([attention(states, sequences) for _ in range(3000)])
        expected = attention.eval()(states, sequences)
    assert drawn.std(0).min() > 0.005
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.02, rtol=0)
