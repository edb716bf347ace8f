"""The processes of a local cluster: each has a log, later commands find it again, and only they are ended."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from raypipe.errors import RaypipeError

ROOT = Path(__file__).parents[2]
_UP_S = 300.0  # MLflow took 130 s on two busy cores


class Processes:
    """The processes that were started from one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "processes.json"

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        ready: Callable[[], bool],
        tries: int = 1,
    ) -> None:
        """Start a process and wait until it is `ready`.

        If it ends before that, it is started again, up to `tries` times. Raises RaypipeError, with its log, if it does
        not become ready.
        """
        for left in reversed(range(tries)):
            with (self._folder / "log" / f"{name}.log").open("ab") as output:
                process = subprocess.Popen(
                    command, env=dict(environment), cwd=ROOT, stdout=output, stderr=output, start_new_session=True
                )
            self._write({**self.known(), name: (process.pid, psutil.Process(process.pid).create_time())})
            deadline = time.monotonic() + _UP_S
            while process.poll() is None and time.monotonic() < deadline:
                if ready():
                    print(f"{name} is up", file=sys.stderr, flush=True)
                    return
                time.sleep(0.3)
            if process.poll() is None or not left:
                break
        raise RaypipeError(f"{name} does not start: {self.log(name)[-1500:]}", "`down`, mend it, and `up` again.")

    def log(self, name: str) -> str:
        path = self._folder / "log" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def known(self) -> dict[str, tuple[int, float]]:
        """Name → (process id, start time in Unix seconds)."""
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def forget(self, name: str) -> None:
        known = self.known()
        if known.pop(name, None) is not None:
            self._write(known)

    def end_all(self) -> None:
        for name, (pid, started) in self.known().items():
            _end(name, pid, started)
        self._file.unlink(missing_ok=True)

    def _write(self, known: Mapping[str, tuple[int, float]]) -> None:
        self._file.write_text(json.dumps(known))


def run(*words: str, may_fail: bool = False) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode and not may_fail:
        raise RaypipeError(
            f"`{' '.join(words[:4])} …` failed: {ended.stderr.strip()[-500:]}", "`down` first, then `up` again."
        )


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2).close()
    except OSError:
        return False
    return True


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=5).close()
    except OSError:
        return False
    return True


def _end(name: str, pid: int, started: float) -> None:
    """End the process and its children: terminate them first, then kill what is left.

    A process that merely has the same id as ours is left alone.
    """
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1:
            return
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(one)
        _, family = psutil.wait_procs(family, timeout=15)
    print(f"{name} is down", file=sys.stderr, flush=True)
