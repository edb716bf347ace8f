from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from raypipe.data.log import LogColumns, LogConfig, open_log
from raypipe.data.rejects import REJECTS
from raypipe.data.splits import read_split

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


class ReadLog(NamedTuple):
    """A log read to its end."""

    events: list[dict[str, Any]]
    rejects: list[dict[str, str]]
    rows_in: int
    filtered: int
    splits: int

    def reasons(self) -> dict[str, int]:
        found = [row["reason"] for row in self.rejects]
        return {reason: found.count(reason) for reason in dict.fromkeys(found)}


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture
def read_log() -> Callable[..., ReadLog]:
    """Reads a log split by split, each split sent as to its worker, and checks that every row is accounted for."""

    def read(path: Path | str, columns: LogColumns | None = None, **config: Any) -> ReadLog:
        log = open_log(LogConfig(path=str(path), columns=columns or LogColumns(), **config))
        chunks = [chunk for split in log.splits for chunk in read_split(pickle.loads(pickle.dumps(split)))]
        for chunk in chunks:
            assert chunk.rows_in == chunk.events.num_rows + chunk.rejects.num_rows + chunk.filtered
        events = pa.concat_tables([chunk.events for chunk in chunks])
        rejects = pa.concat_tables([REJECTS.empty_table(), *(chunk.rejects for chunk in chunks)])
        seqs = events["seq"].to_pylist()
        assert all(before < after for before, after in pairwise(seqs))
        return ReadLog(
            events.to_pylist(),
            rejects.to_pylist(),
            sum(chunk.rows_in for chunk in chunks),
            sum(chunk.filtered for chunk in chunks),
            len(log.splits),
        )

    return read


@pytest.fixture
def write_text(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
