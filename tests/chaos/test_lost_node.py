"""A node lost in the middle of a unit: another takes over within the same submission, and no row is blamed for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.conftest import CleanNights
from tests.chaos.kills import survive
from tests.chaos.nights import Published, differences

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a cluster of a head without workers and two nodes of one CPU, all on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_lost_node_counts_against_no_row(clean: CleanNights, two_nodes: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace")
    night = replace(clean.again(0, uri, tmp_path / "output"), address=two_nodes)
    fault = "raylet after ledger/summarize/*/journal/* 2"
    ordeal = survive(night, [fault], random.Random(0))
    assert ordeal.struck == [fault]
    assert ordeal.codes == [0]
    assert night.deaths() == []
    assert differences(Published.of(uri), clean.first.published) == []
