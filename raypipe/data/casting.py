"""Cast raw columns to checked ones, a whole column at a time.

Each function has a fast path for a column in which every value is good, and a slow path that finds the bad ones. Both
give a value the same result, so the other values in its block never matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as kinds

EARLIEST_MS = 0
LATEST_MS = 4_102_444_800_000  # 2100-01-01
_LARGEST_EXACT = 2.0**53

_WHOLE_DIGITS = 18  # always within int64
_WHOLE = rf"^-?[0-9]{{1,{_WHOLE_DIGITS}}}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_ISO = (
    r"^(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<hour>[0-9]{2})(?::?(?P<minute>[0-9]{2})(?::?(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?)?"
    r"\s?(?P<zone>[zZ]|[+-][0-9]{2}(?::?[0-9]{2})?)?)?$"
)


@dataclass(frozen=True)
class Checked:
    """Values, and two masks # [rows]: `missing` (null or empty) and `bad_text` (not UTF-8)."""

    values: pa.Array
    missing: np.ndarray
    bad_text: np.ndarray


@dataclass(frozen=True)
class Numbers:
    """Numbers, with whole numbers kept exactly: `integers` where `whole`, else `floats`.

    Rows that are `missing` have neither.
    """

    integers: np.ndarray
    floats: np.ndarray
    whole: np.ndarray
    missing: np.ndarray

    def as_floats(self) -> np.ndarray:
        return np.where(self.whole, self.integers, self.floats)


def is_text(type_: pa.DataType) -> bool:
    return any(
        check(type_)
        for check in (
            kinds.is_string,
            kinds.is_large_string,
            kinds.is_string_view,
            kinds.is_binary,
            kinds.is_large_binary,
            kinds.is_binary_view,
            kinds.is_fixed_size_binary,
        )
    )


def is_number(type_: pa.DataType) -> bool:
    return kinds.is_integer(type_) or kinds.is_floating(type_) or kinds.is_decimal(type_)


def is_time(type_: pa.DataType) -> bool:
    return kinds.is_timestamp(type_) or kinds.is_date(type_)


