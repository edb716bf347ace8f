"""Scores of items and users on named attributes, and their files.

These are `scores.json` and `scores.safetensors`; users' scores are stored as `storage/model_users.py` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from raypipe.errors import UsageError
from raypipe.storage.model_users import Rows, read_users, write_users

_CARD = "scores.json"
_VALUES = "scores.safetensors"
LEAST_DEVIATION = 1e-3
"""The least standard deviation of items' scores on an attribute that tells items apart; less is rounding."""


@dataclass(frozen=True)
class AttributeScores:
    """Scores of items and users on attributes.

    `items` float32 [items + 1, attributes], row 0 is padding; `users` float32 [users, attributes]. `keys` int64 [users]
    are the users' keys, the stable hashes of their ids, rising. A score that could not be read is NaN. `names`
    [attributes] name the columns; `catalogue` says which items the rows are.
    """

    names: tuple[str, ...]
    items: NDArray[np.float32]
    users: NDArray[np.float32]
    keys: NDArray[np.int64]
    catalogue: Mapping[str, Any]

    def normalised(self, clip: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scores of items and of users in standard deviations from their mean, by attribute, clipped at ±`clip`.

        Users are normalised among users: they are asked about in other words than items, so that the two have no scale
        in common. A score that could not be read becomes 0, the mean. So do all scores on an attribute on which all
        items are alike, and those of users on one on which all users are alike.
        """
        found = []
        for rows, whose in ((self.items, self.items[1:]), (self.users, self.users)):
            mean, deviation = _moments(whose)
            unit = np.where((deviation > LEAST_DEVIATION) & self.telling, deviation, np.inf)
            found.append(np.nan_to_num(((rows - mean) / unit).clip(-clip, clip)).astype(np.float32))
        items, users = found
        items[0] = 0
        return items, users

    @property
    def telling(self) -> NDArray[np.bool_]:
        """Which attributes tell items apart, bool [attributes]."""
        return _moments(self.items[1:])[1] > LEAST_DEVIATION


def _moments(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the rows' scores, [attributes] each; 0 for an attribute without a score."""
    scores = rows.astype(np.float64)
    known = ~np.isnan(scores)
    counts = np.maximum(known.sum(0), 1)
    mean = np.where(known, scores, 0).sum(0) / counts
    return mean, np.sqrt((np.where(known, scores - mean, 0) ** 2).sum(0) / counts)


def along(column: NDArray[np.float32], place: float, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The items nearest to a place on one attribute, and those farthest from it, int64 [≤ count] each, from 1.

    `column` float32 [items + 1] are the items' normalised scores. Items at the same distance are in the order of their
    index.
    """
    distances = np.abs(column[1:] - place)
    return (
        np.argsort(distances, kind="stable")[:count] + 1,
        np.argsort(-distances, kind="stable")[:count] + 1,
    )


def save_scores(folder: Path, scores: AttributeScores) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"format": 1, "names": list(scores.names), "catalogue": dict(scores.catalogue)}
    (folder / _CARD).write_text(json.dumps(told, indent=1, ensure_ascii=False))
    save_file({"items": np.ascontiguousarray(scores.items)}, folder / _VALUES)
    write_users(folder, {"keys": scores.keys, "users": scores.users})


def load_scores(folder: Path, users: Rows | None = None) -> AttributeScores:
    """Read the scores of a folder.

    `users` are the rows of stored scores (`Models.users`); scores that are not stored yet have them in their folder.
    Raises UsageError if the folder holds no scores, or damaged ones.
    """
    try:
        told = json.loads((folder / _CARD).read_text())
        values = load_file(folder / _VALUES)
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no scores of attributes.", "Name some made by `raypipe align --system guided`."
        ) from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UsageError(f"The scores in {folder} are damaged: {error}.", "Make them again, or restore them.") from None
    rows = read_users(folder) if users is None else users
    assert rows is not None, f"the scores in {folder} have users"
    return AttributeScores(tuple(told["names"]), values["items"], rows["users"], rows["keys"], told["catalogue"])
