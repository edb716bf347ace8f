"""A decoding loop of our own for models of transformers: rows that have ended make room for prompts that wait.

All rows of a batch share their columns: a row's prompt ends where the batch stands when it joins, so that one mask and one
buffer of keys and values serve rows of any age. When enough rows have ended, the batch is built anew of those that have
not and of as many waiting prompts as its tokens hold; columns that no row needs any more are left behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from raypipe.engines.caches import is_plain, joined
from raypipe.engines.constraint import constrained, one_end
from raypipe.engines.engine import Decoding
from raypipe.engines.prefill import Prefill, SoftRows
from raypipe.language.backbone import Backbone
from raypipe.language.trie import AnswerTrie, Walk

# Building a batch anew copies its cache and reads new prompts at once: it waits until this share of its rows has ended.
_ENDED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens generated for prompt number `prompt`, without the end mark, and whether the model ended them.

    `chosen` are the texts of an answer that is held to given ones.
    """

    prompt: int
    tokens: list[int]
    ended: bool
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Growing:
    """The tokens generated so far for prompt number `prompt`, whose answer goes on."""

    prompt: int
    tokens: list[int]


@torch.inference_mode()
def decode(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
    batch_tokens: int,
    soft: SoftRows | None = None,
    trie: AnswerTrie | None = None,
    growing: bool = False,
) -> Iterator[Answer | Growing]:
    """Answers in the order they end; prompts, longest first, join in theirs. `seeds`, one a prompt, where it samples.
    Where `growing` is asked for, every answer is also told while it grows.

    A batch holds at most `batch_tokens` of prompts and answers, or one row. Where prompts hold more than words, `soft` says
    what is read of them; where answers are held to given ones, `trie` says to which.
    """
    waiting = deque(range(len(prompts)))
    batch = _Batch(backbone, decoding, Prefill(backbone, prompts, soft), trie)
    while waiting or len(batch.prompts):
        if batch.ended_share >= _ENDED_SHARE:
            batch.keep_live()
            joining: list[int] = []
            while waiting and batch.holds(
                len(joining) + 1, len(prompts[joining[0] if joining else waiting[0]]), batch_tokens
            ):
                joining.append(waiting.popleft())
            if joining:
                batch.join(joining, [seeds[row] for row in joining] if seeds else [])
        else:
            batch.step()
        yield from batch.take_answers()
        if growing:
            yield from batch.growing()


