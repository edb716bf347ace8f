"""Probes: classifiers that read what a vector holds, to measure what is lost on the way from a state to words.

One probe reads a recommender's states, another their projections, a third a language model's hidden states. All are
trained on the same rows with the same config. Their figures on users they never saw can be compared with each other,
and bound what words could tell (`recinterpreter.figures`). A control reads another user's vectors. After Alain & Bengio
(arXiv 1610.01644).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from raypipe.config import Config, shaping
from raypipe.metrics.ranking import Mean, hit_rate
from raypipe.recommenders.scoring import Filters, ranks_among
from raypipe.recommenders.sequences import Sequences
from raypipe.systems.early_stopping import EarlyStopping

CONTROL = "shuffled states"
_HIT = 5


@dataclass(frozen=True)
class LabelledVectors:
    """Vectors to read and the items to be read from each.

    `vectors` float32 [n, width]; to probe what lies between two states, a row holds both side by side. `targets` are
    item indices (1…items) of each row, at least one: the last items of a history, or a single item. `users` int64 [n]
    are the rows' users. `seen` are items of each row that are not targets and take no place in `unseen hit@5`.
    """

    vectors: NDArray[np.float32]
    targets: Sequence[Sequence[int]]
    users: NDArray[np.int64]
    seen: Sequence[Sequence[int]] = ()

    def of_others(self) -> LabelledVectors:
        """A control: every row gets another user's vector. Raises ValueError if a user has over half of the rows."""
        order = np.argsort(self.users, kind="stable")
        shift = int(np.unique(self.users, return_counts=True)[1].max())
        if 2 * shift > len(order):
            raise ValueError("Half of the rows at most may be one user's, so that all can have a vector of another's.")
        vectors = np.empty_like(self.vectors)
        vectors[order] = self.vectors[np.roll(order, shift)]
        return LabelledVectors(vectors, self.targets, self.users, self.seen)


class ProbeConfig(Config):
    """Options: the probe's layers, and its training."""

    kind: Literal["linear", "mlp"] = shaping("mlp", "no hidden layer, or one")
    hidden: int = shaping(512, "width of the hidden layer", ge=1)
    # Without dropout the hidden layer overfits: it finds .74 instead of .86 of the items between two states (SASRec-64,
    # ml-100k).
    dropout: float = shaping(0.5, "of the hidden layer", ge=0, lt=1)
    training: EarlyStopping = shaping(EarlyStopping)

    def fit(self, rows: LabelledVectors, items: int) -> Probe:
        """Train a probe for a catalogue of `items` items. Raises ValueError if the rows are of fewer than two users."""
        vectors, shares = torch.from_numpy(rows.vectors), _shares(rows.targets, items)
        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            probe = Probe(self, vectors[self.training.split(rows.users)[0]], items)
        self.training.run(probe, lambda chosen: _loss(probe(vectors[chosen]), shares[chosen]), rows.users)
        return probe


class Probe(nn.Module):
    """A classifier: vectors [n, width] to scores of every item [n, items + 1]; column 0 has no meaning."""

    def __init__(self, config: ProbeConfig, vectors: Tensor, items: int) -> None:
        super().__init__()
        width = vectors.shape[1]
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", vectors.mean(0))
        # A column that is constant in training holds nothing to read; its scale of 0 makes it read as 0 everywhere.
        deviation = vectors.std(0)
        changes = deviation > 1e-6 * vectors.abs().amax(0)
        self.register_buffer("scale", torch.where(changes, 1 / deviation, 0.0))
        self.layers: nn.Module = nn.Linear(width, items + 1)
        if config.kind == "mlp":
            self.layers = nn.Sequential(
                nn.Linear(width, config.hidden),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden, items + 1),
            )

    def forward(self, vectors: Tensor) -> Tensor:
        return self.layers((vectors - self.mean) * self.scale)


def probe_figures(probe: Probe, rows: LabelledVectors) -> dict[str, Mean]:
    """How well the probe finds the rows' targets, and under `shuffled states: ` how well from other users' vectors.

    `recovered` is the share of a row's k distinct targets among its k best items, comparable with `recovery` of an
    answer's titles; for one target it is the accuracy. `hit@5` is the share of the targets among the best five. `unseen
    hit@5`, if rows say what was seen, is the share among the best five unseen items.
    """
    figures = _figures(probe, rows)
    return figures | {f"{CONTROL}: {name}": mean for name, mean in _figures(probe, rows.of_others()).items()}


@torch.no_grad()
def _figures(probe: Probe, rows: LabelledVectors) -> dict[str, Mean]:
    scores = probe(torch.from_numpy(rows.vectors))
    recovered, hits, unseen = np.zeros((3, len(rows.targets)))
    for row, targets in enumerate(rows.targets):
        distinct = torch.tensor(sorted(set(targets)))
        above, same = ranks_among(scores[row].expand(len(distinct), -1), distinct)
        recovered[row] = hit_rate(above.numpy(), same.numpy(), len(distinct)).mean()
        hits[row] = hit_rate(above.numpy(), same.numpy(), _HIT).mean()
        if rows.seen:
            seen = Filters(excluded=Sequences.of([rows.seen[row]] * len(distinct)))
            above, same = ranks_among(scores[row].expand(len(distinct), -1), distinct, seen)
            unseen[row] = hit_rate(above.numpy(), same.numpy(), _HIT).mean()
    figures = {"recovered": Mean.of(recovered), f"hit@{_HIT}": Mean.of(hits)}
    return figures | ({f"unseen hit@{_HIT}": Mean.of(unseen)} if rows.seen else {})


def _shares(targets: Sequence[Sequence[int]], items: int) -> csr_array:
    """Target distributions [rows, items + 1]: the distinct targets of a row in equal shares."""
    distinct = [sorted(set(mine)) for mine in targets]
    counts = np.array([len(mine) for mine in distinct])
    columns = np.concatenate(distinct)
    shares = np.repeat(1 / counts, counts).astype(np.float32)
    return csr_array((shares, columns, np.concatenate([[0], counts.cumsum()])), shape=(len(counts), items + 1))


def _loss(scores: Tensor, shares: csr_array) -> Tensor:
    """Mean cross-entropy of the scores with each row's target distribution."""
    wanted = shares.tocoo()
    own = (scores[wanted.row, wanted.col] * torch.from_numpy(wanted.data)).sum()
    return (scores.logsumexp(1).sum() - own) / len(scores)
