"""What was measured: one record for each way to measure a model, in the order in which it was measured."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.store import Store


def record(seed: int) -> Evaluation:
    return Evaluation("evaluate", "sasrec", "a" * 32, "", "leave-one-out", seed, {"sasrec": {"HR@10": Measured(0.5)}})


def test_records_come_in_the_order_of_their_making_from_a_copy_of_the_workspace_too(tmp_path: Path) -> None:
    evaluations = Evaluations(Store(str(tmp_path / "workspace")))
    for seed in (0, 1, 2):
        evaluations.put(record(seed), {"seed": seed})
    evaluations.put(record(7), {"seed": 0})
    expected = [record(1), record(2), record(7)]
    assert evaluations.all() == expected
    shutil.copytree(tmp_path / "workspace", tmp_path / "copy")
    moment = time.time()
    for path in sorted((tmp_path / "copy/evaluations").rglob("*.json"), key=lambda path: -path.stat().st_mtime):
        moment += 10
        os.utime(path, (moment, moment))
    assert Evaluations(Store(str(tmp_path / "copy"))).all() == expected
