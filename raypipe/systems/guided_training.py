"""Tuning a language model so that its scores recommend: L = L_rec + λ L_format (arXiv 2504.11658).

L_rec compares the item that came next with others. It is taken on dot products of a user's scores and items' scores,
each standardised over the users and over the items of the step. L_format is the cross-entropy of the words around the
numbers, while the slots hold drawn numbers, plus the cross-entropy of there being any number in each slot (ours:
without it, the answers of a small model could not be parsed). The gradients of both losses train only the language
model's updates.

`prepare_tuning` writes, and `TuningTask` reads, one folder:

    items.npy, item_ends.npy    int32 [tokens], int64 [items]: the questions about the items, one after the other
    users.npy, user_ends.npy    int32 [tokens], int64 [examples]: those about users, each before one of their events
    targets.npy                 int32 [examples], the item of that event
    prepared.json               what is trained, and how; written last, so that its existence means the rest is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from raypipe.language.adapters import AdapterCard, AdapterConfig, build_adapter, save_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.batching import batches_of_like_length
from raypipe.language.number_slots import NumberForm, expected_numbers
from raypipe.language.soft_prompts import SoftPromptLm
from raypipe.recommenders.attribute_scores import LEAST_DEVIATION
from raypipe.systems.guided import GuidedConfig, Loss

_MARKER = "prepared.json"
_CLIP = 3.0
_PREFIX = "adapted."


def recommendation_loss(users: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, kind: Loss) -> Tensor:
    """The recommendation loss L_rec, summed over users.

    `users` and `positives` [batch, attributes] are the scores of users and of the items they chose next; `negatives`
    [n, attributes] are the scores of other items, shared by all users. `same` bool [batch, n] marks negatives that are
    the user's own next item; they are left out. Item scores are standardised by the mean and the standard deviation of
    the step's items, user scores by those of its users, and dot products are divided by √attributes.
    """
    # Users are standardised by their own moments, and nothing is added to a deviation. Otherwise the loss of early,
    # poor scores would fall fastest if all items had equal scores, or all users those of the mean item, and neither
    # side would learn from the other any more.
    items = _normalised(torch.cat([positives, negatives]))
    users, positives, negatives = _normalised(users), items[: len(positives)], items[len(positives) :]
    scale = users.shape[1] ** -0.5
    own = (users * positives).sum(1, keepdim=True) * scale
    others = (users @ negatives.T * scale).masked_fill(same, -torch.inf)
    if kind == "bpr":
        # The mean over the negatives that are not left out; a negative that is left out has a loss of 0.
        return (-functional.logsigmoid(own - others)).sum(1).div((~same).sum(1).clamp(min=1)).sum()
    return (torch.cat([own, others], 1).logsumexp(1) - own[:, 0]).sum()


def _normalised(scores: Tensor) -> Tensor:
    deviation = scores.std(0, correction=0).clamp(min=LEAST_DEVIATION)
    return ((scores - scores.mean(0)) / deviation).clamp(-_CLIP, _CLIP)


class TuningLm(nn.Module):
    """The language model with its updates; `forward` returns the loss of a step."""

    def __init__(self, adapted: SoftPromptLm, form: NumberForm, kind: Loss, format_weight: float) -> None:
        super().__init__()
        self.adapted, self.form, self.kind, self.format_weight = adapted, form, kind, format_weight

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss L_rec / `count` + λ L_format of a batch.

        `user/…` and `item/…` are as `NumberForm.collate` makes them; the items are first the next item of each user,
        then the others. `targets` int64 [users] and `negatives` int64 [others] are their item indices. `count` is the
        number of users of the step over all workers, divided by the number of workers.
        """
        told = [expected_numbers(self.adapted.lm, self.form, _part(batch, name)) for name in ("user/", "item/")]
        users, items = told[0].numbers, told[1].numbers
        same = batch["targets"][:, None] == batch["negatives"]
        recommended = recommendation_loss(users, items[: len(users)], items[len(users) :], same, self.kind)
        form = sum(one.form for one in told) / sum(one.count for one in told)
        return recommended / batch["count"] + self.format_weight * form


