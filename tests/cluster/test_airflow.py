"""The Airflow example, without Airflow: its command is one that `raypipe submit` takes, its failures are told apart."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raypipe.cli.main import main

ROOT = Path(__file__).parents[2]
DAG = ROOT / "cluster/airflow/nightly_dag.py"


class AirflowFailError(Exception):
    """Airflow's word for: do not try again."""


@pytest.fixture
def dag(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The file's names, its decorators standing in for Airflow's."""

    def decorate(**_: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
        # A task that is called within a DAG is noted there and runs later.
        return lambda function: lambda: None

    airflow, exceptions, sdk = ModuleType("airflow"), ModuleType("airflow.exceptions"), ModuleType("airflow.sdk")
    exceptions.AirflowFailException = AirflowFailError  # type: ignore[attr-defined]
    sdk.dag = sdk.task = decorate  # type: ignore[attr-defined]
    for module in (airflow, exceptions, sdk):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return runpy.run_path(str(DAG))


def test_its_command_is_raypipe_submits(
    dag: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the configuration it names, which is there to be copied."""
    program, submit, *words = dag["command"]("2026-01-05")
    assert (program, submit) == ("raypipe", "submit")
    monkeypatch.chdir(ROOT)
    assert main([submit, "--dry_run", *words]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert facts["run"].startswith("nightly-2026-01-05-")
    assert shlex.split(facts["entrypoint"])[3:-4] == words


@pytest.mark.parametrize(
    ("code", "raised"), [(0, None), (1, RuntimeError), (2, AirflowFailError), (3, AirflowFailError)]
)
def test_only_a_failure_that_a_second_try_may_mend_is_tried_again(
    dag: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: int, raised: type[Exception] | None
) -> None:
    ended = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: ended if words == dag["command"]("2026-01-05") else None)
    if raised is None:
        dag["run_night"]("2026-01-05")
        return
    with pytest.raises(raised, match=f"exit code {code}"):
        dag["run_night"]("2026-01-05")
