"""Every benchmark of speed that makes its own data runs to its figures, in its smallest form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "arguments", "figure"),
    [
        ("align", "--rounds 1 --steps 3 --threads 1", "vs_bare_peft"),
        ("extract", "--users 200 --compared 200 --rounds 1", "vs_bare_loop"),
        ("ingest", "--events 20000 --rounds 1", "ratio_to_polars"),
        ("scale", "--users 500", "cpu_us_per_user"),
        ("score", "--users 1 --candidates 3 --rounds 1 --size tiny", "share_of_ideal"),
        ("train", "--rounds 1 --seconds 0.5 --threads 1", "runtime_overhead"),
    ],
)
def test_a_benchmark_ends_with_its_figures(name: str, arguments: str, figure: str) -> None:
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments.split()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["bench"] == name
    assert math.isfinite(told["figures"][figure])
    assert told["figures"][figure] != 0
