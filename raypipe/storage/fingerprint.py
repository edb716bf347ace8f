"""The fingerprint of a stage: one short hash of everything that its output depends on.

It includes: engine and version, dtype, content hash of the model, the stage's prompt, decoding, output schema and
`STEP_VERSION`.
It excludes: git revisions, dates, paths, workers, batch sizes and prices. These are fields declared `free`, which
`shaping_values` leaves out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_JOINED = 65_536


def canonical_json(values: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, non-ASCII text not escaped."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(values: Mapping[str, Any]) -> str:
    """32 hex digits of the SHA-256 of the canonical JSON of `values`."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:32]


def fingerprint_of_digits(name: str, values: pa.ChunkedArray) -> str:
    """`fingerprint({name: values.to_pylist()})` for strings of hex digits.

    It does not make a Python object for each string, because there may be millions.
    """
    digest = hashlib.sha256(f'{{"{name}":['.encode())
    for start in range(0, len(values), _JOINED):
        some = values.slice(start, _JOINED).combine_chunks()
        (joined,) = pc.binary_join(pa.ListArray.from_arrays([0, len(some)], some), '","')
        digest.update(f'{"," if start else ""}"{joined}"'.encode())
    digest.update(b"]}")
    return digest.hexdigest()[:32]


def schema_hash(schema: pa.Schema) -> str:
    """32 hex digits that depend on the names and types of a schema's fields."""
    return fingerprint({"fields": [[field.name, str(field.type)] for field in schema]})
