"""A terminal that a person types into: what one line sets, the next one has."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path


class Terminal:
    """Runs lines with bash in a folder, one after the other. A new one knows nothing of what was set in another."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)

    def run(self, line: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """The line to its end; variables that it exports stay."""
        with tempfile.NamedTemporaryFile() as kept:
            ended = subprocess.run(
                ["bash", "-c", f'{line}\ncode=$?\nenv -0 > "$0"\nexit $code', kept.name],
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            pairs = Path(kept.name).read_text().split("\0")
        if any(pairs):
            self.environment = dict(pair.split("=", 1) for pair in pairs if pair)
        return ended

    def start(self, line: str, log: Path) -> subprocess.Popen[str]:
        """A command that goes on; its stderr goes to `log`. Signals reach the command itself."""
        with log.open("w") as file:
            return subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