def prepare_tuning(
    folder: Path,
    items: Sequence[Sequence[int]],
    users: Sequence[Sequence[int]],
    targets: Sequence[int],
    form: NumberForm,
    lm: str,
    card: AdapterCard,
    config: GuidedConfig,
    seed: int,
) -> dict[str, int]:
    """Write the folder that a task trains from, and return its counts of examples and of their tokens.

    `items` and `users` are questions as token ids. `lm` is the language model's folder or hub name, which every worker
    resolves itself. Raises ValueError if there are no examples.
    """
    if not users:
        raise ValueError("No user has two events before the cut, so there is no next item to learn.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("item", items), ("user", users)):
        np.save(folder / f"{name}s.npy", np.concatenate([np.asarray(row, np.int32) for row in rows]))
        np.save(folder / f"{name}_ends.npy", np.cumsum([len(row) for row in rows]))
    np.save(folder / "targets.npy", np.asarray(targets, np.int32))
    told = {
        "lm": lm,
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "form": asdict(form),
        "card": {**asdict(card), "config": card.config.model_dump(mode="json")},
    }
    (folder / _MARKER).write_text(json.dumps(told))
    return {"examples": len(users), "tokens": sum(map(len, users))}


class TuningTask:
    """The training task of tuning a language model. It is picklable and reads its files where it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            told = json.loads((self.folder / _MARKER).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared questions; call prepare_tuning first.") from None
        config = AdapterConfig.model_validate(told["card"].pop("config"))
        self.card = AdapterCard(config=config, **told["card"])
        self.lm, self.seed = str(told["lm"]), int(told["seed"])
        self.config = GuidedConfig.model_validate(told["config"])
        form = {name: tuple(tuple(ids) for ids in told["form"][name]) for name in ("segments", "numbers")}
        self.form = NumberForm(**form, end=told["form"]["end"])
        self._batches: list[NDArray[np.int64]] = []
        self._batches_of: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[type[TuningTask], tuple[Path]]:
        return type(self), (self.folder,)

    def build(self) -> nn.Module:
        adapted = build_adapter(load_backbone(self.lm, device="cpu"), self.card, self.seed)
        model = TuningLm(adapted, self.form, self.config.loss, self.config.format_weight)
        self._kept = {name for name, weight in model.named_parameters() if weight.requires_grad}
        return model

    def keeps(self, name: str) -> bool:
        return name in self._kept

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self._targets) // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's users of `step`, the items they chose next, and the other items, which all ranks share.

        The batch is a function of the arguments alone; the loss, however, standardises scores over this rank's users
        and items.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        if self._batches_of != (epoch, seed, batch_size):
            lengths = np.diff(self._user_ends, prepend=0)
            self._batches = batches_of_like_length(lengths, (seed, epoch), batch_size)
            self._batches_of = (epoch, seed, batch_size)
        whole = self._batches[index]
        chosen = whole[rank::world]
        drawn = np.random.default_rng((seed, step, 1)).integers(1, len(self._item_ends) + 1, self.config.negatives)
        negatives = np.unique(drawn)
        targets = self._targets[chosen].astype(np.int64)
        rng = np.random.default_rng((seed, step, 2, rank))
        rows = {
            "user/": [_row(self._users, self._user_ends, int(example)) for example in chosen],
            "item/": [_row(self._items, self._item_ends, int(item) - 1) for item in [*targets, *negatives]],
        }
        batch = {
            "targets": torch.from_numpy(targets),
            "negatives": torch.from_numpy(negatives),
            "count": torch.tensor(len(whole) / world),
        }
        for name, prompts in rows.items():
            fills = rng.integers(1, self.form.top + 1, (len(prompts), self.form.slots))
            batch |= {name + key: value for key, value in self.form.collate(prompts, fills).items()}
        return batch

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_adapter(folder, self.card, {name.removeprefix(_PREFIX): weight for name, weight in weights.items()})

    @cached_property
    def _users(self) -> NDArray[np.int32]:
        return np.load(self.folder / "users.npy", mmap_mode="r")

    @cached_property
    def _user_ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "user_ends.npy")

    @cached_property
    def _items(self) -> NDArray[np.int32]:
        return np.load(self.folder / "items.npy", mmap_mode="r")

    @cached_property
    def _item_ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "item_ends.npy")

    @cached_property
    def _targets(self) -> NDArray[np.int32]:
        return np.load(self.folder / "targets.npy")


def _part(batch: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def _row(tokens: NDArray[np.int32], ends: NDArray[np.int64], row: int) -> list[int]:
    return tokens[ends[row - 1] if row else 0 : ends[row]].tolist()
