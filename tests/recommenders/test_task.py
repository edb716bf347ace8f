"""What a prepared folder tells of its histories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories


def prepared(folder: Path, ids: pa.Array | None) -> RecommenderTask:
    """Twelve histories of three events; the second user's has none."""
    lengths = np.array([3, 0, *[3] * 11])
    histories = Histories(np.ones(36, np.int32), lengths.cumsum())
    held = np.zeros(13, np.int32)
    prepare_training(folder, histories, held, {"items": 5, "hash": "x"}, RecommenderConfig(), 0, ids=ids)
    return RecommenderTask(folder)


def test_a_batch_is_described_by_ten_ids_of_its_users_at_most(tmp_path: Path) -> None:
    ids = [f"user {chr(ord('a') + n)}" for n in range(13)]
    task = prepared(tmp_path, pa.array(ids))
    named = ", ".join(name for name in ids if name != "user b")
    assert task.describe(0, 0, 12) == f"events of the users {named[: named.index(', user l')]} and 2 more"
    users = sorted(int(user) for user in task._windows.batch(1, 0, 0, 1, 2).users)
    assert task.describe(1, 0, 2) == f"events of the users {ids[users[0]]}, {ids[users[1]]}"
    # Prepared again without ids, those of before are not told.
    assert prepared(tmp_path, None).describe(1, 0, 2) == f"histories number {users[0]}, {users[1]} of the training data"
