"""Change keys tell of what a row was made, and by which recipe."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raypipe.storage.change_keys import RECIPE_DIGITS, keys_of, recipes_of

LANES = np.array([[1, 2], [3, 4]], np.uint64)
ONE, OTHER = "a" * 32, "b" * 32


def test_a_key_begins_with_its_recipe_and_is_of_what_the_row_was_made_of() -> None:
    keys, others = keys_of(LANES, ONE).to_pylist(), keys_of(LANES, OTHER).to_pylist()
    assert recipes_of(pa.array([*keys, *others])).to_pylist() == ["a" * RECIPE_DIGITS] * 2 + ["b" * RECIPE_DIGITS] * 2
    hashes = {key[RECIPE_DIGITS:] for key in [*keys, *others]}
    assert (len(hashes), {len(one) for one in hashes}) == (4, {32})
    assert keys_of(LANES[1:], ONE).to_pylist() == keys[1:]
    assert keys_of(LANES[:0], ONE).to_pylist() == []