class _Batch:
    """Rows being answered; columns of the cache up to `stop` are filled, and every row's newest token is yet to be read.

    Per row: `prompts` its number, `live` whether it goes on, `taken` answer tokens so far, `answers` [rows, most] these
    tokens, `newest` the last of them, `position` where in its text that stands, `mask` [rows, capacity] 1 where a column
    holds one of its tokens, `draws` [rows, most] where it samples. A row's shared start and what follows it may lie apart.
    """

    def __init__(self, backbone: Backbone, decoding: Decoding, prefill: Prefill, trie: AnswerTrie | None) -> None:
        self.prefill, self.trie = prefill, trie
        self.model, self.device = backbone.model, backbone.device
        self.most, self.temperature = decoding.max_new_tokens, decoding.temperature
        self.ends = torch.tensor(backbone.ends, device=self.device)
        self.cache: DynamicCache | None = None
        self.stop = 0
        self.prompts = self.taken = self.newest = self.position = torch.zeros(0, dtype=torch.long, device=self.device)
        self.live = self.prompts.bool()
        self.answers, self.mask = self.prompts.view(0, self.most), self.prompts.view(0, 0)
        self.draws = torch.zeros(0, self.most, device=self.device)
        self._walks: dict[int, Walk] = {}  # by number of the prompt
        self._done: list[Answer] = []

    @property
    def ended_share(self) -> float:
        return 1 - int(self.live.sum()) / len(self.live) if len(self.live) else 1.0

    def holds(self, joining: int, longest: int, batch_tokens: int) -> bool:
        """Whether so many rows more, the longest of so many tokens, leave the batch within its bound."""
        rows = len(self.prompts) + joining
        if len(self.prompts) and not is_plain(self.cache):
            return False  # Caches that are no plain buffers cannot take rows of another age.
        return rows == 1 or rows * (max(self.stop, longest) + self.most) <= batch_tokens

    def keep_live(self) -> None:
        """Drop the rows that have ended, and the columns that none of the others needs."""
        kept = self.live.nonzero().squeeze(1)
        if not len(kept):
            self.cache, self.stop = None, 0
        elif is_plain(self.cache):
            first = int(self.mask[kept].argmax(1).min())
            columns = self.stop - first
            self.cache = joined(self.cache, kept, first, [], columns, columns + self.most)
            self.mask = torch.nn.functional.pad(self.mask[:, first : self.stop], (0, self.most))
            self.stop = columns
        elif self.cache is not None:
            self.cache.batch_select_indices(kept)
        for name in ("prompts", "live", "taken", "answers", "newest", "position", "mask"):
            setattr(self, name, getattr(self, name)[kept])
        if len(self.draws):
            self.draws = self.draws[kept]

    def join(self, numbers: Sequence[int], seeds: Sequence[int]) -> None:
        """Read new prompts and choose the first token of each."""
        parts = [self.prefill.read(part) for part in self.prefill.parts(numbers)]
        columns = max(self.stop, *(part.read.shape[1] for part in parts))
        if is_plain(parts[0].cache):
            everyone = torch.arange(len(self.prompts), device=self.device)
            caches = [part.cache for part in parts]
            self.cache = joined(self.cache, everyone, 0, caches, columns, columns + self.most)
        else:
            self.cache = parts[0].cache
        pad = torch.nn.functional.pad
        masks = [self.mask[:, : self.stop], *(part.read.long() for part in parts)]
        self.mask = torch.cat([pad(mask, (columns - mask.shape[1], self.most)) for mask in masks if len(mask)])
        self.stop = columns
        before, rows = len(self.prompts), len(numbers)
        zeros = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.prompts = torch.cat([self.prompts, torch.tensor(list(numbers), device=self.device)])
        self.live = torch.cat([self.live, zeros == 0])
        self.taken, self.newest = torch.cat([self.taken, zeros]), torch.cat([self.newest, zeros])
        self.answers = torch.cat([self.answers, zeros[:, None].expand(rows, self.most)])
        self.position = torch.cat([self.position, *(part.read.sum(1) - 1 for part in parts)])
        if seeds:
            self.draws = torch.cat([self.draws, _draws(seeds, self.most).to(self.device)])
        if self.trie is not None:
            self._walks.update(dict.fromkeys(numbers, self.trie.start))
        self._choose(
            torch.cat([part.logits for part in parts]), torch.arange(before, before + rows, device=self.device)
        )

    def step(self) -> None:
        """Every row reads its newest token and chooses the next."""
        self.mask[:, self.stop] = 1
        self.stop += 1
        logits = self.model(
            input_ids=self.newest[:, None],
            attention_mask=self.mask[:, : self.stop],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._choose(logits, torch.arange(len(self.prompts), device=self.device))

    def take_answers(self) -> list[Answer]:
        done, self._done = self._done, []
        return done

    def growing(self) -> Iterator[Growing]:
        rows = self.live.nonzero().squeeze(1)
        told = zip(self.prompts[rows].tolist(), self.taken[rows].tolist(), self.answers[rows].tolist(), strict=True)
        return (Growing(prompt, tokens[:taken]) for prompt, taken, tokens in told)

    def _choose(self, logits: Tensor, rows: Tensor) -> None:
        """The next token of `rows`, of which logits [rows, vocabulary] are; who ends is done."""
        at = self.taken[rows].clamp(max=self.most - 1)
        draws = self.draws[rows, at] if len(self.draws) else None
        if self.trie is not None:
            walks = [self._walks[number] for number in self.prompts[rows].tolist()]
            logits = constrained(one_end(logits, self.ends), [walk.next_tokens for walk in walks])
        chosen = _chosen(logits, self.temperature, draws)
        if self.trie is not None:
            self._follow(rows[self.live[rows]], chosen[self.live[rows]])
        stops = torch.isin(chosen, self.ends)
        goes_on = self.live[rows] & ~stops
        writing = rows[goes_on]
        self.answers[writing, self.taken[writing]] = chosen[goes_on]
        self.taken[writing] += 1
        self.newest[rows] = chosen
        # A row that has ended is still read, and a model may have no more positions than its context.
        self.position[writing] += 1
        done = self.live[rows] & (stops | (self.taken[rows] >= self.most))
        if done.any():
            ended = rows[done]
            self.live[ended] = False
            told = zip(self.prompts[ended].tolist(), self.taken[ended].tolist(), stops[done].tolist(), strict=True)
            for (number, taken, stopped), tokens in zip(told, self.answers[ended].tolist(), strict=True):
                walk = self._walks.get(number)
                self._done.append(Answer(number, tokens[:taken], stopped, walk.chosen if walk else ()))

    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        for number, token in zip(self.prompts[rows].tolist(), chosen.tolist(), strict=True):
            self._walks[number] = self._walks[number].after(token)


def _chosen(logits: Tensor, temperature: float, draws: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the one at quantile `draws` of the tempered distribution."""
    if draws is None:
        return logits.argmax(-1)
    # float64, so that the sum over a large vocabulary does not depend on how it is split.
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    quantiles = draws.unsqueeze(1).double() * cumulative[:, -1:]
    # On the right of it, so that no token of probability 0 is ever drawn.
    return torch.searchsorted(cumulative, quantiles, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _draws(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers [rows, count], each row from its own seed."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
