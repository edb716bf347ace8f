"""Lines for people and lines for machines: in JSON each says its job, run key and unit, in workers always."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import ray

from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.progress import about, note, say, speak
from raypipe.runtime.units import UnitContext, run_units
from raypipe.storage.ledger import Counts, Ledger, Receipt, Unit, Usage
from raypipe.storage.store import Store
from tests.conftest import Run
from tests.ground import Ground

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def as_text_afterwards() -> Any:
    yield
    speak("text")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_line_in_json_carries_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    speak("json", job="nightly")
    before = datetime.now(UTC)
    with about(job="summarize"):
        note(run_key="abc")
        say("half way", done=3)
    say("it is over", "error")
    first, second = lines(capsys.readouterr().err)
    told = datetime.fromisoformat(first.pop("time"))
    assert abs((told - before).total_seconds()) < 5
    assert first == {"level": "info", "message": "half way", "job": "summarize", "run_key": "abc", "done": 3}
    second.pop("time")
    assert second == {"level": "error", "message": "it is over", "job": "nightly"}


def test_a_line_for_people_is_the_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    speak("text", job="nightly")
    say("half way", done=3)
    assert capsys.readouterr().err == "half way\n"


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_asked_for_json_says_nothing_else(raypipe: Run, ground: Ground) -> None:
    ended = raypipe(*ground.words(), "--logs", "json")
    assert ended.code == 0, ended.stderr
    assert all(json.loads(line)["job"] == "ingest" for line in ended.stderr.splitlines())
    wrong = raypipe("explain", "--workspace", ground.uri, "--logs", "json")
    (error,) = lines(wrong.stderr)
    assert (error["level"], error["job"]) == ("error", "explain")


class Work:
    def run(self, unit: Unit, context: UnitContext) -> Receipt:
        if unit.index == 2:
            raise ValueError("a bad unit")
        return Receipt(unit, Counts(10, 6, 1, {"unchanged": 3}), Usage(7, 500, 40, 0.5), attempt=context.attempt)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_say_of_every_unit_that_it_begins_and_how_it_ends(tmp_path: Path) -> None:
    run_key = "5" * 32
    run = Ledger(Store(str(tmp_path / "workspace")), "logged").start(run_key, {"scope": "all"})
    with pytest.raises(Exception, match="a bad unit"):
        run_units(run, [Unit("bucket", n) for n in range(3)], Work, ClusterConfig(workers=1), "logged")
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    expected = {("bucket-000000", "unit done"), ("bucket-000001", "unit done"), ("bucket-000002", "unit failed")}
    deadline = time.monotonic() + 30
    while True:
        told = [
            line
            for path in logs.glob("worker-*.err")
            for line in lines(path.read_text(errors="replace"))
            if line.get("run_key") == run_key
        ]
        found = {(line["unit"], line["message"]) for line in told}
        if expected <= found or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert expected <= found
    assert {line["job"] for line in told} == {"logged"}
    (done,) = [line for line in told if (line["unit"], line["message"]) == ("bucket-000001", "unit done")]
    assert (done["attempt"], done["rows_in"], done["rejected"], done["calls"]) == (1, 10, 1, 7)
    (failed,) = [line for line in told if line["message"] == "unit failed"]
    assert (failed["level"], failed["error"]) == ("error", "ValueError('a bad unit')")
