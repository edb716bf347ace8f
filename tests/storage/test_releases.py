"""Releases: the same parts are the same release, and which is the newest does not hang on files' times."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from raypipe.errors import UsageError
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store


@pytest.fixture
def releases(workspace_uri: str) -> Releases:
    return Releases(Store(workspace_uri))


def test_the_same_parts_are_the_same_release_and_the_newest_where_they_come_again(releases: Releases) -> None:
    one, other = releases.add(Release("sasrec/1")), releases.add(Release("sasrec/2", adapters={"a": "b"}))
    assert releases.hashes() == [one.hash, other.hash]
    assert releases.add(Release("sasrec/1")) == one
    assert releases.all() == [other, one]
    assert releases.get(one.hash[:10]) == one
    releases.point("champion", other)
    assert releases.named("champion") == other
    releases.remove(other.hash)
    assert (releases.hashes(), releases.named("champion")) == ([one.hash], None)
    with pytest.raises(UsageError, match=rf"0 releases start with 'x'. There are: {one.hash[:12]}."):
        releases.get("x")


def test_the_order_of_releases_survives_a_copy_of_the_workspace(tmp_path: Path) -> None:
    releases = Releases(Store(str(tmp_path / "workspace")))
    made = [releases.add(Release(f"sasrec/{number}")) for number in range(4)]
    shutil.copytree(tmp_path / "workspace", tmp_path / "copy")
    moment = time.time()
    for release in reversed(made):
        moment += 10
        os.utime(tmp_path / "copy/releases" / f"{release.hash}.json", (moment, moment))
    assert Releases(Store(str(tmp_path / "copy"))).all() == made
