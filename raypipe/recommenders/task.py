"""Training of a recommender: a prepared folder of histories, and the task that a trainer runs on it.

`prepare_training` writes one folder, which `RecommenderTask` reads:

    items.npy        int32 [events], the training histories one after the other
    ends.npy         int64 [users], where each ends
    held.npy         int32 [users], the event after each history, which validation asks for; 0 for none
    ties.npy         int32 [events], groups of events without an order; only if the order is to be drawn anew
    table.npy        float32 [items + 1, width less the blocks'], item vectors to start from; only if given
    item_block.npy   float32 [items + 1, attributes], guided blocks of items; only if there are blocks
    user_block.npy   float32 [users, attributes], guided blocks of users; only if there are blocks
    user_keys.npy    int64 [users], the keys of the users who have these; only if there are blocks
    users.npy        int64 [users], the keys of the histories' users; only if there are blocks
    ids.arrow        the ids of the histories' users, for a person to read; only if they are known
    prepared.json    config, catalogue, seed, size of blocks; written last: it means that the rest is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import feather
from torch import Tensor, nn

from raypipe.metrics.ranking import ndcg
from raypipe.recommenders.checkpoint import Card, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.guided import Start
from raypipe.recommenders.ranking import target_ranks
from raypipe.recommenders.windows import Histories, Windows

_MARKER = "prepared.json"
_IDS = "ids.arrow"
_DESCRIBED_USERS = 10
_VALIDATED_USERS = 10_000
_VALIDATION_CUTOFF = 10
_POPULAR = 1000


def prepare_training(
    folder: Path,
    histories: Histories,
    held: NDArray[np.int32],
    catalogue: Mapping[str, object],
    config: RecommenderConfig,
    seed: int,
    start: Start | None = None,
    ties: NDArray[np.int32] | None = None,
    ids: pa.Array | None = None,
) -> None:
    """Write the folder that a task trains from.

    `held` int32 [users] is the event after each history, 0 for none. `catalogue` is that of the checkpoint's card:
    {"items": count, "hash": …}. `start` is given if not all weights are drawn. `ties` is as for `Windows`. `ids` are
    the ids of the histories' users.

    Raises ValueError if no history has two events, so that there is nothing to learn.
    """
    if not len(histories) or int(histories.lengths.max()) < 2:
        raise ValueError("No history has two events, so there is no next item to learn.")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "items.npy", histories.items.astype(np.int32))
    np.save(folder / "ends.npy", histories.ends)
    np.save(folder / "held.npy", held.astype(np.int32))
    start = start or Start()
    optional: dict[str, NDArray[Any] | None] = {"table": start.table, "ties": ties}
    optional |= dict.fromkeys(("item_block", "user_block", "user_keys", "users"))
    if (blocks := start.blocks) is not None:
        optional |= {"item_block": blocks.items, "user_block": blocks.users, "user_keys": blocks.keys}
        optional["users"] = histories.users
    for name, values in optional.items():
        (folder / f"{name}.npy").unlink(missing_ok=True)
        if values is not None:
            np.save(folder / f"{name}.npy", values)
    (folder / _IDS).unlink(missing_ok=True)
    if ids is not None:
        feather.write_feather(pa.table({"user_id": ids}), folder / _IDS)
    card = {
        "config": config.model_dump(mode="json"),
        "catalogue": dict(catalogue),
        "seed": seed,
        "blocks": (0, 0) if blocks is None else blocks.size,
    }
    (folder / _MARKER).write_text(json.dumps(card))


class RecommenderTask:
    """What a trainer needs to know of a recommender. It can be pickled, and reads the files where it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            card = json.loads((self.folder / _MARKER).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared histories; call prepare_training first.") from None
        self.config = RecommenderConfig.model_validate(card["config"])
        self.catalogue: dict[str, Any] = card["catalogue"]
        self.seed = int(card["seed"])
        attributes, users = card["blocks"]
        self.blocks: tuple[int, int] = (attributes, users)

    def __reduce__(self) -> tuple[type[RecommenderTask], tuple[Path]]:
        return type(self), (self.folder,)

    def build(self) -> nn.Module:
        model = self.config.build(self._items, self.seed, self.blocks)
        with torch.no_grad():
            for name in ("table", "item_block", "user_block", "user_keys"):
                if (self.folder / f"{name}.npy").exists():
                    getattr(model, name).copy_(torch.from_numpy(np.load(self.folder / f"{name}.npy")))
        return model

    def steps_per_epoch(self, batch_size: int) -> int:
        return self._windows.steps_per_epoch(batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's windows of `step`, and negatives if the loss samples; a function of the arguments alone.

        All ranks share the negatives, but for `bce`, which draws one for each position of this rank.
        """
        batch = self._windows.batch(step, seed, rank, world, batch_size)
        tensors = {
            "items": torch.from_numpy(batch.items),
            "targets": torch.from_numpy(batch.targets),
            "lengths": torch.from_numpy(batch.lengths),
            "count": torch.tensor(batch.count / world),
        }
        if (users := self._histories.users) is not None:
            tensors["users"] = torch.from_numpy(users[batch.users])
        loss = self.config.loss
        if loss.samples:
            rng = np.random.default_rng((seed, step, 1))
            if loss.kind == "bce":
                drawn = np.random.default_rng((seed, step, 2, rank)).integers(1, self._items + 1, len(batch.items))
            else:
                drawn = np.unique(self._sampler.searchsorted(rng.random(loss.negatives), side="right") + 1)
            tensors["negatives"] = torch.from_numpy(np.minimum(drawn, self._items))
            tensors["expected"] = self._expected
        return tensors

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        """Describe whose events are in the batch of `step`.

        It names at most ten users, by their ids, or by the numbers of their histories if ids are not known.
        """
        users = np.unique(self._windows.batch(step, seed, 0, 1, batch_size).users)
        more = f" and {len(users) - _DESCRIBED_USERS} more" if len(users) > _DESCRIBED_USERS else ""
        users = users[:_DESCRIBED_USERS]
        if not (self.folder / _IDS).exists():
            return f"histories number {', '.join(map(str, users))}{more} of the training data"
        ids = feather.read_table(self.folder / _IDS)["user_id"].take(users)
        return f"events of the users {', '.join(ids.to_pylist())}{more}"

    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        """Sum of NDCG@10 over this rank's share of the validated users, and their number. Seen items are filtered."""
        chosen = self._validated[rank::world]
        histories = self._histories
        prefixes = histories.take(histories.starts[chosen], histories.lengths[chosen])
        above, same = target_ranks(module, prefixes, self._held[chosen])  # type: ignore[arg-type]
        values = ndcg(above, same, _VALIDATION_CUTOFF)
        return float(values.sum()), float(len(values))

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        counts = self._histories.counts(self._items)
        popular = np.argsort(-counts, kind="stable")[:_POPULAR]
        kept = popular[counts[popular] > 0].tolist()
        save_recommender(folder, Card(self.config, self.catalogue, kept, self.blocks), weights)

    @property
    def _items(self) -> int:
        return int(self.catalogue["items"])

    @cached_property
    def _histories(self) -> Histories:
        users = self.folder / "users.npy"
        return Histories(
            np.load(self.folder / "items.npy"),
            np.load(self.folder / "ends.npy"),
            np.load(users) if users.exists() else None,
        )

    @cached_property
    def _held(self) -> NDArray[np.int32]:
        return np.load(self.folder / "held.npy")

    @cached_property
    def _validated(self) -> NDArray[np.int64]:
        asked = np.flatnonzero((self._held > 0) & (self._histories.lengths > 0))
        if len(asked) > _VALIDATED_USERS:
            asked = np.sort(np.random.default_rng(self.seed).choice(asked, _VALIDATED_USERS, replace=False))
        return asked

    @cached_property
    def _windows(self) -> Windows:
        ties = self.folder / "ties.npy"
        return Windows(
            self._histories,
            self.config.max_length,
            whole=self.config.model == "bert4rec",
            ties=np.load(ties) if ties.exists() else None,
        )

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        """The probability of each item to be drawn as a negative, float64 [items], from item 1."""
        loss = self.config.loss
        exponent = loss.popularity if loss.kind == "sampled_softmax" else 0.0
        weights = np.maximum(self._histories.counts(self._items)[1:], 1).astype(np.float64) ** exponent
        return weights / weights.sum()

    @cached_property
    def _sampler(self) -> NDArray[np.float64]:
        return self._shares.cumsum()

    @cached_property
    def _expected(self) -> Tensor:
        """The probability of each item to be among the distinct negatives of a step, float32 [items + 1]."""
        inclusion = -np.expm1(self.config.loss.negatives * np.log1p(-self._shares))
        return torch.from_numpy(np.concatenate([[1.0], inclusion]).astype(np.float32))
