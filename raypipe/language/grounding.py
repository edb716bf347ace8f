"""Grounding: mapping what a language model wrote to the item of nearest text (LANCER, arXiv 2309.10435, section 4.4).

Written and catalogue texts are embedded as the maximum, in each dimension, over the model's own input embeddings of
their tokens, and compared by cosine. Every written text gets an item, so two values tell how much of that is a guess:
`margin` and `exact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.language.backbone import Backbone
from raypipe.language.trie import answer_tokens

_AT_ONCE = 1024


@dataclass(frozen=True)
class Grounded:
    """Results for n answers.

    `nearest` int64 [n] is the number of the nearest text, `margin` float32 [n] is by how much its cosine exceeds the
    second nearest's, `exact` bool [n] is whether the answer is exactly one of the texts.
    """

    nearest: NDArray[np.int64]
    margin: NDArray[np.float32]
    exact: NDArray[np.bool_]


class Grounding:
    """The texts of a catalogue as a language model embeds them. Of equal texts, the first is the nearest."""

    def __init__(self, backbone: Backbone, texts: Sequence[str]) -> None:
        lm: Any = backbone.model
        self.backbone, self.weights = backbone, lm.get_input_embeddings().weight.detach()
        self._number = {text: number for number, text in reversed(list(enumerate(texts)))}
        self.table = self._embedded(texts)

    @torch.inference_mode()
    def ground(self, answers: Sequence[str]) -> Grounded:
        """Ground answers as they were written. A blank answer has no nearest text: −1, with a margin of 0."""
        nearest = np.zeros(len(answers), np.int64)
        margin = np.zeros(len(answers), np.float32)
        exact = np.array([self._number.get(answer, -1) for answer in answers], np.int64)
        for start in range(0, len(answers), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            cosines = self._embedded(answers[part]) @ self.table.T
            best = cosines.topk(min(2, cosines.shape[1]), dim=1)
            # topk takes NaN for the largest: a text with NaN would be the nearest to every answer.
            if best.values[:, 0].isnan().any():
                best = cosines.nan_to_num_(nan=-2).topk(min(2, cosines.shape[1]), dim=1)
            # Of equal cosines the first text is taken, which topk does not promise.
            nearest[part] = (cosines == best.values[:, :1]).int().argmax(1).cpu().numpy()
            margin[part] = (best.values[:, 0] - best.values[:, -1]).float().cpu().numpy()
        written = np.array([bool(answer.strip()) for answer in answers], bool)
        # A text with the same words in another order is as near, so an answer that is exactly a text is that text.
        nearest = np.where(exact >= 0, exact, np.where(written, nearest, -1))
        return Grounded(nearest, np.where(written, margin, 0).astype(np.float32), exact >= 0)

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [texts, hidden] of length 1; 0 for a text without tokens."""
        ids = answer_tokens(self.backbone, texts)
        device, width = self.weights.device, self.weights.shape[1]
        flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long, device=device)
        rows = torch.repeat_interleave(torch.tensor([len(mine) for mine in ids], dtype=torch.long)).to(device)
        found = torch.zeros(len(texts), width, device=device)
        owners = rows[:, None].expand(-1, width)
        found.scatter_reduce_(0, owners, self.weights[flat].float(), "amax", include_self=False)
        return torch.nn.functional.normalize(found, dim=1)