def value_type(type_: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary-encoded column, or the type itself."""
    return type_.value_type if kinds.is_dictionary(type_) else type_


def flat(column: pa.ChunkedArray) -> pa.Array:
    """One array of plain values. Dictionaries and views are resolved, because few Arrow functions take them."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty column keeps its chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if kinds.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kinds.is_string_view(array.type) or kinds.is_binary_view(array.type):
        array = array.cast(pa.binary())
    return array


def to_ids(values: pa.Array) -> Checked:
    """Ids as text: strings unchanged, numbers exactly and whole ones without ".0".

    Null, empty and NaN values are missing.
    """
    if kinds.is_floating(values.type):
        text, bad_text = _float_ids(values), np.zeros(len(values), bool)
    else:
        text, bad_text = to_text(values)
    missing = _mask(pc.or_kleene(pc.is_null(text), pc.equal(pc.binary_length(text), 0))) & ~bad_text
    return Checked(text, missing, bad_text)


def to_text(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Values as strings, and a mask # [rows] of those that are not UTF-8, which are null among the strings."""
    if kinds.is_decimal(values.type):
        return _decimal_text(values), np.zeros(len(values), bool)
    if not is_text(values.type):
        return values.cast(pa.string()), np.zeros(len(values), bool)
    raw = values.cast(pa.binary())
    try:
        # A column of type string is checked too, because Parquet and JSON readers do not check its bytes.
        return raw.cast(pa.string()), np.zeros(len(values), bool)
    except pa.ArrowInvalid:
        unchecked = pc.cast(raw, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
        suspects = np.flatnonzero(~_mask(pc.fill_null(pc.string_is_ascii(unchecked), True)))
        bad = np.zeros(len(values), bool)
        bad[[row for row in suspects.tolist() if not _is_utf8(raw[row].as_py())]] = True
        return pc.if_else(pa.array(bad), None, raw).cast(pa.string()), bad


def to_numbers(values: pa.Array) -> Numbers:
    """Numbers from numbers or from text in decimal notation. Null, unreadable and non-finite values are missing."""
    rows = len(values)
    if kinds.is_unsigned_integer(values.type):
        values = values.cast(pa.int64(), safe=False)  # beyond int64 they become negative, which is no possible time
    if kinds.is_integer(values.type):
        missing = _mask(values.is_null())
        integers = values.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
        return Numbers(integers, np.zeros(rows), np.ones(rows, bool), missing)
    if kinds.is_floating(values.type):
        return _only_floats(values)
    if kinds.is_decimal(values.type):
        return _numbers_of_decimals(values)
    if not is_text(values.type):
        return Numbers(np.zeros(rows, np.int64), np.zeros(rows), np.zeros(rows, bool), np.ones(rows, bool))
    return _numbers_of_text(to_text(values)[0])


def to_milliseconds(values: pa.Array, unit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unix milliseconds # [rows] int64 of times in `unit` (seconds|milliseconds|iso).

    Also returns two masks # [rows]: values that are not a time, and times before 1970-01-01 or after 2100-01-01. ISO
    text without an offset is UTC; digits beyond milliseconds are cut off.
    """
    if is_time(values.type):
        times, bad = _typed_milliseconds(values)
    elif unit == "iso":
        times, bad = _iso_milliseconds(values)
    else:
        scale = 1000 if unit == "seconds" else 1
        numbers = to_numbers(values)
        bound = LATEST_MS // scale + 1  # just outside, so that scaling cannot overflow
        integers = np.clip(numbers.integers, -1, bound) * scale
        floats = np.rint(np.clip(numbers.floats, -1, bound) * scale).astype(np.int64)
        times, bad = np.where(numbers.whole, integers, floats), numbers.missing
    impossible = ~bad & ((times < EARLIEST_MS) | (times > LATEST_MS))
    return times, bad, impossible


def to_order(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Order values # [rows] int64, and a mask # [rows] of those that are not a whole number."""
    numbers = to_numbers(values)
    exact = (numbers.floats == np.floor(numbers.floats)) & (np.abs(numbers.floats) <= _LARGEST_EXACT)
    bad = numbers.missing | ~(numbers.whole | exact)
    return np.where(numbers.whole, numbers.integers, np.where(exact, numbers.floats, 0).astype(np.int64)), bad


def _float_ids(values: pa.Array) -> pa.Array:
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(numbers)
    whole = finite & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2.0**63)
    integers = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    if whole.all():
        return integers
    others = pc.if_else(pa.array(finite), values.cast(pa.string()), None)
    return pc.if_else(pa.array(whole), integers, others)


def _decimal_text(values: pa.Array) -> pa.Array:
    """Decimals as exact digits, without the trailing zeros that only their scale adds."""
    text = values.cast(pa.string())
    if values.type.scale > 0:
        text = pc.replace_substring_regex(text, r"\.?0+$", "")
    scientific = pc.fill_null(pc.match_substring(text, "E"), False)  # Arrow writes zero and very small numbers so
    if not pc.any(scientific).as_py():
        return text
    written = [format(value.normalize(), "f") for value in values.filter(scientific).to_pylist()]
    return pc.replace_with_mask(text, scientific, pa.array(written, pa.string()))


def _numbers_of_decimals(values: pa.Array) -> Numbers:
    floats = _only_floats(values)
    if values.type.scale > 0:
        return floats
    whole = values.is_valid()
    if values.type.precision > _WHOLE_DIGITS:
        low, high = (pa.scalar(Decimal(limit), pa.decimal128(19, 0)) for limit in (-(2**63), 2**63 - 1))
        whole = pc.fill_null(pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high)), False)
    integers = pc.if_else(whole, values, None).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return Numbers(integers, floats.floats, _mask(whole), floats.missing)


def _only_floats(values: pa.Array) -> Numbers:
    floats = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    missing = ~np.isfinite(floats)
    rows = len(floats)
    return Numbers(np.zeros(rows, np.int64), np.where(missing, 0, floats), np.zeros(rows, bool), missing)


def _numbers_of_text(text: pa.Array) -> Numbers:
    rows = len(text)
    try:
        # Arrow reads "0x10" as sixteen, which no log means. Numbers with more digits than in _WHOLE would be rounded
        # below.
        longest = pc.max(pc.binary_length(text)).as_py() or 0
        if longest <= _WHOLE_DIGITS and not pc.any(pc.match_substring(text, "x", ignore_case=True)).as_py():
            integers = text.cast(pa.int64())
            missing = _mask(integers.is_null())
            values = integers.fill_null(0).to_numpy(zero_copy_only=False)
            return Numbers(values, np.zeros(rows), np.ones(rows, bool), missing)
    except pa.ArrowInvalid:
        pass
    text = pc.utf8_trim_whitespace(text)
    whole = pc.fill_null(pc.match_substring_regex(text, _WHOLE), False)
    number = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False)
    integers = pc.if_else(whole, text, None).cast(pa.int64())
    floats = pc.if_else(pc.and_not(number, whole), text, None).cast(pa.float64())
    rest = _only_floats(floats)
    is_whole = _mask(whole)
    integers = integers.fill_null(0).to_numpy(zero_copy_only=False)
    return Numbers(integers, rest.floats, is_whole, rest.missing & ~is_whole)


