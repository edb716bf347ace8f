"""A row that fills the node's memory. Alone on the machine: the monitor counts everybody's memory, and ends whoever holds most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from raypipe.storage.ledger import MAX_DEATHS


def test_a_row_that_fills_the_memory_is_blamed_though_ray_names_no_actor(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.chaos.heavy_row", str(tmp_path / "workspace")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == f"3 {{'heavy': {MAX_DEATHS}}}"
    assert ended.stderr.count("A worker died while it worked on bucket-000001") == MAX_DEATHS
