"""A log and a catalogue to spoil, and what a person must be told when they are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from raypipe.storage.workspace import Workspace
from tests.pipeline.small_logs import START

GOOD = [(f"u{n % 7}", f"i{n % 5 + 1}", START + n) for n in range(50)]
TIME = ("--log.columns.time", "time")


class Ground(NamedTuple):
    """A workspace URI and a folder with a good log and catalogue; a case spoils one of them."""

    uri: str
    folder: Path
    log: Path
    catalogue: Path

    def words(self, *options: object, log: object = None, catalogue: object = None) -> tuple[object, ...]:
        named = ("--log.path", log or self.log, "--catalogue.path", catalogue or self.catalogue)
        return ("ingest", "--workspace", self.uri, *named, *(options or TIME))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def one_paragraph(stderr: str) -> str:
    """The one thing a person is told."""
    assert "Traceback" not in stderr
    assert stderr.count("raypipe: ") == 1, stderr
    told = stderr[stderr.index("raypipe: ") :].strip()
    assert "\n\n" not in told
    assert len(told) < 1500
    return told


def table_versions(uri: str) -> dict[str, int]:
    return {name: table.version() for name, table in Workspace(uri).tables.items() if table.version() >= 0}
