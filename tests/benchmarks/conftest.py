"""Tests of benchmarks make their figures up, and golden tables hold measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def golden_tables_stay_as_they_are() -> Iterator[None]:
    before = {path: path.read_bytes() for path in GOLDEN.iterdir()}
    yield
    after = {path: path.read_bytes() for path in GOLDEN.iterdir()}
    for path in after.keys() - before.keys():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)
    assert after == before, "a test wrote into tests/golden"
