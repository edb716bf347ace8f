"""A recommender on disk: `recommender.json` (what it is, and over which items) and `model.safetensors`.

Guided blocks of users, if it has any, are stored as `storage/model_users.py` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raypipe.config import first_problem
from raypipe.errors import UsageError
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.recommender import Recommender
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.model_users import Rows, read_users, write_users

_FORMAT = 1
_CARD = "recommender.json"
_WEIGHTS = "model.safetensors"
# Weights whose rows belong to one user each: name of the rows in the users' file → name of the weight.
_OF_USERS = {"keys": "user_keys", "blocks": "user_block"}


@dataclass(frozen=True)
class Card:
    """What a checkpoint is of: its config, the items of its table's rows, and the most frequent items of training.

    `catalogue` is {"items": count, "hash": of their ids in order}. `popular` are item indices, most events first.
    `blocks` are the numbers of attributes and of users of the guided blocks at the training.
    """

    config: RecommenderConfig
    catalogue: Mapping[str, Any]
    popular: Sequence[int]
    blocks: tuple[int, int] = (0, 0)


def save_recommender(folder: Path, card: Card, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint. `weights` are by the names of the built model's state."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "format": _FORMAT,
        "config": card.config.model_dump(mode="json"),
        "catalogue": dict(card.catalogue),
        "popular": list(card.popular),
        "blocks": list(card.blocks),
    }
    (folder / _CARD).write_text(json.dumps(told, indent=1, sort_keys=True))
    of_users = {row: name for row, name in _OF_USERS.items() if card.blocks[1]}
    if of_users:
        write_users(folder, {row: _as_array(weights[name]) for row, name in of_users.items()})
    shared = {name: weight for name, weight in weights.items() if name not in of_users.values()}
    save_file({name: weight.contiguous() for name, weight in shared.items()}, folder / _WEIGHTS)


def load_recommender(
    folder: Path, device: torch.device | str = "cpu", users: Rows | None = None
) -> tuple[Recommender, Card]:
    """The model in eval mode, and its card.

    `users` are the rows of a stored model's users (`Models.users`); a model that is not stored yet has them in its
    folder. Raises UsageError if the folder holds no recommender, a damaged one, one of a newer raypipe, or another
    model's weights.
    """
    try:
        told = json.loads((folder / _CARD).read_text())
        weights = load_file(folder / _WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no recommender: {Path(str(error.filename)).name} is missing.",
            "Name one made by `raypipe train`.",
        ) from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UsageError(
            f"The recommender in {folder} is damaged: {error}.", "Train it again, or restore it."
        ) from None
    card = _card(folder, told)
    if (rows := read_users(folder) if users is None else users) is not None:
        weights |= {name: torch.from_numpy(rows[row]).to(device) for row, name in _OF_USERS.items()}
    attributes, count = card.blocks
    # Some of the users it was trained on may have been forgotten.
    blocks = (attributes, len(weights["user_keys"]) if "user_keys" in weights else count)
    model = card.config.build(card.catalogue["items"], blocks=blocks).to(device)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise UsageError(
            f"The weights in {folder} are another model's: {name} is {found.get(name)} and not {expected.get(name)}.",
            "Do not edit recommender.json, nor mix files of two models.",
        )
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        # None of its scores would be a number: lists would be empty, and nobody would learn why.
        raise UsageError(
            f"The recommender in {folder} is damaged: {broken[0]} holds weights that are no finite numbers.",
            "Train it again, or restore it.",
        )
    model.load_state_dict(weights)
    return model.eval(), card


def _as_array(weight: Tensor) -> NDArray[Any]:
    """A weight as an array; floats become float32, as NumPy knows no bfloat16."""
    return (weight.float() if weight.is_floating_point() else weight).detach().cpu().numpy()


def _card(folder: Path, told: Any) -> Card:
    """The card in recommender.json. Raises UsageError if that is damaged or of another version of raypipe."""
    try:
        if told["format"] > _FORMAT:
            raise UsageError(
                f"The recommender in {folder} was made by a newer raypipe: its format is {told['format']}, and this one reads "
                f"{_FORMAT}.",
                "Upgrade raypipe, or train it again with this one.",
            )
        attributes, users = told["blocks"]
        catalogue = {**told["catalogue"], "items": int(told["catalogue"]["items"])}
        config = RecommenderConfig.model_validate(told["config"])
        return Card(config, catalogue, told["popular"], (attributes, users))
    except ValidationError as error:
        raise UsageError(
            f"The recommender in {folder} has options that this raypipe does not take: {first_problem(error)}.",
            "Upgrade raypipe where a newer one made it, else train it again, or restore it.",
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        why = f"has no {error}" if isinstance(error, KeyError) else f"is not one of `raypipe train`: {error}"
        raise UsageError(
            f"The recommender in {folder} is damaged: {_CARD} {why}.", "Train it again, or restore it."
        ) from None


def catalogue_card(item_ids: Sequence[str], count: int | None = None) -> dict[str, object]:
    """The card's `catalogue` for a table whose rows are the first `count` items (all if None), in order of index."""
    known = list(item_ids if count is None else item_ids[:count])
    return {"items": len(known), "hash": fingerprint({"item_ids": known})}


def check_catalogue(card: Mapping[str, object], item_ids: Sequence[str], model: str) -> None:
    """Check that the model's items are the first of this catalogue, in the same order. Raises UsageError if not."""
    count = int(str(card["items"]))
    if count > len(item_ids) or catalogue_card(item_ids, count) != dict(card):
        raise UsageError(
            f"The recommender {model} was trained on another catalogue: its {count:,} items are not the first of the "
            f"{len(item_ids):,} here.",
            "Use a model of this workspace, or train one with `raypipe train`.",
        )
