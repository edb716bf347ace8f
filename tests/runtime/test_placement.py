"""Where training workers are put on a cluster of several nodes: there, where what they read is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raypipe.pipeline.training_folders import TrainingOptions
from raypipe.runtime.cluster import ClusterConfig

DRIVER = """
import json, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from safetensors.torch import save_file
from torch import nn

from raypipe.errors import UsageError
from raypipe.pipeline.training_folders import TrainingOptions
from raypipe.runtime.cluster import ClusterConfig
from raypipe.runtime.trainer import TrainerConfig, fit

class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch):
        return self.layer(batch["x"]).square().mean()

class Task:
    def __init__(self, seen):
        self.seen = seen

    def build(self):
        return Module()

    def steps_per_epoch(self, batch_size):
        return 4

    def batch(self, step, seed, rank, world, batch_size):
        (self.seen / str(rank)).write_text(ray.get_runtime_context().get_node_id())
        return {"x": torch.ones(2, 2)}

    def save(self, weights, folder):
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")

ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
address, folder = sys.argv[1], Path(sys.argv[2])
remote = SimpleNamespace(store=SimpleNamespace(is_local=False))

def node(driver_cpus=0.0, **trainer):
    options = TrainingOptions(trainer=TrainerConfig(steps=2, batch_size=4, **trainer))
    try:
        return options.workers_node(remote, ClusterConfig(address=address, driver_cpus=driver_cpus))
    except UsageError as error:
        return str(error)

told = {
    "fits": node(workers=2, device="cpu"),
    "many": node(workers=3, device="cpu"),
    "driver": node(workers=2, device="cpu", driver_cpus=1),
    "gpu": node(),
    "driver's": ray.get_runtime_context().get_node_id(),
}

# Whoever may go anywhere goes where there is room at once; a worker of the driver's node waits for it.
@ray.remote(num_cpus=2, label_selector={"ray.io/node-id": told["driver's"]})
class Busy:
    def ready(self):
        return True

busy = Busy.remote()
ray.get(busy.ready.remote())
threading.Timer(10, lambda: ray.kill(busy)).start()
config = TrainerConfig(workers=2, steps=2, batch_size=4, device="cpu")
fit(Task(folder), config, "run", folder / "out", told["fits"])
told["workers"] = sorted({path.read_text() for path in folder.iterdir() if path.name.isdigit()})
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """By a driver on a node of two CPUs, beside one with more of them and a GPU."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("placement")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
    try:
        cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=100 << 20)
        words = [sys.executable, "-c", DRIVER, cluster.address, folder]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run(words, capture_output=True, text=True, timeout=500, env=environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        yield json.loads(ended.stdout.strip().splitlines()[-1])
    finally:
        cluster.shutdown()


def test_workers_are_on_the_node_whose_disk_has_their_files(told: dict[str, Any]) -> None:
    assert told["fits"] == told["driver's"]
    assert told["workers"] == [told["driver's"]]


@pytest.mark.parametrize(
    ("case", "room"),
    [
        ("many", "of 3 with 1 CPU each it has room for 2"),
        ("driver", "of 2 with 1 CPU each it has room for 1"),
        ("gpu", "of 1 with 1 CPU and 1 GPU each it has room for 0"),
    ],
)
def test_workers_that_do_not_fit_there_are_refused_with_the_remedy(told: dict[str, Any], case: str, room: str) -> None:
    assert room in told[case]
    assert "Name a folder on a volume that every node mounts with --work_folder" in told[case]
    assert ("--trainer.device cpu" in told[case]) == (case == "gpu")


def test_where_every_node_has_the_files_workers_are_anywhere(tmp_path: Path) -> None:
    cluster = ClusterConfig(address="192.0.2.1:6379")  # nobody's: it is not asked
    local: Any = SimpleNamespace(store=SimpleNamespace(is_local=True))
    remote: Any = SimpleNamespace(store=SimpleNamespace(is_local=False))
    assert TrainingOptions().workers_node(local, cluster) is None
    assert TrainingOptions(work_folder=str(tmp_path)).workers_node(remote, cluster) is None


def test_a_cluster_of_one_machine_has_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    remote: Any = SimpleNamespace(store=SimpleNamespace(is_local=False))
    assert TrainingOptions().workers_node(remote, ClusterConfig()) is None
