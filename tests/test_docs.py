"""Pages, recipes and messages name commands, options, files, layers and alerts that there are."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import yaml

import raypipe.cli.options as options_module
from raypipe.cli.main import JOBS, config_type
from raypipe.cli.options import parse_config
from raypipe.config import Config
from raypipe.engines.engine import Decoding
from raypipe.errors import UsageError
from raypipe.storage.schemas import HISTORIES
from raypipe.storage.workspace import choose_buckets
from raypipe.systems.summaries import SummariesConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in (
        *("cluster/RUNBOOK.md", "cluster/README.md", "raypipe/README.md", "CONTRIBUTING.md"),
        *("README.md", "jobs/README.md", "jobs/SERVICE.md", "jobs/WORKSPACE.md", "cluster/SIZING.md"),
    )
]
RUNBOOK, SIZING, SERVICE = PAGES[0].read_text(), PAGES[-1].read_text(), PAGES[-3].read_text()
RECIPES = sorted((ROOT / "jobs").rglob("*.yaml"))
COMMANDS = [
    line.strip()
    for page in (RUNBOOK, SIZING)
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line.strip().startswith("raypipe ")
]


def options(config: type[Config], before: str = "") -> Iterator[str]:
    """Names of all options, those of nested configs with dots."""
    for name, field in config.model_fields.items():
        yield before + name
        for nested in configs_in(field.annotation):
            yield from options(nested, f"{before}{name}.")


def configs_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from configs_in(part)


def check_options(command: str) -> None:
    """Fails where the job that a command runs, or submits, would not take its options."""
    words = shlex.split(command)[1:]
    if words[0] == "submit":
        words = words[next(at for at, word in enumerate(words) if word in JOBS) :]
    job, *given = words
    parse_config(job, config_type(job), given)


def test_options_of_a_section_that_are_named_anywhere_are_some_jobs() -> None:
    known = {name for job in JOBS for name in options(config_type(job))}
    named = set()
    for path in [*PAGES, *RECIPES, *(ROOT / "raypipe").rglob("*.py")]:
        named |= set(re.findall(r"(?<![\w-])--([a-z]\w*\.[\w.]*\w)", path.read_text()))
    assert len(named) > 50
    assert {name for name in named if name not in known and name.removeprefix("no-") not in known} == {"section.key"}


@pytest.fixture(scope="module")
def taken() -> set[str]:
    """Every option that some job's own parser takes."""
    parsers: list[options_module._Parser] = []

    class Kept(options_module._Parser):
        def __init__(self, **named: Any) -> None:
            super().__init__(**named)
            parsers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options_module, "_Parser", Kept)
        for job in JOBS:
            with contextlib.suppress(UsageError):  # of what has to be given
                parse_config(job, config_type(job), [])
    assert len(parsers) == len(JOBS)
    return {name for parser in parsers for action in parser._actions for name in action.option_strings}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--\w(?:[\w.-]*\w)?", text))


def test_the_parser_takes_what_switches_something_off_under_one_name_alone(taken: set[str]) -> None:
    assert taken >= {"--trsr.facts", "--no-trsr.facts", "--trsr.lora", "--data.prompts.text_characters"}
    assert not taken & {"--trsr.no-facts", "--trsr.fact"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_options_that_a_benchmark_tells_of_are_its_own_or_a_job_s(path: Path, taken: set[str]) -> None:
    tree = ast.parse(path.read_text())
    own = {
        word.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant)
    }
    assert options_in(ast.get_docstring(tree) or "") <= own | taken


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "jobs").as_posix())
def test_options_in_comments_of_a_recipe_are_some_job_s(path: Path, taken: set[str]) -> None:
    comments = "\n".join(re.findall(r"(?:^|\s)#(.*)$", path.read_text(), re.MULTILINE))
    assert comments
    assert options_in(comments) <= taken


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_command_of_a_recipe_is_one_that_its_job_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^#.*?\b(raypipe [a-z]+ --.*)$", path.read_text(), re.MULTILINE)
    assert commands or path.stem == "nightly-demo"  # which `make demo` runs
    for command in commands:
        check_options(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_runbook_or_of_sizing_is_one_that_its_job_takes(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check_options(command)


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


def test_the_table_of_sizes_is_arithmetic_on_rules_and_on_what_was_measured() -> None:
    found = re.search(r"takes 857 bytes\s+packed, (\d+) in Redis and ([\d,]+) in SQLite", SERVICE)
    assert found is not None
    redis, sqlite = (int(number.replace(",", "")) for number in found.groups())
    golden = json.loads((ROOT / "tests/golden/summaries-echo.json").read_text())["rows"]
    calls = next(row["calls"] for row in golden if row["events"] == SummariesConfig().window_events)
    event = sum(one.type.value_type.bit_width // 8 for one in HISTORIES.columns if pa.types.is_list(one.type))
    state, listed, events = 4 * 64, 8 * 20, 60
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|", SIZING, re.MULTILINE))
    for place, users in enumerate((10**6, 10**7)):
        buckets = choose_buckets(users)
        tables = [event * events, state, listed]
        derived = [
            *(f"{buckets:,}", f"{round(users / buckets):,}", f"{buckets:,}"),
            *(f"{users * one / 1e9:.2f} GB" for one in (redis, 3 * redis, sqlite, 4 * events)),
            *(f"{users * one / 1e9:.2f} GB" for one in (*tables, 31 * sum(tables))),
            f"{users * calls // 10**6:,} M",
            f"{users * calls * Decoding().max_new_tokens // 10**6:,} M",
            f"{users / 10 * 2 / 1e6:g} M",
        ]
        told = [figures.split(" | ")[place] for figures in rows.values()]
        assert told == derived
