"""Stable, vectorised hashes of strings (which choose a user's bucket) and of sequences (a row's content).

They are part of the workspace format: the same bytes give the same hash on every machine and in every version.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

# FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv/), followed by splitmix64's finaliser because the low bits of FNV
# alone are weak.
_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LANES = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))
# Longer strings are rare, and the vectorised loop would make every short string pay for their length. They are hashed
# one by one with blake2b.
_VECTOR_BYTES = 64


def mix(values: U64) -> U64:
    """splitmix64's finaliser: a bijection of 64-bit integers whose every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def stable_hash(strings: pa.Array) -> U64:
    """A 64-bit hash of the UTF-8 bytes of each of `strings` (no nulls): [strings]."""
    strings = strings.cast(pa.large_string())
    count = len(strings)
    if count == 0:
        return np.empty(0, np.uint64)
    _, offsets_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[strings.offset : strings.offset + count + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.full(count, _OFFSET, np.uint64)
    short = np.flatnonzero(lengths <= _VECTOR_BYTES)
    with np.errstate(over="ignore"):
        for position in range(int(lengths[short].max(initial=0))):
            short = short[lengths[short] > position]
            hashes[short] = (hashes[short] ^ data[starts[short] + position]) * _PRIME
    for row in np.flatnonzero(lengths > _VECTOR_BYTES):
        digest = hashlib.blake2b(data[starts[row] : starts[row] + lengths[row]].tobytes(), digest_size=8).digest()
        hashes[row] = np.frombuffer(digest, np.uint64)[0]
    return mix(hashes)


def digest_lanes(hex_digests: pa.Array) -> NDArray[np.uint64]:
    """Split hex strings of 32 digits into their two 64-bit halves: [rows, 2]."""
    count = len(hex_digests)
    joined = "".join(hex_digests.to_pylist())
    assert len(joined) == 32 * count, "a digest is 32 hex digits"
    return np.frombuffer(bytes.fromhex(joined), ">u8").astype(np.uint64).reshape(count, 2)


def content_digest(*parts: str) -> str:
    """32 hex digits of a hash over the parts. The length of each part is hashed too, so that its borders count."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def sequence_lanes(elements: NDArray[np.uint64], lengths: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A 128-bit hash of every run of `elements`, which depends on the order and the length: [runs, 2].

    `elements` is [total, 2] (two independent 64-bit hashes of each element). `lengths` [runs] sums to its length.
    """
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(elements), dtype=np.int64) - np.repeat(starts, lengths)
    out = np.empty((len(lengths), 2), np.uint64)
    with np.errstate(over="ignore"):
        for lane in range(2):
            # A running sum differenced at the borders is right for empty runs too, unlike `add.reduceat`.
            total = _running(elements[:, lane], position, lane)
            sums = total[starts + lengths] - total[starts]
            out[:, lane] = mix(sums ^ mix(lengths.astype(np.uint64) ^ _LANES[lane]))
    return out


def prefix_lanes(elements: NDArray[np.uint64], lengths: NDArray[np.integer]) -> NDArray[np.uint64]:
    """For every element, the `sequence_lanes` of its run up to and including that element: [total, 2]."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(elements), dtype=np.int64) - starts
    out = np.empty((len(elements), 2), np.uint64)
    with np.errstate(over="ignore"):
        for lane in range(2):
            total = _running(elements[:, lane], position, lane)
            sums = total[1:] - total[starts]
            out[:, lane] = mix(sums ^ mix((position + 1).astype(np.uint64) ^ _LANES[lane]))
    return out


def _running(elements: NDArray[np.uint64], position: NDArray[np.int64], lane: int) -> NDArray[np.uint64]:
    """Running sums of the hashed elements: the sum before each element, then the sum of all: [total + 1].

    Each element is hashed together with its place in its run.
    """
    places = np.arange(position.max(initial=-1) + 1, dtype=np.uint64)
    placed = mix(elements ^ mix(places + _LANES[lane])[position])
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(placed)])


def event_lanes(item_lanes: NDArray[np.uint64], times: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Two hashes of each event, made from its item's content ([events, 2]) and its time: [events, 2]."""
    moment = mix(times.astype(np.uint64))
    with np.errstate(over="ignore"):
        return np.stack(
            [mix(item_lanes[:, lane] + moment * (_LANES[lane] | np.uint64(1))) for lane in range(2)], axis=1
        )


def combine_lanes(lanes: NDArray[np.uint64], salt: str) -> NDArray[np.uint64]:
    """Hashes that also depend on `salt` (a fingerprint): [rows, 2]."""
    salts = digest_lanes(pa.array([content_digest(salt)]))[0]
    return np.stack([mix(lanes[:, lane] ^ mix(salts[lane : lane + 1])) for lane in range(2)], axis=1)


def to_hex(lanes: NDArray[np.uint64]) -> pa.Array:
    """Hex strings of 32 digits for hashes [rows, 2]: [rows]."""
    count = len(lanes)
    data = lanes.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, 32 * (count + 1), 32, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))
