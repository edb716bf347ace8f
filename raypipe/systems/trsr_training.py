"""Training and validation of a ranker that answers yes or no (LLM-TRSR, section 4): the epoch that ranks best is kept.

Beside what `prepare_alignment` writes, the folder holds `validation.npz` if there is validation. It holds the tokens of
all prompts one after the other and where each ends, the same of the answers, and the place of the next item among each
user's candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raypipe.data.candidates import ranks_at
from raypipe.engines.scoring import score
from raypipe.language.alignment import AlignmentTask
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import SoftPromptLm
from raypipe.language.trie import answer_tokens
from raypipe.metrics.ranking import candidate_metrics

_FILE = "validation.npz"
_BATCH_TOKENS = 32_768
_SHOWN = 4  # examples that are described of a batch whose loss is not a number
_CHARACTERS = 200


def prepare_validation(
    folder: Path,
    asked: Iterable[Sequence[Prompt]],
    places: NDArray[np.int64],
    tokenizer: PromptTokenizer,
    answers: Sequence[str],
    context: int,
) -> int:
    """Write the prompts of each user's candidates, and the places of the candidates that came next.

    Call it before `prepare_alignment`, whose marker says that everything is there. A user is left out if one of the
    prompts is longer than `context` with its answer. Returns how many users are left out. Raises ValueError if no user
    remains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    endings = answer_tokens(tokenizer, answers)
    room = context - max(map(len, endings))
    ids: list[Sequence[int]] = []
    kept: list[int] = []
    for place, prompts in zip(places.tolist(), asked, strict=True):
        mine = tokenizer.encode([prompt.text for prompt in prompts])
        if max(map(len, mine)) <= room:
            ids += mine
            kept.append(place)
    if not kept:
        raise ValueError(f"Of {len(places):,} users who validate nobody's prompts fit the context of {context} tokens.")
    np.savez(
        folder / _FILE,
        tokens=np.concatenate([np.asarray(mine, np.int32) for mine in ids]),
        ends=np.cumsum([len(mine) for mine in ids]),
        answers=np.concatenate(endings),
        answer_ends=np.cumsum([len(ending) for ending in endings]),
        places=np.array(kept),
    )
    return len(places) - len(kept)


class RankingTask(AlignmentTask):
    """An `AlignmentTask` validated by the mean of Recall@3 + Recall@5 + Recall@10; implements `ValidatedTask`."""

    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        assert isinstance(module, SoftPromptLm)
        told = self._validation
        bounds = np.concatenate([[0], told["ends"]])
        places = told["places"]
        count = len(told["ends"]) // len(places)
        mine = np.arange(len(places))[rank::world]
        numbers = (mine[:, None] * count + np.arange(count)).ravel()
        prompts = [told["tokens"][bounds[n] : bounds[n + 1]].tolist() for n in numbers.tolist()]
        backbone = replace(self._backbone, model=module.lm, device=module.lm.device)
        answers = [mine.tolist() for mine in np.split(told["answers"], told["answer_ends"][:-1])]
        scores = np.zeros(len(prompts))
        for number, logprobs in score(backbone, prompts, [answers] * len(prompts), _BATCH_TOKENS):
            scores[number] = logprobs[0] - logprobs[1]
        table = scores.reshape(-1, count)
        metrics = candidate_metrics(*ranks_at(table, places[mine]))
        return float(sum(values.sum() for name, values in metrics.items() if name.startswith("Recall"))), float(
            len(mine)
        )

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        """The beginnings of the batch's texts."""
        texts = self._backbone.decode(self.batch(step, seed, 0, 1, batch_size)["tokens"][:_SHOWN].tolist())
        return "; ".join(repr(text[:_CHARACTERS]) for text in texts)

    @cached_property
    def _validation(self) -> dict[str, NDArray[Any]]:
        # All arrays at once: an open archive reads an array anew at each access.
        with np.load(self.folder / _FILE) as told:
            return dict(told)
