"""Regression trees over sparse yes-or-no features and many outputs at once.

The same trees as scikit-learn's, which is no dependency of the package. One sparse product per node sums the outputs of all
features: 0.9 s for 256 leaves of 8,480 rows with 13,464 features and 64 outputs, where scikit-learn takes 2.3 s; with 1,682
outputs it is 29 s against 11 s.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """int64 [nodes] each: the `feature` a node asks for, −1 in a leaf, and the nodes of rows `without` and `having` it.

    Node 0 is the root, and a node comes before its children.
    """

    feature: Integers
    without: Integers
    having: Integers

    def __len__(self) -> int:
        return len(self.feature)

    def leaves_of(self, features: csr_array) -> Integers:
        """The leaf of each row of features [n, features], int64 [n]."""
        columns = features.tocsc()
        leaves = np.zeros(features.shape[0], np.int64)
        rows_of = {0: np.arange(len(leaves))}
        for node, feature in enumerate(self.feature.tolist()):
            rows = rows_of.pop(node)
            if feature < 0:
                leaves[rows] = node
                continue
            has = _has(columns, feature, rows)
            rows_of[int(self.without[node])], rows_of[int(self.having[node])] = rows[~has], rows[has]
        return leaves


def grow(features: csr_array, values: NDArray[np.floating], leaves: int, rows_per_leaf: int) -> Tree:
    """The tree that always splits next where the squared error of values [n, outputs] falls most (CART, best first).

    `features` are 0 or 1, [n, features]. It ends at so many leaves, or where no split leaves `rows_per_leaf` on both sides
    and less error.
    """
    columns, exact = features.tocsc(), values.astype(np.float64)
    feature, without, having = [-1], [-1], [-1]
    rows_of = {0: np.arange(features.shape[0])}
    open_nodes: list[tuple[float, int, int]] = []

    def open_node(node: int) -> None:
        gain, best = _best_split(features, exact, rows_of[node], rows_per_leaf)
        if gain > 0:
            heapq.heappush(open_nodes, (-gain, node, best))

    open_node(0)
    while open_nodes and len(rows_of) < leaves:
        _, node, best = heapq.heappop(open_nodes)
        rows = rows_of.pop(node)
        has = _has(columns, best, rows)
        feature[node], without[node], having[node] = best, len(feature), len(feature) + 1
        for part in (rows[~has], rows[has]):
            rows_of[len(feature)] = part
            for told in (feature, without, having):
                told.append(-1)
            open_node(len(feature) - 1)
    return Tree(np.array(feature), np.array(without), np.array(having))


def _best_split(
    features: csr_array, values: NDArray[np.float64], rows: Integers, rows_per_leaf: int
) -> tuple[float, int]:
    """By how much the squared error falls at most, and which feature does it; 0 where none may."""
    inside, own = features[rows], values[rows]
    rounding = 1e-12 * float((own**2).sum())  # rows that are all alike have nothing to split
    own = own - own.mean(0)
    counts = np.bincount(inside.indices, minlength=features.shape[1])
    sums = (inside.T @ own) ** 2
    others = len(rows) - counts
    possible = np.flatnonzero((counts >= rows_per_leaf) & (others >= rows_per_leaf))
    if not len(possible):
        return 0.0, -1
    # The values' sum is 0: that of the rows without a feature is the same with the other sign.
    gains = sums[possible].sum(1) * (1 / counts[possible] + 1 / others[possible])
    best = int(gains.argmax())
    return (float(gains[best]) if gains[best] > rounding else 0.0), int(possible[best])


def _has(columns: csc_array, feature: int, rows: Integers) -> NDArray[np.bool_]:
    return np.isin(rows, columns.indices[columns.indptr[feature] : columns.indptr[feature + 1]])
