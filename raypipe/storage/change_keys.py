"""Change keys: by which recipe a published row was made, and of what. Rows whose key would be another now are made anew.

A key begins with digits of its recipe, so that an older row of the same recipe is told from a row of another one. What
follows is a hash of what the row was made of.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypipe.storage.hashing import combine_lanes, to_hex

RECIPE_DIGITS = 16


def keys_of(lanes: NDArray[np.uint64], recipe: str) -> pa.Array:
    """Of rows that `recipe`, a fingerprint, makes of what these are the hashes of, [rows, 2]: [rows]."""
    return pc.binary_join_element_wise(recipe[:RECIPE_DIGITS], to_hex(combine_lanes(lanes, recipe)), "")


def recipes_of(keys: pa.Array) -> pa.Array:
    """The digits of each key's recipe: [rows]."""
    return pc.utf8_slice_codeunits(keys, 0, RECIPE_DIGITS)
