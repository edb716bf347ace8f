"""Hashes are part of the workspace format: golden values, and a plain reference for the vectorised sequences."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from raypipe.storage.fingerprint import canonical_json, fingerprint, fingerprint_of_digits, schema_hash
from raypipe.storage.hashing import (
    combine_lanes,
    content_digest,
    digest_lanes,
    event_lanes,
    prefix_lanes,
    sequence_lanes,
    stable_hash,
    to_hex,
)
from raypipe.storage.tombstones import digest, is_forgotten, tombstone_rows

MASK = 2**64 - 1
LANES = (0x243F6A8885A308D3, 0x13198A2E03707344)


def mix(value: int) -> int:
    """splitmix64's finaliser on Python integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def plain_hash(text: str) -> int:
    """FNV-1a up to 64 bytes, blake2b above, finished by `mix`: one string at a time."""
    data = text.encode()
    if len(data) > 64:
        return mix(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return mix(value)


def plain_sequence(elements: list[tuple[int, int]]) -> tuple[int, ...]:
    """One row of `sequence_lanes`, one element at a time."""
    sums = [sum(mix(e[lane] ^ mix((at + LANES[lane]) & MASK)) for at, e in enumerate(elements)) for lane in (0, 1)]
    return tuple(mix((sums[lane] & MASK) ^ mix(len(elements) ^ LANES[lane])) for lane in (0, 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0xC3817C016BA4FF30),
        ("a", 0x5F29C2AADD9B8527),
        ("user 1", 0xB827B552A4F43C3D),
        ("naïve 日本 🎬", 0xCAC6A77A4CF67B20),
        ("x" * 64, 0x0F7DC5F692827AB7),
        ("x" * 65, 0x72A15A213861293A),
    ],
)
def test_the_hash_of_a_string_never_changes(text: str, expected: int) -> None:
    assert plain_hash(text) == expected
    assert int(stable_hash(pa.array([text]))[0]) == expected


def test_strings_of_every_length_hash_as_one_at_a_time_in_any_company() -> None:
    texts = ["", *("é" * n + "z" for n in range(0, 70, 3)), "y" * 10_000, "a", ""]
    assert stable_hash(pa.array(texts)).tolist() == [plain_hash(text) for text in texts]


def test_a_slice_and_a_large_string_column_hash_as_the_plain_column() -> None:
    texts = pa.array(["skipped", "a", "bb", "ccc"])
    assert stable_hash(texts[1:3]).tolist() == [plain_hash("a"), plain_hash("bb")]
    assert stable_hash(texts.cast(pa.large_string())).tolist() == stable_hash(texts).tolist()
    assert stable_hash(pa.array([], pa.string())).tolist() == []


def test_ids_that_count_up_spread_evenly_over_buckets() -> None:
    buckets = stable_hash(pa.array([str(n) for n in range(64_000)])) % np.uint64(64)
    counts = np.bincount(buckets.astype(np.int64), minlength=64)
    # 1,000 a bucket; five standard deviations of a binomial.
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_sequences_hash_as_the_plain_reference_empty_ones_included() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 5, 0, 0, 17, 2, 0])
    elements = rng.integers(0, 2**64, (int(lengths.sum()), 2), np.uint64)
    rows = np.split(elements, np.cumsum(lengths)[:-1])
    expected = [plain_sequence([(int(a), int(b)) for a, b in row]) for row in rows]
    assert [tuple(row) for row in sequence_lanes(elements, lengths).tolist()] == expected


def test_order_length_and_repetition_change_the_hash_of_a_sequence() -> None:
    a, b = [1, 2], [3, 4]
    sequences = [[], [a], [a, a], [a, b], [b, a], [a, b, b], [a, a, b]]
    elements = np.array([e for s in sequences for e in s], np.uint64)
    hashes = to_hex(sequence_lanes(elements, np.array([len(s) for s in sequences]))).to_pylist()
    assert len(set(hashes)) == len(sequences)


