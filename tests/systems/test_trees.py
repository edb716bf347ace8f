"""Trees of many outputs against scikit-learn's, and where they have to stop."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.tree import DecisionTreeRegressor

from raypipe.systems.trees import grow


def planted(rows: int, columns: int, outputs: int, seed: int = 0) -> tuple[csr_array, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = (rng.random((rows, columns)) < 0.3).astype(np.float32)
    values = features @ rng.normal(size=(columns, outputs)) + rng.normal(size=(rows, outputs))
    return csr_array(features), values


def predicted(tree, features: csr_array, values: np.ndarray) -> np.ndarray:
    leaves = tree.leaves_of(features)
    return np.stack([values[leaves == leaf].mean(0) for leaf in leaves])


@pytest.mark.parametrize(("leaves", "least"), [(2, 1), (8, 1), (40, 5)])
def test_a_tree_is_that_of_scikit_learn(leaves: int, least: int) -> None:
    features, values = planted(300, 12, 4)
    tree = grow(features, values, leaves, least)
    reference = DecisionTreeRegressor(max_leaf_nodes=leaves, min_samples_leaf=least, random_state=0)
    expected = reference.fit(features.toarray(), values).predict(features.toarray())
    np.testing.assert_allclose(predicted(tree, features, values), expected, atol=1e-6)
    assert len(tree) == 2 * reference.get_n_leaves() - 1


def test_new_rows_go_where_their_features_send_them() -> None:
    features, values = planted(300, 12, 4)
    tree = grow(features, values, 20, 1)
    new, _ = planted(50, 12, 4, seed=1)
    for row, leaf in enumerate(tree.leaves_of(new)):
        node = 0
        while tree.feature[node] >= 0:
            node = (tree.having if new[row, tree.feature[node]] else tree.without)[node]
        assert node == leaf


def test_a_tree_ends_where_there_is_nothing_left_to_tell() -> None:
    features = csr_array(np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.float32))
    assert len(grow(features, np.full((4, 3), 0.1), 10, 1)) == 1
    by_first = grow(features, np.array([[1.1], [1.1], [0.3], [0.3]]), 10, 1)
    assert (len(by_first), by_first.feature[0]) == (3, 0)
    assert len(grow(features, np.array([[1.0], [2.0], [4.0], [8.0]]), 10, 3)) == 1
