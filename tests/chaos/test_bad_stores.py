"""A store that fails every tenth request, and one that is full: the night waits or stops, and nothing is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.conftest import CleanNights
from tests.chaos.flaky_store import FlakyStore
from tests.chaos.nights import Published, differences, unbalanced
from tests.conftest import S3Server, unavailable

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_a_store_that_fails_every_tenth_request_changes_nothing(
    clean: CleanNights, s3_server: S3Server, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = clean.again(0, s3_uri, tmp_path / "output")
    expected = clean.first.published
    with FlakyStore(s3_server.url) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        submission = command.submit()
        code = submission.wait()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    assert code == 0, submission.log()
    assert store.failures > 50
    assert differences(Published.of(s3_uri), expected) == []
    assert unbalanced(s3_uri) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 500 KiB, where a night takes 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        unavailable(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_night_that_fills_the_disk_says_so_and_goes_on_once_there_is_room(
    clean: CleanNights, small_disk: Path, tmp_path: Path
) -> None:
    command = clean.again(0, str(small_disk / "workspace"), tmp_path / "first")
    expected = clean.first.published
    submission = command.submit()
    assert submission.wait() == 1
    assert "is full. Nothing published is harmed" in submission.log()
    assert submission.result()["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    again = replace(command, output=tmp_path / "again").submit()
    assert again.wait() == 0, again.log()
    assert differences(Published.of(command.workspace), expected) == []
    assert unbalanced(command.workspace) == []
