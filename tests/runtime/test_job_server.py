"""Following a job to its end where its log cannot be read: how it ended is known all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from raypipe.errors import RaypipeError
from raypipe.runtime import job_server
from raypipe.runtime.job_server import Ended, JobServer


class Client:
    """Stands for Ray's client, with the node that has the log gone: the job is seen as each of `statuses` in turn."""

    def __init__(self, *statuses: JobStatus | None) -> None:
        self.statuses = list(statuses)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield

    def get_job_info(self, submission_id: str) -> Any:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status is None:
            raise ConnectionError("refused")
        return SimpleNamespace(status=status, message="", driver_exit_code=3 if status.is_terminal() else None)

    def get_job_logs(self, submission_id: str) -> str:
        raise RuntimeError("Request failed with status code 500: cannot connect to agent")


def server(client: Client, monkeypatch: pytest.MonkeyPatch) -> JobServer:
    monkeypatch.setattr(job_server, "_POLL_S", 0.01)
    monkeypatch.setattr(job_server, "_AWAY_S", 0.2)
    found = JobServer.__new__(JobServer)
    found.address, found._client = "http://127.0.0.1:1", client  # type: ignore[assignment]
    return found


def test_a_job_whose_log_is_lost_ends_as_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    following = server(Client(JobStatus.RUNNING, None, JobStatus.RUNNING, JobStatus.FAILED), monkeypatch)
    assert following.follow("night-1", print) == Ended("FAILED", 3, "", "")


def test_a_server_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RaypipeError, match="has not answered for"):
        server(Client(JobStatus.RUNNING, None), monkeypatch).follow("night-1", print)