def _typed_milliseconds(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    if kinds.is_date32(values.type):
        per_ms, numerator = 1, 86_400_000
        numbers = values.cast(pa.int32()).cast(pa.int64())
    else:
        unit = "ms" if kinds.is_date64(values.type) else values.type.unit
        numerator, per_ms = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}[unit]
        numbers = values.cast(pa.int64())
    bad = _mask(numbers.is_null())
    integers = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    bound = LATEST_MS // numerator + 1
    return np.clip(integers // per_ms, -1, bound) * numerator, bad


def _iso_milliseconds(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    if not is_text(values.type):
        return np.zeros(len(values), np.int64), np.ones(len(values), bool)
    text, _ = to_text(values)
    for zone in (None, "UTC"):
        try:
            return _typed_milliseconds(text.cast(pa.timestamp("us", zone)))
        except pa.ArrowInvalid:
            continue
    return _iso_each(pc.utf8_trim_whitespace(text))


def _iso_each(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The same as `_iso_milliseconds`, for a column of mixed forms or with values that are not a time."""
    parts = pc.extract_regex(text, _ISO)
    matched = _mask(parts.is_valid())

    def field(name: str) -> pa.Array:
        found = pc.struct_field(parts, name)
        return pc.if_else(pa.array(matched), found, "")

    def number(digits: pa.Array) -> np.ndarray:
        return pc.if_else(pc.equal(digits, ""), "0", digits).cast(pa.int64()).to_numpy(zero_copy_only=False)

    date = pc.if_else(pa.array(matched), field("date"), "1970-01-01")
    year, month, day = (number(pc.utf8_slice_codeunits(date, *span)) for span in ((0, 4), (5, 7), (8, 10)))
    hour, minute, second = (number(field(name)) for name in ("hour", "minute", "second"))
    milliseconds = number(pc.utf8_slice_codeunits(pc.utf8_rpad(field("fraction"), 9, "0"), 0, 3))
    zone = pc.replace_substring(field("zone"), ":", "")
    sign = np.where(_mask(pc.starts_with(zone, "-")), -1, 1)
    digits = pc.replace_substring_regex(zone, r"[^0-9]", "")
    zone_minutes = number(pc.utf8_slice_codeunits(digits, 0, 2)) * 60 + number(pc.utf8_slice_codeunits(digits, 2, 4))

    months = ((year - 1970) * 12 + np.clip(month, 1, 12) - 1).astype("datetime64[M]")
    month_start = months.astype("datetime64[D]").astype(np.int64)
    month_end = (months + 1).astype("datetime64[D]").astype(np.int64)
    real = (month >= 1) & (month <= 12) & (day >= 1) & (day <= month_end - month_start)
    real &= (hour < 24) & (minute < 60) & (second < 60)
    minutes = ((month_start + day - 1) * 24 + hour) * 60 + minute - sign * zone_minutes
    return (minutes * 60 + second) * 1000 + milliseconds, ~(matched & real)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _mask(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(bool, copy=False)
