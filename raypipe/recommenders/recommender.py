"""The base of every recommender: prefixes in, one state per prefix, one score per state and item."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from raypipe.recommenders.guided import GuidedOptions, user_rows, with_block
from raypipe.recommenders.losses import (
    LossConfig,
    bce_loss,
    gbce_loss,
    sampled_softmax_loss,
    softmax_loss,
)
from raypipe.recommenders.sequences import Sequences


class Recommender(nn.Module):
    """Base of the models: an item table, states of prefixes, inner-product scores, and next-item training.

    A subclass implements `encode_all` if the state of a position depends only on it and the positions before it, else
    `encode` and `loss`. The state of a prefix longer than `max_length` is that of its last `max_length` items.
    """

    causal: ClassVar[bool] = True
    queries_are_items: ClassVar[bool] = False  # queries are vectors in the items' space, of items that need not exist
    samples: ClassVar[bool] = False  # its queries depend on seeds
    # Only guided models have these: float [items + 1, attributes], float [users, attributes], int64 [users].
    item_block: Tensor
    user_block: Tensor
    user_keys: Tensor

    def __init__(self, items: int, width: int, max_length: int, loss: LossConfig) -> None:
        super().__init__()
        self.items, self.width, self.max_length = items, width, max_length
        self.loss_config = loss
        self.table = nn.Parameter(torch.empty(items + 1, width))
        nn.init.normal_(self.table, std=width**-0.5)
        with torch.no_grad():
            self.table[0] = 0
        self.guided: GuidedOptions | None = None

    def guide(self, attributes: int, users: int, options: GuidedOptions) -> None:
        """Turn the last columns of all vectors into guided blocks, with room for so many users' blocks, all zeros."""
        self.guided = options
        self.table = nn.Parameter(self.table.detach()[:, : self.width - attributes].clone())
        blocks = {"item_block": (self.items + 1, options.items), "user_block": (users, options.users)}
        for name, (rows, kind) in blocks.items():
            block = torch.zeros(rows, attributes)
            if kind == "trained" and rows:
                self.register_parameter(name, nn.Parameter(block))
            else:
                self.register_buffer(name, block)
        self.register_buffer("user_keys", torch.zeros(users, dtype=torch.int64))

    def vectors(self, items: Tensor) -> Tensor:
        """The vectors of items int64 […], [..., width]."""
        vectors = functional.embedding(items, self.table)
        if self.guided is None:
            return vectors
        return torch.cat([vectors, functional.embedding(items, self.item_block).to(vectors.dtype)], -1)

    def personal(self, states: Tensor, users: Tensor | None) -> Tensor:
        """States [n, width] with the guided blocks of their users, where there are any; `users` are keys, int64 [n]."""
        if self.guided is None or users is None or not len(self.user_keys):
            return states
        places, there = user_rows(self.user_keys, users)
        return with_block(states, functional.embedding(places, self.user_block), there, self.guided.states)

    def encode_all(self, sequences: Sequences) -> Tensor:
        """The state at every position, [positions, width]: the state of the prefix that ends there."""
        raise NotImplementedError(f"{type(self).__name__} has one state per prefix; encode every prefix by itself")

    def encode(self, prefixes: Sequences) -> Tensor:
        """The state of each prefix, [batch, width]. It sees nothing but the prefix."""
        recent = prefixes.tail(self.max_length)
        return recent.last(self.encode_all(recent))

    def item_states(self) -> Tensor:
        """The vectors of all items, [items + 1, width]; row 0 is padding."""
        return self.table if self.guided is None else torch.cat([self.table, self.item_block.to(self.table.dtype)], 1)

    def queries(self, states: Tensor, seeds: Tensor | None = None) -> Tensor:
        """What item states are multiplied with, [batch, width]: the states themselves, unless a model overrides this.

        `seeds` int64 [batch], one per user, are for a model that samples.
        """
        return states

    def score(self, states: Tensor, items: slice | Tensor | None = None) -> Tensor:
        """The scores [batch, items + 1], or the columns of `items` alone; higher is better. Column 0 has no meaning."""
        table = self.item_states()
        return self.queries(states) @ (table if items is None else table[items]).T

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean next-item loss.

        `items` and `targets` int64 [positions], `lengths` int64 [batch]. `count`, by which the sum is divided, is the
        number of positions of all workers divided by the number of workers. `negatives` and `expected` are as the loss
        takes them; `users` as in `Sequences`.
        """
        states = self.encode_all(Sequences.of_batch(batch))
        return self.next_item_loss(states, batch["targets"], batch)

    def next_item_loss(self, states: Tensor, targets: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The configured loss of states [positions, width] against the items that came next, divided by `count`."""
        table, config = self.item_states(), self.loss_config
        if config.kind == "softmax":
            total = softmax_loss(states, table, targets)
        elif config.kind == "sampled_softmax":
            total = sampled_softmax_loss(states, table, targets, batch["negatives"], batch["expected"])
        elif config.kind == "gbce":
            total = gbce_loss(states, table, targets, batch["negatives"], config.calibration)
        else:
            total = bce_loss(states, table, targets, batch["negatives"])
        return total / batch["count"]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss(batch)


def freeze(model: Recommender) -> Recommender:
    """Put the model into eval mode for good, and without gradients: it is the target of an alignment."""
    model.eval().requires_grad_(False)
    model.train = _refuse_training  # type: ignore[method-assign]
    return model


def weights_hash(model: nn.Module) -> str:
    """A hash of every weight's bytes, to show that a frozen model has not changed."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + b"\0" + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:32]


def _refuse_training(mode: bool = True) -> Any:
    if mode:
        raise RuntimeError("This recommender is frozen: it is a target, and stays in eval mode.")
