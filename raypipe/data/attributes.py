"""The contents of an item's columns: attribute values, running text, and Python lists written as text."""

from __future__ import annotations

import ast
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BETWEEN_STRINGS = re.compile(r"""['"], ['"]""")

ATTRIBUTES = pa.map_(pa.string(), pa.list_(pa.string()))

# A column whose median length is greater is prose.
SHORT_CHARACTERS = 40


def is_short(column: pa.Array) -> bool | None:
    """Whether a string column holds attribute values rather than prose; None when every value is empty."""
    if pa.types.is_list(column.type):
        return True if len(pc.drop_null(column.flatten())) else None
    lengths = pc.utf8_length(column).to_numpy(zero_copy_only=False)
    lengths = lengths[lengths > 0]  # also drops nulls, which are NaN here
    return bool(np.median(lengths) <= SHORT_CHARACTERS) if lengths.size else None


def value_lists(column: pa.Array, separator: str | None) -> pa.ListArray:
    """Each row's values, trimmed and without empty ones. Text is split at `separator`; lists are taken as they are."""
    if pa.types.is_list(column.type):
        lists = column
    else:
        text = pc.fill_null(column, "")
        lists = pc.split_pattern(text, separator) if separator else pa.ListArray.from_arrays(_every(text), text)
    values = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    kept = pc.fill_null(pc.not_equal(values, ""), False)
    rows = pc.list_parent_indices(lists).filter(kept).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(_offsets(np.bincount(rows, minlength=len(column))), values.filter(kept))


def attribute_maps(named: dict[str, pa.ListArray], rows: int) -> pa.Array:
    """One map a row, attribute → values. Attributes without a value are left out."""
    if not named:
        return pa.array([{}] * rows, ATTRIBUTES)
    lists = pa.concat_arrays(list(named.values()))
    filled = np.stack(
        [pc.list_value_length(values).to_numpy() > 0 for values in named.values()], axis=1
    )  # [rows, names]
    row, name = np.nonzero(filled)
    keys = pa.array(list(named)).take(pa.array(name))
    return pa.MapArray.from_arrays(_offsets(filled.sum(axis=1)), keys, lists.take(pa.array(name * rows + row)))


def joined_text(columns: list[pa.Array], rows: int) -> pa.Array:
    """The columns' text joined, with a line for each column that has text; empty if no column has text."""
    # binary_join_element_wise(null_handling="skip") would drop rows in which every value is null (pyarrow 25).
    joined = pa.array([""] * rows, pa.string())
    for column in columns:
        text = pc.utf8_trim_whitespace(pc.fill_null(plain_text(column), ""))
        lines = pc.binary_join_element_wise(joined, text, "\n")
        joined = pc.if_else(pc.equal(joined, ""), text, pc.if_else(pc.equal(text, ""), joined, lines))
    return joined


def plain_text(column: pa.Array) -> pa.Array:
    """`column` with its lists joined into plain text.

    Text that is written as a Python list of strings, as in Amazon's dumps, is joined too.
    """
    if pa.types.is_list(column.type):
        return pc.binary_join(column, " ")
    listed = pc.fill_null(pc.and_(pc.starts_with(column, "["), pc.ends_with(column, "]")), False)
    if not pc.any(listed).as_py():
        return column
    replaced = [_flattened(text) for text in column.filter(listed).to_pylist()]
    return pc.replace_with_mask(column, listed, pa.array(replaced, pa.string()))


def _flattened(text: str) -> str:
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        # Resolved HTML entities (18&#34; → 18") can make such a list invalid Python; this happens in 16 of Amazon's.
        if text[1:2] not in ("'", '"') or text[-2:-1] not in ("'", '"'):
            return text
        parts = _BETWEEN_STRINGS.split(text[2:-2].replace("\\n", " "))
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return text
    return " ".join(part.strip() for part in parts if part.strip())


def _every(values: pa.Array) -> pa.Array:
    return pa.array(np.arange(len(values) + 1, dtype=np.int32))


def _offsets(counts: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
