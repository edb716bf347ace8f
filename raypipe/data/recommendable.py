"""Which items of a catalogue may be recommended: available, not denied, and with the requested attribute values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Holders = Mapping[tuple[str, str], NDArray[np.int64]]


class UnknownValueError(ValueError):
    """No item has the attribute value that was asked for. The message is for the user who asked."""


def recommendable(items: pa.Table, denied: Collection[str] = frozenset()) -> NDArray[np.bool_]:
    """Which items may be recommended: bool [items + 1], by item index.

    An item must be available, and its id must not be `denied`. The rows of `items` must be in order of their index.
    """
    kept = np.array([item not in denied for item in items["item_id"].to_pylist()], bool)
    return np.concatenate([[False], items["available"].to_numpy() & kept])


def unknown_denied(items: pa.Table, denied: Collection[str]) -> str:
    """A message about denied ids that no item has and that therefore deny nothing; "" if there are none."""
    unknown = sorted(set(denied) - set(items["item_id"].to_pylist()))
    if not unknown:
        return ""
    return f"{len(unknown):,} of {len(denied):,} denied ids are no item's and deny nothing, for example {unknown[0]!r}"


def attributes_of(items: pa.Table) -> list[dict[str, Sequence[str]]]:
    """Each row's attributes, name → values."""
    return [{name: values or () for name, values in pairs or ()} for pairs in items["attributes"].to_pylist()]


def holders_of(attributes: Sequence[Mapping[str, Sequence[str]]]) -> Holders:
    """(attribute, value) → the indices of the items that have it. Row r has index r + 1."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, pairs in enumerate(attributes, start=1):
        for name, values in pairs.items():
            for value in values:
                found.setdefault((name, value), []).append(index)
    return {pair: np.array(indices, np.int64) for pair, indices in found.items()}


def narrowed(allowed: NDArray[np.bool_], holders: Holders, only: Iterable[tuple[str, str]]) -> NDArray[np.bool_]:
    """The `allowed` items that have every (attribute, value) of `only`: bool [items + 1].

    Raises UnknownValueError for a value that no item has.
    """
    for name, value in only:
        if (name, value) not in holders:
            raise UnknownValueError(f"No item has {value!r} in its attribute {name!r}; values are compared exactly.")
        indices = holders[name, value]
        has = np.zeros(len(allowed), bool)
        has[indices[indices < len(allowed)]] = True
        allowed = allowed & has
    return allowed
