"""Change keys: they say by which recipe and from what content a published row was made.

A row is made anew when its key would be different now. A key begins with digits of its recipe, which is a fingerprint,
so that an older row of the same recipe can be told from a row of another recipe. The rest of the key is a hash of what
the row was made of.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.storage.hashing import combine_lanes, to_hex

RECIPE_DIGITS = 16


def keys_of(lanes: NDArray[np.uint64], recipe: str) -> pa.Array:
    """The change keys of rows that `recipe` makes: [rows].

    `lanes` [rows, 2] are the hashes of what each row is made of, and `recipe` is a fingerprint.
    """
    return pc.binary_join_element_wise(recipe[:RECIPE_DIGITS], to_hex(combine_lanes(lanes, recipe)), "")


def recipes_of(keys: pa.Array) -> pa.Array:
    """The digits of the recipe in each key: [rows]."""
    return pc.utf8_slice_codeunits(keys, 0, RECIPE_DIGITS)
