"""Beam search with a model of transformers: the likeliest answers to each prompt, by summed log-probability.

There is no length penalty: the sum, with the end mark's, is the log-probability of exactly this answer, and candidates
are ranked by it. So a short answer may stand before a longer one whose every token is likelier. Answers that have ended
stand before those that the limit cut. The search of a prompt ends when none of its beams can overtake what it found.

A prompt is read once, and its keys and values are copied to its beams. After each token only the keys and values of the
answers change places, as the beams of a prompt differ in nothing else. The prompts of a batch start together, and those
that have ended leave it when they are half of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.engines.caches import copied, joined, reorder
from raypipe.engines.constraint import constrained, one_end
from raypipe.engines.engine import Decoding
from raypipe.engines.prefill import Prefill, SoftRows
from raypipe.language.backbone import Backbone
from raypipe.language.trie import AnswerTrie, Walk

_NOTHING = np.array([], np.int64)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer's tokens, without the end mark, and their summed log-probability, with the end mark's if it ended."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    ended: bool = False
    walk: Walk | None = None

    @property
    def chosen(self) -> tuple[int, ...]:
        """The numbers of the texts in an answer that is held to given texts."""
        return self.walk.chosen if self.walk else ()


@torch.inference_mode()
def search(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_tokens: int,
    soft: SoftRows | None = None,
    trie: AnswerTrie | None = None,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Yield the number of each prompt and at most `decoding.beams` answers, best first: none if logits are not finite.

    `prompts` are longest first. A batch holds at most `batch_tokens` tokens of prompts and answers over all beams, or
    one prompt. `soft` and `trie` are as in `decode`.
    """
    prefill = Prefill(backbone, prompts, soft)
    at = 0
    while at < len(prompts):
        tokens = decoding.beams * (len(prompts[at]) + decoding.max_new_tokens)
        numbers = range(at, min(len(prompts), at + max(1, batch_tokens // tokens)))
        batch = _Batch(backbone, decoding, prefill, numbers, trie)
        yield from batch.take_found()
        while batch.searches:
            batch.step()
            yield from batch.take_found()
        at = numbers.stop


class _Search:
    """The beams of one prompt: those that are `live`, best first, and the best of those that have `ended`."""

    def __init__(self, number: int, decoding: Decoding, trie: AnswerTrie | None) -> None:
        self.number, self.beams, self.most = number, decoding.beams, decoding.max_new_tokens
        self.live = [Hypothesis(walk=trie.start if trie else None)]
        self.ended: list[Hypothesis] = []

    def extend(self, candidates: Iterable[tuple[float, int, int]], ends: Sequence[int]) -> list[int]:
        """Go on with the best `candidates`, (log-probability, live beam, token), best first.

        Returns, for each new live beam, the number of the beam that it goes on from.
        """
        live: list[Hypothesis] = []
        parents = []
        for logprob, parent, token in candidates:
            before = self.live[parent]
            if token in ends:
                walk = before.walk.after(token) if before.walk else None
                self.ended.append(Hypothesis(before.tokens, logprob, True, walk))
            elif len(live) < self.beams:
                walk = before.walk.after(token) if before.walk else None
                live.append(Hypothesis((*before.tokens, token), logprob, False, walk))
                parents.append(parent)
        self.live = live
        self.ended = sorted(self.ended, key=lambda hypothesis: -hypothesis.logprob)[: self.beams]
        return parents

    def allowed(self, beams: int) -> list[NDArray[np.int64]]:
        """The allowed next tokens of so many `beams`, live ones first, if answers are held to given texts."""
        tokens = [hypothesis.walk.next_tokens for hypothesis in self.live if hypothesis.walk]
        return tokens + [_NOTHING] * (beams - len(tokens))

    @property
    def is_over(self) -> bool:
        if not self.live or len(self.live[0].tokens) == self.most:
            return True
        return len(self.ended) == self.beams and self.live[0].logprob <= self.ended[-1].logprob

    def found(self) -> list[Hypothesis]:
        """The answers, best first. A list that the limit cut is left out if another one holds the same whole texts."""
        found, known = list(self.ended), {hypothesis.chosen for hypothesis in self.ended}
        for hypothesis in self.live if len(self.ended) < self.beams else []:
            if hypothesis.walk is None or hypothesis.chosen not in known:
                known.add(hypothesis.chosen)
                found.append(hypothesis)
        return found[: self.beams]


class _Batch:
    """The prompts that are being searched, each with as many rows as beams, live ones first.

    At the first step each prompt has one row. Columns of the cache from `start` to `stop` hold answers. Per row:
    `scores` is the log-probability, −∞ if the row's beam is not live, `newest` the token that is yet to be read,
    `position` the place of that token in the row's text. `mask` [rows, start] is 1 where a column holds a token.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoding: Decoding,
        prefill: Prefill,
        numbers: Sequence[int],
        trie: AnswerTrie | None,
    ) -> None:
        self.model, self.device = backbone.model, backbone.device
        self.beams, self.most, self.trie = decoding.beams, decoding.max_new_tokens, trie
        self.ends = backbone.ends
        self.searches = [_Search(number, decoding, trie) for number in numbers]
        self._found: list[tuple[int, list[Hypothesis]]] = []
        parts = [prefill.read(part) for part in prefill.parts(numbers)]
        self.start = self.stop = max(part.read.shape[1] for part in parts)
        caches = [part.cache for part in parts]
        self.cache = caches[0] if len(caches) == 1 else joined(caches, self.start)
        pad = torch.nn.functional.pad
        self.mask = torch.cat([pad(part.read.long(), (self.start - part.read.shape[1], 0)) for part in parts])
        self.position = self.mask.sum(1) - 1
        self.scores = torch.zeros(len(numbers), device=self.device)
        self._choose(torch.cat([part.logits for part in parts]))

    def step(self) -> None:
        """Every row reads its newest token, and every search goes on with the likeliest."""
        self.stop += 1
        answers = self.mask.new_ones(len(self.mask), self.stop - self.start)
        logits = self.model(
            input_ids=self.newest[:, None],
            attention_mask=torch.cat([self.mask, answers], 1),
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._choose(logits)

    def take_found(self) -> list[tuple[int, list[Hypothesis]]]:
        found, self._found = self._found, []
        return found

    def _choose(self, logits: Tensor) -> None:
        """Continue every search with the likeliest pairs of beam and next token, by the logits [rows, vocabulary]."""
        logprobs = torch.log_softmax(one_end(logits.float(), torch.tensor(self.ends, device=self.device)), -1)
        beams, vocabulary = len(logits) // len(self.searches), logits.shape[1]
        if self.trie is not None:
            logprobs = constrained(logprobs, [tokens for search in self.searches for tokens in search.allowed(beams)])
        totals = (self.scores[:, None] + logprobs).view(len(self.searches), beams * vocabulary)
        # An answer that ends takes no beam's place. Among twice as many candidates, enough go on.
        most = min(2 * self.beams, beams * vocabulary)
        best = totals.topk(most)
        if best.values[:, 0].isnan().any():  # topk counts NaN as the largest: one beam's would push out all others.
            best = totals.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).topk(most)
        parents: list[list[int]] = []
        for search, values, places in zip(self.searches, best.values.tolist(), best.indices.tolist(), strict=True):
            goes_on = bool(search.live)
            candidates = zip(values, places, strict=True)
            told = [(value, *divmod(place, vocabulary)) for value, place in candidates if value > -np.inf]
            parents.append(search.extend(told, self.ends))
            if goes_on and search.is_over:
                self._found.append((search.number, search.found()))
                search.live = []
        self._keep(parents, beams)

    def _keep(self, parents: Sequence[Sequence[int]], beams: int) -> None:
        """Build the rows of the next step from those of their `parents`; this step had so many `beams` a search."""
        kept = [number for number, search in enumerate(self.searches) if search.live]
        leaving = 2 * len(kept) <= len(self.searches)
        if not leaving:
            kept = list(range(len(self.searches)))
        self.searches, searches = [self.searches[number] for number in kept], self.searches
        if not kept:
            return
        rows, newest, scores = [], [], []
        for number in kept:
            live = searches[number].live
            unused = self.beams - len(live)
            rows += [number * beams + parent for parent in [*parents[number][: len(live)], *[0] * unused]]
            newest += [hypothesis.tokens[-1] for hypothesis in live] + [0] * unused
            scores += [hypothesis.logprob for hypothesis in live] + [-np.inf] * unused
        self.newest = torch.tensor(newest, device=self.device)
        self.scores = torch.tensor(scores, device=self.device)
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        if leaving or beams == 1:
            self.mask, self.position = self.mask[chosen], self.position[chosen]
            self.cache = copied(self.cache, chosen, self.stop, self.start + self.most)
        else:
            reorder(self.cache, chosen, self.start)
        self.position = self.position + 1
