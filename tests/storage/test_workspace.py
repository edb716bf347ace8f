"""A workspace decides its format, kind and buckets once."""

from __future__ import annotations

import pickle

import pytest

from raypipe.errors import UsageError
from raypipe.storage.schemas import TABLES
from raypipe.storage.workspace import FORMAT, Workspace, WorkspaceInfo, choose_buckets


@pytest.fixture
def workspace(workspace_uri: str) -> Workspace:
    return Workspace(workspace_uri)


def test_a_new_workspace_has_decided_nothing(workspace: Workspace) -> None:
    assert workspace.info() is None
    workspace.check_kind("order")
    with pytest.raises(UsageError, match=r"is empty. Run `raypipe ingest"):
        workspace.require_info()


def test_the_first_decision_stands(workspace: Workspace) -> None:
    assert workspace.decide("time", 8) == WorkspaceInfo(FORMAT, "time", 8)
    assert workspace.decide("order", 16) == WorkspaceInfo(FORMAT, "time", 8)
    workspace.check_kind("time")
    with pytest.raises(UsageError, match="holds time logs, and this is a log of order kind"):
        workspace.check_kind("order")


@pytest.mark.parametrize("other", [0, 99])
def test_another_format_version_is_refused_with_both_numbers(workspace: Workspace, other: int) -> None:
    workspace.store.put("workspace.json", f'{{"format":{other},"kind":"time","buckets":4}}'.encode())
    told = rf"has format version {other}; this raypipe reads and writes version 1\. Use the raypipe release of format {other}, or"
    with pytest.raises(UsageError, match=told):
        workspace.info()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format":"x"}'])
def test_a_description_that_is_none_is_refused(workspace: Workspace, content: bytes) -> None:
    workspace.store.put("workspace.json", content)
    with pytest.raises(UsageError, match="is not a workspace description"):
        workspace.info()


def test_a_workspace_travels_to_a_worker(workspace: Workspace) -> None:
    workspace.decide("time", 4)
    assert pickle.loads(pickle.dumps(workspace)).require_info().buckets == 4


def test_buckets_are_a_power_of_two_of_at_most_five_thousand_users_each() -> None:
    users = [0, 1, 20_000, 20_001, 40_000, 1_000_000]
    assert [choose_buckets(number) for number in users] == [4, 4, 4, 8, 8, 256]


def test_every_table_has_a_key_among_its_columns() -> None:
    for name, spec in TABLES.items():
        assert spec.name == name
        # The index of an item is `item_index` where it stands beside others.
        assert set(spec.key) <= set(spec.schema.names), name
        assert set(spec.partition_by) <= set(spec.schema.names)
