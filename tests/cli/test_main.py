"""The last line of stdout is one JSON object, the exit code says how it ended, and signals stop cleanly."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raypipe import __version__
from raypipe.cli.main import JOBS, main
from raypipe.errors import RaypipeError, RefusedError, UsageError
from tests.conftest import Run

KEYS = {"job", "status", "run_key", "tables", "models", "metrics", "cost"}


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (UsageError("It is wrong.", "Mend it."), 2, "failed"),
        (RaypipeError("It broke.", "Mend it."), 1, "failed"),
        (RefusedError("It is worse.", "Look."), 3, "refused"),
        (KeyboardInterrupt(), 1, "failed"),
        (ZeroDivisionError("division by zero"), 1, "failed"),
    ],
)
def test_whatever_happens_ends_with_json_and_its_exit_code(
    raypipe: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, status: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("raypipe.pipeline.status.run_status", fail)
    ended = raypipe("status")
    assert (ended.code, ended.status, ended.result["job"]) == (code, status, "status")
    assert set(ended.result) >= KEYS
    # Only what is our own fault shows a traceback, and never as the only answer.
    assert ("Traceback" in ended.stderr) == isinstance(error, ZeroDivisionError)
    assert ended.stderr.strip().splitlines()[-1].startswith("raypipe: ")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_exists_and_has_help(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, config, function = JOBS[job]
    found = importlib.import_module(module)
    assert callable(getattr(found, function))
    assert getattr(found, config).model_fields
    with pytest.raises(SystemExit) as stopped:
        main([*job.split(), "--help"])
    assert stopped.value.code == 0
    assert "--config" in capsys.readouterr().out


def test_usage_names_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert sorted(told) == sorted([*JOBS, "submit"])
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == __version__


def test_an_unknown_job_names_the_known_ones(raypipe: Run) -> None:
    ended = raypipe("summarise")
    assert (ended.code, ended.status) == (2, "failed")
    assert "There is no job 'summarise'. The jobs are dataset" in ended.stderr


def test_a_terminated_job_stops_cleanly_and_says_how_to_resume(tmp_path: Path) -> None:
    script = (
        "import sys, time; import raypipe.pipeline.status as status; from raypipe.cli.main import main\n"
        "def wait(config):\n    print('waiting', file=sys.stderr, flush=True); time.sleep(60)\n"
        "status.run_status = wait\nsys.exit(main(['status', '--workspace', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stderr is not None
    assert job.stderr.readline() == "waiting\n"
    started = time.monotonic()
    os.kill(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert (job.returncode, json.loads(out.splitlines()[-1])["status"]) == (1, "failed")
    assert "submit the same command again" in err
    assert "Traceback" not in err
