"""Every command of the README works as it is written there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.cli.main import main

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_make_commands_are_targets() -> None:
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    targets += re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text())
    assert {"demo", "test", "lint", "test-all", "bench", "chaos"} <= set(targets)
    for target in set(targets):
        arguments = ["NAME=ingest"] if target == "bench" else []
        subprocess.run(["make", "--dry-run", target, *arguments], cwd=ROOT, check=True, capture_output=True)


def test_submitted_scripts_and_configs_exist() -> None:
    words = [word for command in COMMANDS if command.startswith("ray job submit") for word in shlex.split(command)]
    named = [word for word in words if word.startswith("jobs/")]
    assert named
    assert all((ROOT / word).is_file() for word in named)


def test_what_is_submitted_is_what_submit_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "cluster/README.md").read_text(), re.DOTALL)
    lines = [*COMMANDS, *(line for block in blocks for line in block.splitlines())]
    submitted = [shlex.split(line)[1:] for line in lines if line.startswith("raypipe submit")]
    assert len(submitted) == 2
    for submit, *words in submitted:
        assert main([submit, "--dry_run", *words]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["run"].startswith("nightly-")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_walk_through_works_line_by_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    statuses = {}
    for command in COMMANDS:
        if not command.startswith("raypipe ") or command.startswith("raypipe submit "):
            continue
        ended = subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}\n{ended.stderr[-3000:]}"
        result = json.loads(ended.stdout.strip().splitlines()[-1])
        statuses[result["job"]] = result["status"]
    assert statuses["nightly"] == "ok"
    assert statuses["plan"] == "ok"
    assert statuses["summarize"] == "ok"
    assert statuses["retry-rejected"] == "nothing_to_do"
