"""Reading attribute scores from a language model, and measuring how well the scores alone recommend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raypipe.engines.engine import Decoding, Engine
from raypipe.language.backbone import Backbone
from raypipe.language.number_slots import NumberForm, expected_numbers
from raypipe.language.prompt import Prompt
from raypipe.metrics.ranking import hit_rate, ndcg
from raypipe.recommenders.attribute_scores import AttributeScores
from raypipe.recommenders.scoring import ranks_among
from raypipe.systems.guided import Rating, too_long

_CUTOFF = 10
_CLIP = 3.0
CONTROL = "shuffled users"


class RatingPrompts:
    """The questions of a rating, tokenised and sized for one language model."""

    def __init__(self, rating: Rating, backbone: Backbone) -> None:
        self.rating, self.backbone = rating, backbone
        self.form = NumberForm.of(backbone, rating.words, rating.config.top, backbone.ends[0])
        self.room = backbone.context - self.form.longest
        self._lines = rating.short_lines()

    def of_items(self) -> list[Prompt]:
        """The questions about all items, in order of index."""
        return [self.rating.item_prompt(line) for line in self.rating.item_lines()]

    def of_users(self, histories: Sequence[Sequence[int]]) -> list[Prompt]:
        """The questions about the users of `histories`. Raises UsageError if no item fits the model's context."""
        return self.rating.user_prompts(self.backbone, histories, self._lines, self.room)

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of questions. Raises UsageError if a question leaves no room for its answer."""
        found = self.backbone.encode([prompt.text for prompt in prompts])
        if max(map(len, found), default=0) > self.room:
            raise too_long(self.room)
        return found


@torch.inference_mode()
def read_expected(
    lm: Any, form: NumberForm, questions: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield the numbers that a causal language model expects after each question, batch by batch.

    `questions` are token ids. Each yield is the indices of some questions, int64 [n], and their numbers, float32 [n,
    slots]. Questions of similar length share a batch of at most `batch_tokens` tokens; a longer question is a batch by
    itself.
    """
    order = np.argsort([len(question) for question in questions], kind="stable")
    at = 0
    while at < len(order):
        # Questions come by rising length: the batch takes as many as fit when padded to its last, the longest.
        lengths = np.array([len(questions[place]) for place in order[at : at + batch_tokens]]) + form.longest
        size = max(1, int(np.searchsorted(lengths * np.arange(1, len(lengths) + 1), batch_tokens, side="right")))
        chosen = order[at : at + size]
        batch = form.collate([questions[place] for place in chosen], form.middle(len(chosen)))
        told = expected_numbers(lm, form, {name: values.to(lm.device) for name, values in batch.items()})
        yield chosen, told.numbers.float().cpu().numpy()
        at += size


@dataclass
class ParseCounts:
    """Counts of parsed answers.

    `answers` is how many there were, `unparsed` how many gave no score at all, with `reasons` saying why, and `missing`
    how many scores the other answers lacked.
    """

    answers: int = 0
    unparsed: int = 0
    missing: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def read_written(
    engine: Engine, rating: Rating, questions: Sequence[Prompt], most_tokens: int, written: ParseCounts
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield as `read_expected` does, but parse the JSON that an engine writes; a missing score is NaN.

    Adds the answers and what could not be read of them to `written`.
    """
    for outcome in engine.generate(questions, Decoding(max_new_tokens=most_tokens)):
        scores = rating.parsed(outcome.text)
        written.answers += 1
        missing = int(np.isnan(scores).sum())
        if missing == len(scores):
            written.unparsed += 1
            cut = "unended" if outcome.finish_reason == "length" else "malformed"
            written.reasons[cut if outcome.error is None else outcome.error.kind] += 1
        else:
            written.missing += missing
        yield np.array([outcome.index]), scores[None]


def ranking_of_scores(
    scores: AttributeScores, users: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, float]:
    """HR@10 and NDCG@10 of what users chose next, ranking all items by the dot products of normalised scores.

    `users` [n, attributes] are the users' scores, `targets` int64 [n] the items they chose next. Beside these figures
    stand a control, in which each user is asked with the next user's scores (if there is more than one), and HR@10 at
    chance.
    """
    asked = AttributeScores(scores.names, scores.items, users, np.arange(len(users)), scores.catalogue)
    items, mine = asked.normalised(_CLIP)
    found: dict[str, float] = {"asked": len(users)}
    for shift, prefix in enumerate(("", f"{CONTROL}: ")[: len(users)]):
        table = torch.from_numpy(np.roll(mine, shift, 0) @ items.T)
        above, same = (counts.numpy() for counts in ranks_among(table, torch.from_numpy(targets)))
        found[f"{prefix}scores HR@{_CUTOFF}"] = round(float(hit_rate(above, same, _CUTOFF).mean()), 4)
        found[f"{prefix}scores NDCG@{_CUTOFF}"] = round(float(ndcg(above, same, _CUTOFF).mean()), 4)
    found[f"chance: scores HR@{_CUTOFF}"] = round(min(1.0, _CUTOFF / (len(items) - 1)), 4)
    return found
