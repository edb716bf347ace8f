"""Training of small models on one core: Adam with early stopping on users that are not learnt from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raypipe.config import Config, shaping


class EarlyStopping(Config):
    """Options of a training with early stopping. Equal arguments and one thread give equal weights."""

    lr: float = shaping(3e-3, "of Adam", gt=0)
    batch_size: int = shaping(256, "most rows of a step", ge=1)
    epochs: int = shaping(100, "at most", ge=1)
    patience: int = shaping(5, "epochs without a better validation loss before it ends", ge=1)
    validated: float = shaping(0.1, "share of the users that end it", gt=0, lt=1)
    seed: int = shaping(0, "of weights, batches and dropout, and of who ends it")

    def split(self, users: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split rows into those to learn from and those that validate; no user is on both sides.

        `users` int64 [n] is the user of each row. Raises ValueError if there are fewer than two users.
        """
        everybody = np.unique(users)
        if len(everybody) < 2:
            raise ValueError("Some users are learnt from and others end it: rows of at least two are needed.")
        ending = np.random.default_rng(self.seed).permutation(everybody)
        validated = np.isin(users, ending[: max(1, round(self.validated * len(everybody)))])
        return np.flatnonzero(~validated), np.flatnonzero(validated)

    def run(self, model: nn.Module, loss: Callable[[NDArray[np.int64]], Tensor], users: NDArray[np.int64]) -> None:
        """Train the model in place; leave it with the weights of its best epoch, in eval mode.

        `loss` returns the mean loss over the rows it is given. `users` int64 [n] is the user of each row.
        """
        learnt, asked = self.split(users)
        optimizer = torch.optim.Adam([weights for weights in model.parameters() if weights.requires_grad], lr=self.lr)
        best, kept, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            rng = np.random.default_rng((self.seed, 1))
            for _ in range(self.epochs):
                model.train()
                for rows in _batches(rng.permutation(learnt), self.batch_size):
                    optimizer.zero_grad()
                    loss(rows).backward()
                    optimizer.step()
                model.eval()
                with torch.no_grad():
                    told = sum(float(loss(rows)) * len(rows) for rows in _batches(asked, self.batch_size)) / len(asked)
                waited += 1
                if told < best:
                    best, kept, waited = told, copy.deepcopy(model.state_dict()), 0
                if waited == self.patience:
                    break
        model.load_state_dict(kept)
        model.eval()


def _batches(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.array_split(rows, -(-len(rows) // size))
