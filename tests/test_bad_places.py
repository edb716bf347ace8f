"""Bad places: a workspace somebody else writes, a disk that is full or fills up, files that may not be read or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from raypipe.storage.locks import Lock
from raypipe.storage.store import Store
from tests.conftest import Run, unavailable
from tests.ground import GOOD, Ground, one_paragraph, table_versions
from tests.pipeline.small_logs import START, histories_of, write_log


def test_a_second_job_on_the_same_tables_is_refused_and_names_the_first(raypipe: Run, ground: Ground) -> None:
    with Lock(Store(ground.uri), "histories", "the other ingest"):
        ended = raypipe(*ground.words())
    # Whoever schedules it tries again: nothing is wrong with the command.
    assert (ended.code, ended.status) == (1, "failed")
    assert f"histories is being written by the other ingest, process {os.getpid()}" in one_paragraph(ended.stderr)
    assert table_versions(ground.uri) == {}


HOLDER = """
import sys, time
from raypipe.storage.locks import hold
from raypipe.storage.store import Store
with hold(Store(sys.argv[1]), ["items", "histories", "logs"], "the killed ingest"):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_lock_left_by_a_killed_run_holds_nobody_up(
    ray_cluster: None, raypipe: Run, ground: Ground, workspace_uri: str
) -> None:
    ground = ground._replace(uri=workspace_uri)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, ground.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = raypipe(*ground.words())
        assert (refused.code, refused.status) == (1, "failed")
        assert "the killed ingest" in one_paragraph(refused.stderr)
    finally:
        holder.kill()
        holder.wait()
    ended = raypipe(*ground.words())
    assert (ended.code, ended.metrics["events_added"]) == (0, len(GOOD))


class Disk(NamedTuple):
    """A small file system of its own."""

    path: Path

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        unavailable("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        unavailable(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full_before_work_starts_is_refused(raypipe: Run, ground: Ground, disk: Disk) -> None:
    filler = disk.path / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _ = [file.write(b"\0" * 4096) for _ in range(1000)]
    ended = raypipe(*ground._replace(uri=str(disk.path / "workspace")).words())
    assert (ended.code, ended.status) == (1, "failed")
    told = one_paragraph(ended.stderr)
    assert "is full" in told
    assert "Free some space" in told


def test_a_disk_that_fills_up_loses_and_doubles_nothing_once_there_is_room(
    ray_cluster: None, raypipe: Run, ground: Ground, disk: Disk
) -> None:
    events = [
        (f"user number {n * 7919 % 10_007}", f"i{n % 5 + 1}", START + n * 104_729 % 1_000_003) for n in range(20_000)
    ]
    log = write_log(ground.folder / "big.csv", events)
    words = ground._replace(uri=str(disk.path / "workspace")).words(log=log)
    codes: list[int] = []
    # Wherever it fills up - spilling, staging, committing - the next try goes on from there.
    for size in ("256k", "600k", "900k", "1400k", "2000k"):
        disk.remount(f"size={size}")
        ended = raypipe(*words)
        codes.append(ended.code)
        if ended.code == 0:
            break
        assert (ended.code, ended.status) in {(1, "failed"), (2, "failed")}
        assert "is full" in one_paragraph(ended.stderr)
        assert table_versions(str(disk.path / "workspace")).get("logs") is None
    else:
        disk.remount("size=64m")
        ended = raypipe(*words)
    assert 1 in codes, "the disk never filled up while work went on"
    assert ended.code == 0, ended.stderr
    histories = histories_of(str(disk.path / "workspace"))
    expected: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in sorted(events, key=lambda event: event[2]):
        expected.setdefault(user, []).append((item, time))
    assert histories == expected
    assert ended.metrics["events_added"] == len(events)
    assert raypipe(*words).status == "nothing_to_do"


def test_a_workspace_one_may_read_and_not_write_is_refused(raypipe: Run, ground: Ground, disk: Disk) -> None:
    disk.remount("ro")
    ended = raypipe(*ground._replace(uri=str(disk.path / "workspace")).words())
    disk.remount("rw")
    assert (ended.code, ended.status) == (2, "failed")
    assert "Give this user read and write permission there" in one_paragraph(ended.stderr)


def test_a_log_one_may_not_read_is_refused(ground: Ground, tmp_path: Path) -> None:
    """Root may read everything, so the check runs as nobody, in a process that got its modules before it changed."""
    ground.log.chmod(0)
    script = (
        "import os, sys\nfrom raypipe.cli.main import main\nimport raypipe.pipeline.ingest\n"
        "if os.geteuid() == 0:\n    os.setuid(65534)\nsys.exit(main(sys.argv[1:]))"
    )
    for folder in (ground.folder, *ground.folder.parents):
        if folder != Path("/") and str(folder).startswith(str(tmp_path.parents[1])):
            folder.chmod(0o755)
    words = [str(word) for word in (*ground.words(), "--tracking", "off")]
    job = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=False
    )
    ground.log.chmod(0o644)
    assert job.returncode == 2, job.stderr
    assert json.loads(job.stdout.splitlines()[-1])["status"] == "failed"
    told = one_paragraph(job.stderr)
    assert "log.csv may not be read by this user" in told
    assert "read access" in told
