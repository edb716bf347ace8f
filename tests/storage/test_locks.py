"""One writer per table: flock on a folder, a lease on an object store, and what becomes of a killed holder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raypipe.errors import RaypipeError, UnavailableError, UsageError
from raypipe.storage.locks import Lock, hold
from raypipe.storage.store import Store

HOLDER = """
import sys, time
from raypipe.storage.locks import Lock
from raypipe.storage.store import Store
with Lock(Store(sys.argv[1]), "summaries", "the killed job", 60.0):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def store(workspace_uri: str) -> Store:
    return Store(workspace_uri)


@pytest.fixture
def s3(s3_uri: str) -> Store:
    return Store(s3_uri)


def newest_record(store: Store) -> tuple[str, dict]:
    path = store.list("locks/summaries")[-1].path
    return path, json.loads(store.read(path))


def test_a_second_holder_is_refused_with_the_name_of_the_first(store: Store) -> None:
    with Lock(store, "summaries", "summarize"):
        with (
            pytest.raises(UnavailableError, match="summaries is being written by summarize, process") as caught,
            Lock(store, "summaries", "other"),
        ):
            pass
        assert "submit again" in caught.value.remedy


def test_a_lock_is_free_once_its_holder_left_even_by_an_error(store: Store) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Lock(store, "summaries", "summarize"):
            _ = 1 / 0


def test_locks_of_different_tables_do_not_meet(store: Store) -> None:
    with hold(store, ["summaries", "histories"], "one"), hold(store, ["items"], "two") as locks:
        assert [lock.name for lock in locks] == ["items"]


def test_a_job_that_gets_only_some_of_its_locks_keeps_none(store: Store) -> None:
    with (
        Lock(store, "summaries", "one"),
        pytest.raises(UnavailableError),
        hold(store, ["histories", "summaries"], "two"),
    ):
        pass
    with Lock(store, "histories", "three") as lock:
        lock.check_held()


def test_who_may_wait_gets_the_lock_when_it_is_released(store: Store) -> None:
    first = Lock(store, "rejects", "one")
    first.__enter__()
    with pytest.raises(UnavailableError), hold(store, ["rejects"], "two", wait_s=0.3):
        pass
    threading.Timer(0.3, first.__exit__).start()
    with hold(store, ["rejects"], "two", wait_s=20) as (second,):
        second.check_held()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, store.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UnavailableError, match="written by the killed job"), Lock(store, "summaries", "mine"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with Lock(store, "summaries", "mine") as lock:
        lock.check_held()


def test_a_lease_of_another_machine_is_respected_until_it_runs_out(s3: Store) -> None:
    record = {"owner": "summarize", "host": "elsewhere", "boot": "b", "pid": 1, "started": 0.0, "released": False}
    s3.put("locks/summaries/000000000001.json", json.dumps({**record, "expires": time.time() + 60}).encode())
    with (
        pytest.raises(UnavailableError, match=r"process 1 on elsewhere; its lease runs until \d\d:\d\d:\d\d"),
        Lock(s3, "summaries", "mine"),
    ):
        pass
    s3.put("locks/summaries/000000000001.json", json.dumps({**record, "expires": time.time() - 1}).encode())
    with Lock(s3, "summaries", "mine") as lock:
        lock.check_held()
        assert newest_record(s3)[1]["owner"] == "mine"


def test_a_lease_is_renewed_while_its_holder_lives(s3: Store) -> None:
    with Lock(s3, "summaries", "one", lease_s=0.6):
        before = newest_record(s3)[1]["expires"]
        time.sleep(1.0)
        assert newest_record(s3)[1]["expires"] > before
        with pytest.raises(UnavailableError), Lock(s3, "summaries", "two"):
            pass


def test_who_slept_through_its_lease_finds_out_before_it_commits(s3: Store) -> None:
    with Lock(s3, "summaries", "sleeper", lease_s=30.0) as sleeper:
        path, record = newest_record(s3)
        s3.put(path, json.dumps({**record, "expires": time.time() - 1}).encode())
        with Lock(s3, "summaries", "successor") as successor:
            successor.check_held()
            with pytest.raises(RaypipeError, match="lease on summaries ran out"):
                sleeper.check_held()


def test_a_sleeper_that_leaves_does_not_free_its_successors_lock(s3: Store) -> None:
    sleeper = Lock(s3, "summaries", "sleeper", lease_s=30.0)
    sleeper.__enter__()
    path, record = newest_record(s3)
    s3.put(path, json.dumps({**record, "expires": time.time() - 1}).encode())
    with Lock(s3, "summaries", "successor") as successor:
        sleeper.__exit__()
        successor.check_held()
        with pytest.raises(UnavailableError, match="written by successor"), Lock(s3, "summaries", "third"):
            pass


def test_generations_do_not_pile_up(s3: Store) -> None:
    for _ in range(3):
        with Lock(s3, "summaries", "one"):
            pass
    assert [entry.path for entry in s3.list("locks")] == ["locks/summaries/000000000003.json"]


def test_a_locks_folder_that_cannot_be_written_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file where the folder should be")
    with (
        pytest.raises(UsageError, match=r"lock file .* cannot be opened.*permission"),
        hold(Store(str(tmp_path)), ["items"], "ingest"),
    ):
        pass
