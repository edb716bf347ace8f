"""Every command of the README, and of the pages that go on with its workspace, works as it is written there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raypipe.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "jobs/README.md", "jobs/SERVICE.md", "jobs/WORKSPACE.md")
COMMANDS = [
    line.split("#")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
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
    assert len(submitted) == 3
    for submit, *words in submitted:
        assert main([submit, "--dry_run", *words]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["run"].startswith("nightly-")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_through_works_line_by_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    statuses = {}
    answers, streamed = [], ""
    service: subprocess.Popen[str] | None = None
    try:
        for command in COMMANDS:
            if command.startswith("raypipe serve "):
                service = _serve(command, tmp_path, environment)
                continue
            if not command.startswith(("raypipe ", "curl ")) or command.startswith("raypipe submit "):
                continue
            ended = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert ended.returncode == 0, f"{command}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}"
            last = ended.stdout.strip().splitlines()[-1]
            if "/explain/stream" in command:
                streamed = last
                continue
            result = json.loads(last)
            if command.startswith("curl "):
                answers.append(result)
                continue
            statuses[result["job"]] = result["status"]
            environment["TOKEN"] = result["metrics"].get("token", environment.get("TOKEN", ""))
        assert service is not None
        service.send_signal(signal.SIGTERM)
        output, _ = service.communicate(timeout=200)
        assert json.loads(output.strip().splitlines()[-1])["status"] == "ok"
    finally:
        if service is not None and service.poll() is None:
            service.kill()
    assert [len(answer["items"]) for answer in answers[:2]] == [5, 10]
    assert [answer["served"]["night"] for answer in answers] == ["2026-01-06"] * 5
    assert answers[3]["decision"] in {"yes", "no"}
    assert answers[3]["text"]
    assert json.loads(streamed.removeprefix("data: "))["decision"] in {"yes", "no"}
    assert answers[4]["summaries"]["hierarchical"]
    assert statuses["online"] == "ok"
    assert statuses["nightly"] == "ok"
    assert statuses["plan"] == "ok"
    assert statuses["summarize"] == "ok"
    assert statuses["retry-rejected"] == "nothing_to_do"


def _serve(command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """The service, once it answers."""
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            shlex.split(command), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    while "/v1 answers" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    return process
