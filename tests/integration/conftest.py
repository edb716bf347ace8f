"""One job server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.job_server import JobServer, start_job_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    with start_job_server(tmp_path_factory.mktemp("head") / "head.log") as server:
        yield server
