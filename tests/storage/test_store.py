"""The store's contract, on a local folder and on S3."""

from __future__ import annotations

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe.errors import AccessError, RaypipeError, UsageError
from raypipe.storage.store import Store
from tests.conftest import S3Server


@pytest.fixture
def store(workspace_uri: str) -> Store:
    return Store(workspace_uri)


def test_what_was_put_is_read_back_and_replaced_whole(store: Store) -> None:
    store.put("a/b.json", b"first, longer")
    store.put("a/b.json", b"second")
    assert store.read("a/b.json") == b"second"
    assert store.size("a/b.json") == 6


def test_an_absent_object_has_no_bytes_no_size_and_raises_when_read(store: Store) -> None:
    assert store.get("a") is None
    assert store.size("a") is None
    assert not store.exists("a")
    with pytest.raises(FileNotFoundError):
        store.read("a")


def test_create_keeps_what_was_there_first(store: Store) -> None:
    assert store.create("units/1.json", b"first")
    assert not store.create("units/1.json", b"second")
    assert store.read("units/1.json") == b"first"


def test_of_many_who_create_at_once_exactly_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("lock.json", b"%d" % n), range(8)))
    assert sum(won) == 1
    assert store.read("lock.json") == b"%d" % won.index(True)


def test_list_names_all_objects_of_a_folder_in_order_and_of_no_other(store: Store) -> None:
    for name in ("units/2.json", "units/1.json", "units/deep/3.json", "units-other/4.json"):
        store.put(name, name.encode())
    entries = store.list("units")
    assert [entry.path for entry in entries] == ["units/1.json", "units/2.json", "units/deep/3.json"]
    assert [entry.size for entry in entries] == [12, 12, 17]
    assert store.list("nothing") == []


def test_delete_removes_what_is_named_and_forgives_what_is_gone(store: Store) -> None:
    store.put("a/1", b"1")
    store.put("a/2", b"2")
    store.delete(["a/1", "a/none"])
    assert [entry.path for entry in store.list("a")] == ["a/2"]


def test_delete_folder_removes_all_below_and_nothing_beside(store: Store) -> None:
    for name in ("staging/x/1", "staging/x/y/2", "staging/xx/3"):
        store.put(name, b"-")
    store.delete_folder("staging/x")
    assert [entry.path for entry in store.list("staging")] == ["staging/xx/3"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EACCES, AccessError), (errno.ENOSPC, RaypipeError), (errno.EBUSY, OSError)]
)
def test_a_folder_that_cannot_be_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    store = Store(str(tmp_path / "workspace"))
    store.put("canary/x/1", b"-")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        with pytest.raises(kind):
            store.delete_folder("canary/x")
    assert store.exists("canary/x/1")
    store.delete_folder("canary/x")
    store.delete_folder("canary/x")
    assert store.list("canary") == []


@pytest.mark.parametrize("meanwhile", ["deletes", "writes"])
def test_a_folder_in_which_another_deletes_or_writes_meanwhile_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    store = Store(str(tmp_path / "workspace"))
    for name in ("staging/x/1", "staging/x/y/2"):
        store.put(name, b"-")
    unlink, others = os.unlink, [1, 2, 3]

    def beside(path: str, **place: Any) -> None:
        unlink(path, **place)
        if meanwhile == "deletes" and others:
            others.clear()
            unlink(path, **place)  # it was the other's
        elif others:
            (tmp_path / "workspace/staging/x" / f"late{others.pop()}").touch()

    monkeypatch.setattr("os.unlink", beside)
    store.delete_folder("staging/x")
    assert (store.list("staging"), others) == ([], [])


def test_many_objects_are_deleted_a_thousand_a_request(s3_server: S3Server, s3_uri: str) -> None:
    store, paths = Store(s3_uri), [f"many/{number:04d}" for number in range(2500)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.put(path, b"-"), paths))
    before = len(s3_server.log.read_text())
    store.delete_folder("many")
    store.delete([])
    requests = s3_server.log.read_text()[before:]
    assert (requests.count('"POST '), requests.count('"DELETE ')) == (3, 0)
    assert store.list("many") == []


@pytest.mark.parametrize("uri", ["gs://bucket/ws", "s3a://bucket/ws", "S3://bucket/ws"])
def test_what_is_neither_a_folder_nor_on_s3_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=f"cannot keep anything under {uri}.*write s3://BUCKET/PREFIX"):
        Store(uri)


def test_parquet_is_read_through_a_seekable_file(store: Store) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": range(1000)}), sink, row_group_size=100)
    store.put("t.parquet", sink.getvalue().to_pybytes())
    with store.open_input("t.parquet") as source:
        assert pq.ParquetFile(source).read_row_group(9)["n"].to_pylist() == list(range(900, 1000))


def test_a_store_travels_to_a_worker(store: Store) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_a_probe_for_writing_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()
    assert store.list("") == []


def test_only_a_local_store_knows_its_free_bytes(store: Store) -> None:
    assert (store.free_bytes() is not None) == store.is_local


def test_a_bucket_that_does_not_exist_is_one_clear_paragraph(s3_uri: str) -> None:
    with pytest.raises(RaypipeError, match=r"under s3://no-such-bucket/x: there is no such bucket. Create the bucket"):
        Store("s3://no-such-bucket/x").put("a", b"1")
    with pytest.raises(UsageError, match="no such bucket"):
        Store("s3://no-such-bucket/x").check_writable()
    with pytest.raises(UsageError, match="names no bucket"):
        Store("s3://").put("a", b"1")


def test_looking_into_a_folder_that_does_not_exist_does_not_make_it(tmp_path) -> None:
    store = Store(str(tmp_path / "typo"))
    assert store.get("workspace.json") is None
    assert store.list("tables") == []
    assert not (tmp_path / "typo").exists()
