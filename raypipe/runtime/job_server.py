"""A Ray cluster's job server: list what was submitted, submit a job, and follow it to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from raypipe.errors import RaypipeError, UnavailableError, UsageError

_POLL_S = 2.0
# A lost node closes no connection, so the job's status is polled while its log is followed.
_ASKED_S = 10.0
_LAST_WORDS_S = 5.0  # how long to wait for the rest of the log of an ended job
# A head that restarts and reads its jobs from Redis takes about a minute.
_AWAY_S = 300.0
_AWAY = (RuntimeError, ConnectionError, aiohttp.ClientError)
_LOG_TRIES = 30
_BIGGEST = 3
_SERVER_ERROR = re.compile(r"status code 5\d\d")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


@dataclass(frozen=True)
class Attempt:
    """One submission of a run: its number from 1, Ray's status in capitals, and its start in Unix seconds."""

    number: int
    submission_id: str
    status: str
    started: float


@dataclass(frozen=True)
class Ended:
    """How a job ended: Ray's status and message, its driver's exit code if there is one, and all that it printed."""

    status: str
    exit_code: int | None
    message: str
    logs: str


class JobServer:
    """The Jobs API at `address` (http://HOST:8265).

    Raises UsageError if the server denies access, and UnavailableError if it does not answer.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address = address
        with _reached(address):
            self._client = JobSubmissionClient(address)

    def attempts(self, run: str) -> list[Attempt]:
        """The submissions `<run>-<number>` that the server knows, by number."""
        with _reached(self.address):
            jobs = self._client.list_jobs()
        found = []
        for job in jobs:
            name, _, number = (job.submission_id or "").rpartition("-")
            if name == run and number.isdigit():
                started = (job.start_time or 0) / 1000
                found.append(Attempt(int(number), job.submission_id, str(job.status.value), started))
        return sorted(found, key=lambda attempt: attempt.number)

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
        **resources: Any,
    ) -> None:
        """Upload the working directory, if there is one, and start the entrypoint.

        `resources` are what the driver reserves, by Ray's names (entrypoint_num_cpus, …).
        """
        with _reached(self.address):
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=dict(runtime_env),
                metadata=dict(metadata),
                **resources,
            )

    def follow(self, submission_id: str, show: Callable[[str], None]) -> Ended:
        """Show what the job prints until it ends. If the server is away for minutes, wait for it.

        Raises RaypipeError if the server does not answer for longer than that.
        """
        shown = 0

        async def tail() -> None:
            nonlocal shown
            place = 0
            async for text in self._client.tail_job_logs(submission_id):
                # After a reconnect the server sends the log from its beginning.
                fresh = text[max(0, shown - place) :]
                place += len(text)
                shown = max(shown, place)
                if fresh:
                    show(fresh)

        async def until_ended() -> None:
            tailing = asyncio.create_task(tail())
            try:
                while not (await asyncio.wait({tailing}, timeout=_ASKED_S))[0]:
                    info = await asyncio.to_thread(self._client.get_job_info, submission_id)
                    if info.status.is_terminal():
                        await asyncio.wait({tailing}, timeout=_LAST_WORDS_S)
                        return
                await tailing
            finally:
                tailing.cancel()

        answered = time.monotonic()
        while True:
            # If the log cannot be read, for example because its node is gone, the job's status still tells how it
            # ended.
            with contextlib.suppress(*_AWAY):
                asyncio.run(until_ended())
            try:
                info = self._client.get_job_info(submission_id)
                answered = time.monotonic()
                if info.status.is_terminal():
                    status, message = str(info.status.value), info.message or ""
                    return Ended(status, info.driver_exit_code, message, self._logs(submission_id))
            except _AWAY as error:
                if time.monotonic() - answered > _AWAY_S:
                    raise RaypipeError(
                        f"The job server at {self.address} has not answered for {_AWAY_S:.0f} s ({_first_line(error)}).",
                        f"The job {submission_id} may still run: look at it with `ray job status {submission_id}`.",
                    ) from error
            time.sleep(_POLL_S)

    def _logs(self, submission_id: str) -> str:
        """Everything that an ended job printed; "" if that cannot be read.

        That is so if its node, and the files there, are gone.
        """
        for _ in range(_LOG_TRIES):
            with contextlib.suppress(*_AWAY):
                return str(self._client.get_job_logs(submission_id))
            time.sleep(_POLL_S)
        return ""


def check_upload(folder: Path, excludes: list[str]) -> int:
    """The bytes of a working directory that Ray would upload. Raises UsageError if it is no folder or too large.

    Files that `.gitignore` and `.rayignore` name are left out, as Ray does.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    if not folder.is_dir():
        raise UsageError(
            f"The working directory {folder} is no folder.", "Name one with --working_dir, or none at all."
        )
    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    root = folder.absolute()
    left_out = [packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])]
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    packaging._dir_travel(root, left_out, note, include_gitignore=True)
    total, most = sum(sizes.values()), DASHBOARD_CLIENT_MAX_SIZE
    if total >= most:
        biggest = sorted(sizes, key=lambda path: -sizes[path])[:_BIGGEST]
        named = ", ".join(f"{path.relative_to(root)} ({sizes[path] / 2**20:,.0f} MiB)" for path in biggest)
        raise UsageError(
            f"The working directory {folder} holds {total / 2**20:,.0f} MiB, and Ray uploads at most {most / 2**20:.0f}; "
            f"the largest files are {named}.",
            "Name what is not needed in .gitignore or .rayignore, keep data on the object store, or build it into the nodes' "
            "image and submit with `--working_dir none`.",
        )
    return total


@contextlib.contextmanager
def _reached(address: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        # Ray's client raises the exceptions of `requests`, and only the status code tells what kind of answer the
        # server gave.
        away = isinstance(error, OSError) and "Client Error" not in str(error)
        passing = away or _SERVER_ERROR.search(str(error)) is not None
        raise (UnavailableError if passing else UsageError)(
            f"The job server at {address} does not do it: {_first_line(error)}",
            "Check --address, and where the cluster asks for a token, RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
