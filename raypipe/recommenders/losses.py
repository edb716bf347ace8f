"""Next-item losses that never hold a [positions × catalogue] tensor.

A loss compares the score of the item that came next with the scores of candidates that all positions share: the whole
catalogue or a sample. Scores are computed for a block of positions at a time and turned into gradients at once, so that
memory holds one block of `_BLOCK_SCORES` scores, or the scores of 16 positions, plus the gradients.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from raypipe.config import Config, shaping

_BLOCK_SCORES = 2**21
"""8 MB of float32: large enough for the matrix product, small enough for the second-level caches of a few cores."""


class LossConfig(Config):
    """Which loss, and what it samples."""

    kind: Literal["softmax", "sampled_softmax", "gbce", "bce"] = shaping(
        "softmax", "over the whole catalogue; over shared negatives with logQ correction; gSASRec's; SASRec's"
    )
    negatives: int = shaping(512, "shared by all positions of a step; `bce` draws one for each position", ge=1)
    popularity: float = shaping(0.5, "exponent of an item's count in the sampling of `sampled_softmax`", ge=0, le=1)
    calibration: float = shaping(0.75, "t of gBCE: 0 is BCE, 1 removes all overconfidence", ge=0, le=1)

    @property
    def samples(self) -> bool:
        return self.kind != "softmax"


def softmax_loss(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies over the whole catalogue.

    states [positions, width]; table [items + 1, width], whose row 0, padding, is no candidate; targets int64 [positions]
    in 1…items.
    """
    positives = _wide((states * table[targets]).sum(1))
    return _SharedCandidates.apply(states, table[1:], positives, targets - 1, None, False)


def sampled_softmax_loss(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, expected: Tensor) -> Tensor:
    """Sum of the cross-entropies over the target and shared negatives, with logQ correction (Bengio & Senécal 2008).

    negatives int64 [samples], distinct items; expected [items + 1], the probability of each item to be in the sample. A
    negative that is a position's target is no candidate for that position. The target itself is always a candidate, so
    its score is not corrected, and the sum of exponentials is an unbiased estimate of that over the whole catalogue.
    """
    positives = _wide((states * table[targets]).sum(1))
    column = _columns(negatives, len(table))[targets]
    bias = -expected[negatives].log()
    return _SharedCandidates.apply(states, table[negatives], positives, column, bias, False)


def gbce_loss(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, calibration: float) -> Tensor:
    """Sum over positions of the generalised binary cross-entropy (Petrov & Macdonald, RecSys 2023, eq. 10).

    At each position it is the mean over the samples and the target. σ of the positive score is raised to
    β = α (t (1 − 1/α) + 1/α), where α = samples / (items − 1).
    """
    alpha = len(negatives) / max(1, len(table) - 2)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    positives = _wide((states * table[targets]).sum(1))
    column = _columns(negatives, len(table))[targets]
    against = _SharedCandidates.apply(states, table[negatives], torch.zeros_like(positives), column, None, True)
    return (against - beta * functional.logsigmoid(positives).sum()) / (len(negatives) + 1)


def bce_loss(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Sum of binary cross-entropies of the target against one negative per position (Kang & McAuley, ICDM 2018, eq. 6).

    negatives int64 [positions].
    """
    positive = _wide((states * table[targets]).sum(1))
    negative = _wide((states * table[negatives]).sum(1))
    return functional.softplus(-positive).sum() + functional.softplus(negative).sum()


def _wide(values: Tensor) -> Tensor:
    """The values in at least float32: sums over a catalogue lose too much precision in 16 bits."""
    return values.float() if values.dtype.itemsize < 4 else values


def _columns(negatives: Tensor, items: int) -> Tensor:
    """The column of each item among the negatives, int64 [items]; −1 if it is not among them."""
    columns = negatives.new_full((items,), -1)
    columns[negatives] = torch.arange(len(negatives), device=negatives.device)
    return columns


class _SharedCandidates(torch.autograd.Function):
    """Summed loss of all positions against shared candidates. The gradients are computed with the scores.

    forward(states [positions, width], candidates [m, width], positives [positions], hits int64 [positions], bias [m] or
    None, binary) → scalar. `hits` is the column of the position's own target, −1 for none; that column is left out.
    With `binary` the loss is Σ softplus(scores), and positives do not matter; otherwise it is Σ (logsumexp(positive,
    scores) − positive).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        candidates: Tensor,
        positives: Tensor,
        hits: Tensor,
        bias: Tensor | None,
        binary: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float64, device=states.device)
        share = torch.empty_like(positives)  # of the positive in the softmax
        to_states = torch.empty_like(states) if wanted else None
        to_candidates = torch.zeros_like(_wide(candidates)) if wanted else None
        block = max(16, _BLOCK_SCORES // max(1, len(candidates)))
        for start in range(0, len(states), block):
            part = slice(start, start + block)
            rows = states[part]
            scores = _wide(rows @ candidates.T)
            if bias is not None:
                scores += bias
            hit = hits[part]
            at = torch.nonzero(hit >= 0)[:, 0]
            scores[at, hit[at]] = -math.inf
            if binary:
                loss += functional.softplus(scores).sum()
                weights, scale = scores.sigmoid_(), None
            else:
                own = positives[part]
                top = torch.maximum(scores.amax(1), own)
                weights = scores.sub_(top[:, None]).exp_()
                own_weight = (own - top).exp()
                total = weights.sum(1) + own_weight
                loss += (total.log() + top - own).sum()
                share[part] = own_weight / total
                scale = total.reciprocal()[:, None]
            if to_states is not None and to_candidates is not None:
                weights = weights.to(states.dtype)
                gradient = weights @ candidates
                to_states[part] = gradient if scale is None else gradient * scale
                to_candidates.addmm_(_wide(weights).T, _wide(rows if scale is None else rows * scale))
        ctx.binary = binary
        ctx.save_for_backward(to_states, to_candidates, share)
        return loss.to(positives.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        to_states, to_candidates, share = ctx.saved_tensors
        to_positives = None if ctx.binary else (share - 1) * factor
        dtype = to_states.dtype
        return to_states * factor.to(dtype), (to_candidates * factor).to(dtype), to_positives, None, None, None
