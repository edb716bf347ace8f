"""Attention with dropout of its weights, for training on CPU.

torch's own kernel has no dropout on CPU, and written as one product after the other, every step passes over a [batch,
heads, length, length] tensor in memory. Here the queries of a few sequences are taken at a time, so that their weights
stay in a core's caches, and under a causal mask the keys behind the last query of a block are left out. That takes two
thirds of the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raypipe.recommenders.dropout import draw_kept

_BLOCK_WEIGHTS = 2**18  # of float32: 1 MB
_BLOCK_QUERIES = 64


def dropped_attention(queries: Tensor, keys: Tensor, values: Tensor, dropped: int, inside: Tensor | None) -> Tensor:
    """softmax(queries · keysᵀ / √width) with `dropped` of 256 weights dropped, times values.

    The result is [batch, heads, length, width], as are `queries`, `keys` and `values`. `inside` bool [batch, length]
    says which keys are real; if it is None, a query sees the keys up to its own place. The weights that stay are scaled
    by 256 / (256 − dropped).
    """
    return _DroppedAttention.apply(queries, keys, values, dropped, inside)


class _DroppedAttention(torch.autograd.Function):
    """Saves each block's weights and which of them were kept for the backward pass: five bytes a weight."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, dropped: int, inside: Tensor | None) -> Tensor:
        shape = queries.shape
        ctx.scale, ctx.kept_scale = shape[-1] ** -0.5, 256 / (256 - dropped)
        ctx.blocks = _blocks(shape[0] * shape[1], shape[2], causal=inside is None)
        queries, keys, values = (tensor.reshape(-1, *shape[2:]) for tensor in (queries, keys, values))
        bias = None if inside is None else _bias(inside, queries).repeat_interleave(shape[1], 0)
        future = queries.new_full((_BLOCK_QUERIES, _BLOCK_QUERIES), -math.inf).triu_(1)
        mixed = torch.empty_like(values)
        saved = []
        for rows, asking, seen in ctx.blocks:
            scores = (queries[rows, asking] * ctx.scale) @ keys[rows, seen].transpose(1, 2)
            if bias is None:
                own = scores[:, :, asking]
                own += future[: own.shape[1], : own.shape[2]]
            else:
                scores += bias[rows, None]
            weights = scores.softmax(-1)
            kept = draw_kept(weights.shape, dropped)
            mixed[rows, asking] = (weights * kept) @ values[rows, seen]
            saved += [weights, kept]
        mixed *= ctx.kept_scale
        ctx.save_for_backward(queries, keys, values, mixed, *saved)
        return mixed.view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mixed, *saved = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].reshape(mixed.shape)
        # The term of softmax's normalisation in each row: Σ weights · gradients, which is mixture · its gradient.
        inner = (gradient * mixed).sum(-1, keepdim=True)
        gradient = gradient * ctx.kept_scale
        to_queries, to_keys, to_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for (rows, asking, seen), weights, kept in zip(ctx.blocks, saved[::2], saved[1::2], strict=True):
            own = gradient[rows, asking]
            to_values[rows, seen] += (weights * kept).transpose(1, 2) @ own
            to_scores = (own @ values[rows, seen].transpose(1, 2)).mul_(kept).sub_(inner[rows, asking]).mul_(weights)
            to_queries[rows, asking] = to_scores @ keys[rows, seen]
            to_keys[rows, seen] += to_scores.transpose(1, 2) @ queries[rows, asking]
        to_queries *= ctx.scale
        to_keys *= ctx.scale
        return to_queries.view(shape), to_keys.view(shape), to_values.view(shape), None, None


def _blocks(rows: int, length: int, *, causal: bool) -> list[tuple[slice, slice, slice]]:
    """The blocks: which (sequence, head) pairs, which of their queries, and the keys that those see."""
    together = max(1, _BLOCK_WEIGHTS // length**2)
    size = _BLOCK_QUERIES if causal else length
    return [
        (slice(row, row + together), slice(query, query + size), slice(0, query + size if causal else length))
        for row in range(0, rows, together)
        for query in range(0, length, size)
    ]


def _bias(inside: Tensor, like: Tensor) -> Tensor:
    """What is added to scores, [batch, length]: 0 for real keys, −∞ for the others."""
    return like.new_zeros(inside.shape).masked_fill_(~inside, -math.inf)
