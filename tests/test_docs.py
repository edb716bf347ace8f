"""The runbook, the architecture and CONTRIBUTING name commands, files, layers and alerts that there are."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from raypipe.cli.main import JOBS, config_type
from raypipe.cli.options import parse_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("cluster/RUNBOOK.md", "cluster/README.md", "raypipe/README.md", "CONTRIBUTING.md")]
RUNBOOK = PAGES[0].read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", RUNBOOK, re.DOTALL)
    for line in block.splitlines()
    if line.strip().startswith("raypipe ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_runbook_is_one_that_its_job_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    if words[0] == "submit":
        words = words[next(at for at, word in enumerate(words) if word in JOBS) :]
    job, *options = words
    parse_config(job, config_type(job), options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|toml|sh))", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    assert named
    places = (ROOT, page.parent, ROOT / "raypipe")
    own = {name for name in named if "NAME" in name or "JOB" in name}
    missing = {name for name in set(named) - own if not any((place / name).exists() for place in places)}
    # What render makes of the manifests, and what nobody should write.
    assert missing <= {"monitoring.yaml", "utils.py"}


def test_the_layers_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = [re.findall(r"raypipe\.(\w+)", layer) for layer in contracts[0]["layers"]]
    table = re.findall(r"^\| (`[\w`, ]+`) \| ", PAGES[2].read_text(), re.MULTILINE)
    told = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    assert told == [name for layer in enforced for name in layer]


def test_alerts_and_make_targets_that_are_named_are_there() -> None:
    rules = yaml.safe_load((ROOT / "cluster/prometheus/alerts.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    named = set(re.findall(r"`(Raypipe\w+)`", RUNBOOK))
    assert len(named) >= 4
    assert named <= alerts
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"[`\n]make ([a-z-]+)", pages)) <= targets
