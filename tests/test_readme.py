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
from raypipe.storage.store import Store
from raypipe.storage.tokens import Tokens, hash_of
from tests.terminal import Terminal

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "jobs/README.md", "jobs/SERVICE.md", "jobs/WORKSPACE.md")
BLOCKS = [
    [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]
COMMANDS = [command for block in BLOCKS for command in block]
# What sets the machine up, and what asks for a cluster.
ELSEWHERE = ("make ", "raypipe submit ", "ray job submit ")


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


def test_a_command_that_goes_on_ends_its_block() -> None:
    """Whoever pastes a whole block gets to its end, and types the next one elsewhere."""
    serving = [block for block in BLOCKS if any(line.startswith("raypipe serve ") for line in block)]
    assert len(serving) == 1
    assert serving[0][-1].startswith("raypipe serve ")


def test_the_second_terminal_asks_with_the_token_that_the_first_one_made(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    store = Store(str(tmp_path / "work/ws"))
    store.put("workspace.json", b'{"buckets":4,"format":1,"kind":"time"}')
    at = next(place for place, command in enumerate(COMMANDS) if command.startswith("raypipe token "))
    later = COMMANDS[at : next(place for place, command in enumerate(COMMANDS) if command.startswith("curl "))]
    first, second = _terminals(tmp_path)
    activate = ". .venv/bin/activate"
    lines = [(first, activate), (first, later[0]), *((second, line) for line in later[1:] if "serve" not in line)]
    assert [line for _, line in lines].count(activate) == 2
    for terminal, line in lines:
        ended = terminal.run(line, timeout=120)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
    assert second.run("command -v raypipe").stdout.strip()
    assert [token.name for token in Tokens(store).all()] == ["shop"]
    assert hash_of(second.environment["TOKEN"]) in Tokens(store).valid()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_through_works_line_by_line(tmp_path: Path) -> None:
    """In two terminals, with nothing but what the pages themselves set there: raypipe is in `.venv`, as after `make`."""
    terminal, second = _terminals(tmp_path)
    statuses = {}
    answers, streamed = [], ""
    service: subprocess.Popen[str] | None = None
    try:
        for command in COMMANDS:
            if command.startswith(ELSEWHERE):
                continue
            if command.startswith("raypipe serve "):
                service = _serve(terminal, command)
                terminal = second
                continue
            ended = terminal.run(command, timeout=900)
            assert ended.returncode == 0, f"{command}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}"
            if "/explain/stream" in command:
                streamed = ended.stdout.strip().splitlines()[-1]
            elif command.startswith("curl "):
                answers.append(json.loads(ended.stdout))
            elif command.startswith("raypipe ") and " > " not in command:
                result = json.loads(ended.stdout.strip().splitlines()[-1])
                statuses[result["job"]] = result["status"]
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


def _terminals(folder: Path) -> tuple[Terminal, Terminal]:
    """Two new ones in a folder that has raypipe in `.venv`, as `make` leaves it."""
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    environment = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "TOKEN"}}
    folders = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(one for one in folders if Path(one) != Path(sys.executable).parent)
    return Terminal(folder, environment), Terminal(folder, environment)


def _serve(terminal: Terminal, command: str) -> subprocess.Popen[str]:
    """The service, once it answers."""
    log = terminal.folder / "serve.log"
    process = terminal.start(command, log)
    while "/v1 answers" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    return process
