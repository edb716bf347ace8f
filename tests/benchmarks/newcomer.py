"""How long a newcomer takes from a clone to an explanation that is served, by the README's own commands.

Clones this repository as it is committed, runs `make demo` there, and then, on a log of their own in CSV, what the README
writes under "Your own log" and "Online" as far as it leads to the explanation. `--installed` leaves the clone and `make
demo` out and takes the raypipe that is here. Waiting for people is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
# The commands on the way, by how they begin; the others of the same blocks look at what came out, or do more.
WAY = (
    *(". .venv/bin/activate", "export TOKEN"),
    *("raypipe doctor", "raypipe dataset synthetic", "raypipe nightly", "raypipe train", "raypipe release"),
    *("raypipe align --workspace work/ws --system recexplainer", "raypipe online", "raypipe token", "raypipe serve"),
)


def commands() -> list[str]:
    """The README's, from the first own log to the first explanation that is asked for."""
    readme = (ROOT / "README.md").read_text()
    start, end = readme.index("## Your own log"), readme.index("## On a Ray cluster")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", readme[start:end], re.DOTALL) for line in block.splitlines()
    ]
    asked = [line for line in lines if line.startswith("curl ") and line.endswith("/v1/explain")]
    return [line for line in lines if line.startswith(WAY)] + asked[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--installed", action="store_true", help="without the clone and `make demo`")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="newcomer-") as scratch:
        place = Path(scratch) / "raypipe"
        place.mkdir()
        environment = clean_environment()
        if arguments.installed:
            (place / ".venv").symlink_to(Path(sys.executable).parents[1])
            environment["PYTHONPATH"] = str(ROOT)
        else:
            figures["clone"] = timed(["git", "clone", "--quiet", str(ROOT), str(place)], Path(scratch), os.environ)
            figures["make demo"] = timed(["make", "demo", f"PYTHON={sys.executable}"], place, environment)
        walk(place, environment, figures)
    total = sum(figures.values())
    for name, seconds in figures.items():
        print(f"{seconds:8.1f} s  {name}", file=sys.stderr)
    named = {re.sub(r"\W+", "_", name): round(seconds, 1) for name, seconds in figures.items()}
    named["minutes"] = round(total / 60, 1)
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    print(json.dumps({"bench": "newcomer", "figures": named, "machine": machine}))


def walk(place: Path, environment: dict[str, str], figures: dict[str, float]) -> None:
    """Every command in turn, after the service began in a second terminal; `figures` gets its seconds."""
    service: subprocess.Popen[str] | None = None
    terminal = Terminal(place, environment)
    said = ""
    try:
        for number, command in enumerate(commands(), start=1):
            name = f"{number:02d} {' '.join(command.split()[:2])}"
            started = time.monotonic()
            if command.startswith("raypipe serve "):
                service = serve(terminal, command)
                terminal = Terminal(place, environment)
            else:
                own = command.replace("work/data/log.parquet", "work/data/log.csv")
                ended = terminal.run(own)
                if ended.returncode:
                    raise SystemExit(f"{own}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}")
                said = ended.stdout
            figures[name] = time.monotonic() - started
            print(f"{figures[name]:8.1f} s  {name}", file=sys.stderr, flush=True)
            if command.startswith("raypipe dataset "):
                log = place / "work/data/log"
                arrow_csv.write_csv(pq.read_table(log.with_suffix(".parquet")), log.with_suffix(".csv"))
        assert json.loads(said)["text"], "an explanation has words"
    finally:
        if service is not None:
            service.send_signal(signal.SIGTERM)
            service.wait(200)


def serve(terminal: Terminal, command: str) -> subprocess.Popen[str]:
    """The service, once it answers."""
    log = terminal.folder / "serve.log"
    process = terminal.start(command, log)
    while "/v1 answers" not in log.read_text():
        if process.poll() is not None:
            raise SystemExit(log.read_text()[-3000:])
        time.sleep(0.5)
    return process


def timed(command: list[str], place: Path, environment: os._Environ[str] | dict[str, str]) -> float:
    started = time.monotonic()
    ended = subprocess.run(command, cwd=place, env=dict(environment), capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}")
    return time.monotonic() - started


def clean_environment() -> dict[str, str]:
    """Without what points to the raypipe that is here."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


if __name__ == "__main__":
    main()
