"""Guided embedding refinement (arXiv 2504.11658): a language model's scores fill columns of item and user vectors.

An item's vector is [reduced | guided]: a base model's vector reduced to fewer dimensions, which is trained, and the
item's scores on named attributes, which stay. A user's guided block is a parameter that starts at the user's own
scores. The width is that of the base, and so is the cost of serving: the language model is not asked.

The paper adds user and item vectors of two towers. In a sequential model a user is the state after a history, and no
user has a vector. Our reading is that a user's block is added to the guided columns of each of the user's states,

    score(user, item) = state · item + block of the user · block of the item,

so that one vector for each user is stored and served, as before. With `alone` the state keeps only its reduced columns,
which is the paper's concatenation to the letter. Users whom the scores do not know have no block, and are ranked by the
state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from raypipe.config import Config, shaping
from raypipe.errors import UsageError
from raypipe.recommenders.attribute_scores import AttributeScores

Floats = NDArray[np.float32]


class GuidedOptions(Config):
    """Which scores fill columns of the vectors, what stands beside them, and which parts are trained."""

    scores: str | None = shaping(
        None,
        "NAME or NAME/HASH of scores of the workspace, made by `raypipe align --system guided`; unset: no such columns",
    )
    base: str | None = shaping(
        None, "NAME or NAME/HASH of a model whose item vectors, reduced to the width that is left, are started from"
    )
    block: Literal["scores", "shuffled", "random", "none"] = shaping(
        "scores", "what the columns hold: the scores, or as controls those of another item, noise, or nothing"
    )
    items: Literal["frozen", "trained"] = shaping("frozen", "the items' columns stay as they start, or are trained")
    users: Literal["trained", "frozen", "absent"] = shaping("trained", "the users' blocks alike, or there are none")
    states: Literal["added", "alone"] = shaping(
        "added", "a user's block is added to the state's own guided columns, or stands in their place"
    )
    clip: float = shaping(3.0, "the largest normalised score, in standard deviations", gt=0)
    scale: float = shaping(1.0, "mean length of the items' blocks, as a share of that of what is beside them", gt=0)

    @model_validator(mode="after")
    def _columns_need_scores(self) -> GuidedOptions:
        columns = {
            name: field.default for name, field in type(self).model_fields.items() if name not in ("scores", "base")
        }
        if self.scores is None and any(getattr(self, name) != default for name, default in columns.items()):
            raise ValueError(
                "without `scores` there are no columns to fill: name some, or leave out what is said of them"
            )
        return self

    @property
    def used(self) -> bool:
        return self.scores is not None or self.base is not None


@dataclass(frozen=True)
class Blocks:
    """Guided blocks of items and users.

    `items` float32 [items + 1, attributes], row 0 is padding; `users` float32 [users, attributes]; `keys` int64 [users]
    are the users' keys, rising.
    """

    items: Floats
    users: Floats
    keys: NDArray[np.int64]

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of attributes and of users."""
        return self.items.shape[1], len(self.users)


@dataclass(frozen=True)
class Start:
    """What a model starts from that is not drawn: `table` float32 [items + 1, width less the blocks'], and blocks."""

    table: Floats | None = None
    blocks: Blocks | None = None


def fuse(
    scores: AttributeScores | None,
    options: GuidedOptions,
    width: int,
    base: Floats | None,
    trained: NDArray[np.bool_],
    seed: int,
) -> Start:
    """The blocks of vectors of this `width` over `len(trained)` − 1 items, and the base's vectors for the columns left.

    `base` float32 [items + 1, base width]; `trained` bool [items + 1] are the items of training, on which the reduction
    is fitted. Raises UsageError if the scores leave no column, or the base has fewer dimensions than columns are left.
    """
    attributes = 0 if scores is None else len(scores.names)
    left = width - attributes
    if left < 1:
        raise UsageError(
            f"The vectors are {width} wide, and {attributes} attributes leave nothing for what is learnt.",
            "Widen them with --recommender.width, or score fewer attributes.",
        )
    table = None if base is None else reduced(base, left, trained)
    if scores is None:
        return Start(table)
    # Vectors without a base are drawn with a standard deviation of 1 / √width.
    beside = (left / width) ** 0.5 if table is None else float(np.linalg.norm(table[trained], axis=1).mean())
    return Start(table, _blocks(scores, options, len(trained), options.scale * beside, seed))


def reduced(vectors: Floats, width: int, trained: NDArray[np.bool_]) -> Floats:
    """The vectors on the first principal components of the trained items' vectors (PCA), float32 [items + 1, width].

    Row 0 is zero. Raises UsageError if `width` is larger than the vectors' width or the number of trained items.
    """
    most = min(vectors.shape[1], int(trained.sum()))
    if width > most:
        raise UsageError(
            f"The base's vectors have {most} dimensions to be reduced to {width}.",
            "Name a wider base with --recommender.guided.base, or narrow the vectors with --recommender.width.",
        )
    # Every worker imports this module and few reduce vectors, but scikit-learn takes as long to import as torch.
    from sklearn.decomposition import PCA

    components = PCA(width, svd_solver="full").fit(vectors[trained])
    found = components.transform(vectors).astype(np.float32)
    found[0] = 0
    return found


def _blocks(scores: AttributeScores, options: GuidedOptions, rows: int, length: float, seed: int) -> Blocks:
    """Blocks for `rows` rows of items, whose mean length is `length`, and for the users, scaled alike."""
    known, users = scores.normalised(options.clip)
    items = np.zeros((rows, len(scores.names)), np.float32)  # An item that was never scored stands in the middle.
    count = min(rows, len(known))
    items[:count] = known[:count]
    rng = np.random.default_rng((seed, 1))
    if options.block == "shuffled":
        items[1:] = items[1:][rng.permutation(rows - 1)]
        users = users[rng.permutation(len(users))]
    elif options.block == "random":
        items[1:] = rng.standard_normal((rows - 1, items.shape[1])).clip(-options.clip, options.clip)
        users = rng.standard_normal(users.shape).clip(-options.clip, options.clip).astype(np.float32)
    elif options.block == "none":
        items[:] = 0
    mean = float(np.linalg.norm(items[1:], axis=1).mean())
    factor = np.float32(length / mean if mean else 1.0)
    if options.users == "absent" or options.block == "none":
        return Blocks(items * factor, users[:0], scores.keys[:0])
    return Blocks(items * factor, users * factor, scores.keys)


def user_rows(known: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each of `keys` int64 [n] in the rising `known` int64 [users], and whether it is there, bool [n]."""
    places = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
    return places, known[places] == keys


def with_block(states: Tensor, block: Tensor, there: Tensor, how: Literal["added", "alone"]) -> Tensor:
    """States [n, width] with the users' blocks [n, attributes] in the last columns; `there` bool [n]: has a block."""
    attributes = block.shape[1]
    block = torch.where(there[:, None], block, 0).to(states.dtype)
    if how == "alone":
        return torch.cat([states[:, :-attributes], block], 1)
    return states + functional.pad(block, (states.shape[1] - attributes, 0))


def contributions(states: Tensor, vectors: Tensor, attributes: int) -> Tensor:
    """The parts whose sum is a score, [n, 1 + attributes]: that of the reduced columns, and that of each attribute.

    `states` and `vectors`, those of the items they are multiplied with, are [n, width] each.
    """
    products = states * vectors
    left = products.shape[1] - attributes
    return torch.cat([products[:, :left].sum(1, keepdim=True), products[:, left:]], 1)
