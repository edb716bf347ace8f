"""Attention in blocks beside torch's own, its gradients beside differences, and what dropping does to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raypipe.recommenders.dropped_attention import dropped_attention

# Several blocks of queries, the last one short; several groups of sequences.
BATCH, HEADS, LENGTH, WIDTH = 9, 2, 150, 8


def tensors(length: int = LENGTH, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (batch, HEADS, length, WIDTH)
    return [torch.randn(shape, dtype=dtype, generator=rng, requires_grad=True) for _ in range(3)]


def inside(causal: bool, length: int = LENGTH, batch: int = BATCH) -> Tensor | None:
    if causal:
        return None
    lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(1))
    return torch.arange(length) < lengths[:, None]


@pytest.mark.parametrize("causal", [True, False])
def test_with_nothing_dropped_it_is_torchs_attention(causal: bool) -> None:
    given = tensors()
    real = inside(causal)
    mask = None if real is None else real[:, None, None, :]
    expected = functional.scaled_dot_product_attention(*given, mask, is_causal=causal)
    found = dropped_attention(*given, 0, real)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad(found, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_weights_that_were_kept(causal: bool) -> None:
    def drawn_alike(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return dropped_attention(queries, keys, values, 100, inside(causal, 7, 2))

    assert torch.autograd.gradcheck(drawn_alike, tensors(7, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_the_mean_of_many_draws_is_what_nothing_dropped_gives(causal: bool) -> None:
    given, real = [tensor.detach() for tensor in tensors(70, 2)], inside(causal, 70, 2)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        mean = torch.stack([dropped_attention(*given, 64, real) for _ in range(2000)]).mean(0)
    whole = dropped_attention(*given, 0, real)
    assert (mean - whole).abs().max() < 0.1
    # A single draw is another thing.
    assert (dropped_attention(*given, 64, real) - whole).abs().max() > 0.3


def test_a_first_query_sees_itself_or_nothing() -> None:
    given = [tensor.detach() for tensor in tensors(70, 200)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = dropped_attention(*given, 64, None)[:, :, 0]
    nothing = (first == 0).all(-1)
    torch.testing.assert_close(first[~nothing], given[2][:, :, 0][~nothing] * 256 / 192)
    assert nothing.float().mean() == pytest.approx(0.25, abs=0.06)