def test_the_hashes_of_sequences_events_and_salts_never_change() -> None:
    elements = np.array([[1, 2], [3, 4], [5, 6]], np.uint64)
    assert to_hex(sequence_lanes(elements, np.array([2, 0, 1]))).to_pylist() == [
        "8adf448e11dacdce741118ccae0d0b09",
        "93a9bdb51e5d5285b11e4b8da6a2b579",
        "29d3eefe6292219413ce5e50dc69e785",
    ]
    assert to_hex(event_lanes(elements, np.array([10, 20, 30]))).to_pylist() == [
        "3012a4f01bba5e21841113aa676ba7d0",
        "25e20633c1f4298dfc0f06718f400db5",
        "22bc129a4dcbfa40cc93aebf0b925179",
    ]
    assert to_hex(combine_lanes(elements[:1], "salt")).to_pylist() == ["5ef88cabd15535a81e697b67aafd9bcf"]
    assert content_digest("a", "bc") == "f14abc19c330e936bb9c8506d69bac9b"


def test_an_events_time_and_its_items_content_both_change_its_hash() -> None:
    lanes = np.array([[1, 2]], np.uint64)
    hashes = {
        to_hex(event_lanes(lanes + np.uint64(item), np.array([time]))).to_pylist()[0]
        for item in (0, 1)
        for time in (0, 1, 2**40)
    }
    assert len(hashes) == 6


def test_hex_and_lanes_are_the_same_bits() -> None:
    lanes = np.array([[0, 1], [2**64 - 1, 2**63]], np.uint64)
    assert to_hex(lanes).to_pylist() == ["0" * 31 + "1", "f" * 16 + "8" + "0" * 15]
    assert digest_lanes(to_hex(lanes)).tolist() == lanes.tolist()
    assert to_hex(np.empty((0, 2), np.uint64)).to_pylist() == []


def test_content_digests_know_the_borders_of_their_parts() -> None:
    digests = [content_digest(*parts) for parts in (("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ())]
    assert len(set(digests)) == 5
    assert len(content_digest("\ud800")) == 32  # a lone surrogate, which JSON can spell


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_a_fingerprint_of_digits_is_that_of_their_list(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypipe.storage.fingerprint._JOINED", 7)
    digits = [f"{number:032x}" for number in range(count)]
    chunks = pa.chunked_array([digits[:3], digits[3:]], pa.string())
    assert fingerprint_of_digits("keys", chunks) == fingerprint({"keys": digits})


def test_a_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint({"b": 1, "a": [1.5, None, "é"]}) == fingerprint({"a": [1.5, None, "é"], "b": 1})
    assert fingerprint({"b": 1, "a": [1.5, None, "é"]}) == "10c71012fb391fead6e4d481b11c8b16"
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert canonical_json({"b": "é", "a": 1}) == '{"a":1,"b":"é"}'


def test_a_schemas_hash_knows_names_types_and_order() -> None:
    fields = [pa.field("a", pa.int32()), pa.field("b", pa.string())]
    schemas = [fields, fields[::-1], [pa.field("a", pa.int64()), fields[1]], [pa.field("c", pa.int32()), fields[1]]]
    assert len({schema_hash(pa.schema(schema)) for schema in schemas}) == 4


def test_a_tombstone_names_its_user_to_nobody_and_finds_him_again() -> None:
    tombstones = tombstone_rows(["user 1", "🎬"])
    assert tombstones["digest"][0].as_py() == digest("user 1")
    assert digest("user 1") == "77bee95acdaeee4c58de465c14a12baa40b4a871774b68798c8a578ba5565c6e"
    users = pa.array(["user 2", "🎬", "user 1", ""])
    assert is_forgotten(users, tombstones).tolist() == [False, True, True, False]
    assert is_forgotten(users, tombstones.slice(0, 0)).tolist() == [False] * 4


def test_a_user_who_only_shares_a_tombstones_short_hash_is_not_forgotten() -> None:
    collision = pa.table({"hash": stable_hash(pa.array(["stranger"])).view(np.int64), "digest": [digest("user 1")]})
    assert is_forgotten(pa.array(["stranger"]), collision).tolist() == [False]


def test_prefixes_hash_as_the_sequences_they_are() -> None:
    draw = np.random.default_rng(4)
    lengths = [3, 0, 1, 7, 0]
    elements = draw.integers(0, 2**64, (sum(lengths), 2), np.uint64)
    found = prefix_lanes(elements, np.array(lengths))
    at = 0
    for length in lengths:
        for end in range(1, length + 1):
            (expected,) = sequence_lanes(elements[at : at + end], np.array([end]))
            assert (found[at + end - 1] == expected).all()
        at += length
