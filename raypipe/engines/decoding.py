"""A decoding loop of our own for models of transformers: rows that have ended make room for prompts that wait.

All rows of a batch share their columns: a row's prompt ends at the column where the batch stands when the row joins, so
that one mask and one buffer of keys and values serve rows of any age. When rows end, other rows move into their places,
and waiting prompts take the places that are left. When all columns of a buffer are filled, those that are still needed
are copied to the beginning of another buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from raypipe.engines.caches import Slots, is_plain
from raypipe.engines.constraint import constrained, one_end
from raypipe.engines.engine import Decoding
from raypipe.engines.prefill import Prefill, Read, SoftRows
from raypipe.language.backbone import Backbone
from raypipe.language.trie import AnswerTrie, Walk

# Rows that have ended stay in the batch until they are this share of it: prompts are best read several at once.
_ENDED_SHARE = 0.125
# The same for caches that are no plain buffers, which are copied whole when rows leave.
_ENDED_SHARE_COPIED = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens generated for prompt number `prompt`, without the end mark, and whether the model ended them.

    `chosen` are the numbers of its texts if the answer is held to given texts. `broken`: the model's logits for the
    next token were not finite.
    """

    prompt: int
    tokens: list[int]
    ended: bool
    chosen: tuple[int, ...] = ()
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Growing:
    """The tokens generated so far for prompt number `prompt`, whose answer has not ended."""

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
    """Yield answers in the order in which they end; with `growing`, also yield every answer while it grows.

    `prompts` are token ids, longest first, and join in this order. `seeds` are one per prompt if the decoding samples,
    else empty. A batch holds at most `batch_tokens` tokens of prompts and answers, or one row. `soft` says what is read
    of prompts that hold more than words; `trie` says which texts answers are held to.
    """
    waiting = deque(range(len(prompts)))
    batch = _Batch(backbone, decoding, batch_tokens, Prefill(backbone, prompts, soft), trie)
    while waiting or len(batch.prompts):
        longest = len(prompts[waiting[0]]) if waiting else 0
        batch.make_room(len(waiting), longest)
        joining = [waiting.popleft() for _ in range(batch.seats(len(waiting), longest))]
        if joining:
            batch.join(joining, [seeds[row] for row in joining] if seeds else [])
        elif len(batch.prompts):
            batch.step()
        yield from batch.take_answers()
        if growing:
            yield from batch.growing()


class _Batch:
    """The rows that are being answered; others may join up to `most_rows`.

    Columns of the cache up to `stop` are filled, and every row's newest token is yet to be read. Per row: `prompts` is
    its number, `live` whether it goes on, `taken` how many answer tokens it has, `answers` [rows, most] these tokens,
    `newest` the last of them, `position` the place of that in the row's text, `draws` [rows, most] its random numbers
    if the decoding samples. `mask` [places, columns] is 1 where a column holds a token of the row in that place. No row
    needs a column before `first`. A row's shared start and what follows it may lie apart.
    """

    def __init__(
        self, backbone: Backbone, decoding: Decoding, batch_tokens: int, prefill: Prefill, trie: AnswerTrie | None
    ) -> None:
        self.prefill, self.trie = prefill, trie
        self.model, self.device = backbone.model, backbone.device
        self.most, self.temperature, self.batch_tokens = decoding.max_new_tokens, decoding.temperature, batch_tokens
        self.ends = torch.tensor(backbone.ends, device=self.device)
        self.cache: DynamicCache | None = None
        self.first = self.stop = self.most_rows = 0
        self.prompts = self.taken = self.newest = self.position = torch.zeros(0, dtype=torch.long, device=self.device)
        self.live = self.prompts.bool()
        self.answers, self.mask = self.prompts.view(0, self.most), self.prompts.view(0, 0)
        self.draws = torch.zeros(0, self.most, device=self.device)
        self._walks: dict[int, Walk] = {}  # by number of the prompt
        self._done: list[Answer] = []

    def make_room(self, waiting: int, longest: int) -> None:
        """Drop the rows that have ended if they are many. If all columns are filled, move to other buffers.

        These have places for as many of the `waiting` prompts as the batch may hold; the longest has `longest` tokens.
        """
        live = int(self.live.sum())
        in_place = isinstance(self.cache, Slots)
        full = in_place and self.stop == self.mask.shape[1]
        share = _ENDED_SHARE if in_place else _ENDED_SHARE_COPIED
        if full or len(self.live) - live >= max(1, share * len(self.live)):
            self._keep_live()
        if full and live:
            columns = max(self.stop - self.first, longest)
            self.most_rows = self._rows_of(columns)
            self._settle(max(live, min(live + waiting, self.most_rows)), columns)

    def seats(self, waiting: int, longest: int) -> int:
        """How many of the `waiting` prompts, of which the longest has `longest` tokens, may join."""
        if not len(self.prompts):
            self.most_rows = self._rows_of(longest)
        elif not isinstance(self.cache, Slots):
            return 0  # Only plain buffers can take rows of another age.
        return max(0, min(waiting, self.most_rows - len(self.prompts)))

    def _rows_of(self, columns: int) -> int:
        """How many rows, each of so many `columns` and an answer, a batch may hold."""
        return max(1, self.batch_tokens // (columns + self.most))

    def _keep_live(self) -> None:
        """Drop the rows that have ended: live rows from the end of the batch take their places."""
        live = self.live.nonzero().squeeze(1)
        ended = (~self.live[: len(live)]).nonzero().squeeze(1)
        movers = live[len(live) - len(ended) :]
        kept = torch.arange(len(live), device=self.device)
        kept[ended] = movers
        if not len(kept):
            self.cache = None
        elif isinstance(self.cache, Slots):
            self.cache.move(movers, ended)
        elif self.cache is not None:
            self.cache.batch_select_indices(kept)
        self.mask[ended] = self.mask[movers]
        for name in ("prompts", "live", "taken", "answers", "newest", "position"):
            setattr(self, name, getattr(self, name)[kept])
        if len(self.draws):
            self.draws = self.draws[kept]
        self._show()

    def _show(self) -> None:
        """Hide the columns that no row needs any more."""
        if isinstance(self.cache, Slots) and (rows := len(self.prompts)):
            self.first = int(self.mask[:rows, : self.stop].argmax(1).min())
            self.cache.show(rows, self.first, self.stop)

    def _settle(self, places: int, columns: int) -> None:
        """Move to buffers with so many `places`, in which all rows end at column `columns`."""
        rows, needed = len(self.prompts), self.stop - self.first
        room = self.most if places == 1 else max(1, min(self.most, self.batch_tokens // places - columns))
        if isinstance(self.cache, Slots):
            self.cache.settle(places, columns + room, columns)
        elif self.cache is not None:
            self.cache = Slots(self.cache, places, columns + room)
        mask = self.mask.new_zeros(places, columns + room)
        mask[:rows, columns - needed : columns] = self.mask[:rows, self.first : self.stop]
        self.mask, self.stop = mask, columns
        self._show()

    def join(self, numbers: Sequence[int], seeds: Sequence[int]) -> None:
        """Read new prompts and choose the first token of each."""
        parts = [self.prefill.read(part) for part in self.prefill.parts(numbers)]
        before, rows = len(self.prompts), len(numbers)
        columns = max(part.read.shape[1] for part in parts)
        if not before:
            self._begin(parts, rows, columns)
        elif columns > self.stop:
            self._settle(len(self.mask), columns)
        row = before
        for part in parts:
            there = self.mask[row : row + len(part.read)]
            there[:] = 0
            there[:, self.stop - part.read.shape[1] : self.stop] = part.read
            if isinstance(self.cache, Slots):
                self.cache.put(part.cache, row, self.stop)
            row += len(part.read)
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
        self._show()
        self._choose(
            torch.cat([part.logits for part in parts]), torch.arange(before, before + rows, device=self.device)
        )

    def _begin(self, parts: Sequence[Read], rows: int, columns: int) -> None:
        """Begin a batch in which there are no other rows."""
        self.first, self.stop, self.cache = 0, 0, parts[0].cache
        if is_plain(self.cache):
            self._settle(rows, columns)
        else:
            self.mask, self.stop = self.mask.new_zeros(rows, columns + self.most), columns

    def step(self) -> None:
        """Every row reads its newest token and chooses the next."""
        rows = len(self.prompts)
        self.mask[:rows, self.stop] = 1
        self.stop += 1
        logits = self.model(
            input_ids=self.newest[:, None],
            attention_mask=self.mask[:rows, self.first : self.stop],
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._choose(logits, torch.arange(rows, device=self.device))

    def take_answers(self) -> list[Answer]:
        done, self._done = self._done, []
        return done

    def growing(self) -> Iterator[Growing]:
        rows = self.live.nonzero().squeeze(1)
        told = zip(self.prompts[rows].tolist(), self.taken[rows].tolist(), self.answers[rows].tolist(), strict=True)
        return (Growing(prompt, tokens[:taken]) for prompt, taken, tokens in told)

    def _choose(self, logits: Tensor, rows: Tensor) -> None:
        """Choose the next token of `rows` by their logits [rows, vocabulary]. A row that ends becomes an answer."""
        at = self.taken[rows].clamp(max=self.most - 1)
        draws = self.draws[rows, at] if len(self.draws) else None
        if self.trie is not None:
            walks = [self._walks[number] for number in self.prompts[rows].tolist()]
            logits = constrained(one_end(logits, self.ends), [walk.next_tokens for walk in walks])
        chosen, finite = _chosen(logits, self.temperature, draws)
        if self.trie is not None:
            follows = self.live[rows] & finite
            self._follow(rows[follows], chosen[follows])
        stops = torch.isin(chosen, self.ends)
        goes_on = self.live[rows] & ~stops & finite
        writing = rows[goes_on]
        self.answers[writing, self.taken[writing]] = chosen[goes_on]
        self.taken[writing] += 1
        self.newest[rows] = chosen
        # Rows that have ended are still read, but keep their position: a model may have none beyond its context.
        self.position[writing] += 1
        done = self.live[rows] & (stops | ~finite | (self.taken[rows] >= self.most))
        if done.any():
            ended = rows[done]
            self.live[ended] = False
            columns = (self.prompts[ended], self.taken[ended], stops[done], ~finite[done], self.answers[ended])
            for number, taken, stopped, broken, tokens in zip(*(each.tolist() for each in columns), strict=True):
                walk = self._walks.get(number)
                self._done.append(Answer(number, tokens[:taken], stopped, walk.chosen if walk else (), broken))

    def _follow(self, rows: Tensor, chosen: Tensor) -> None:
        for number, token in zip(self.prompts[rows].tolist(), chosen.tolist(), strict=True):
            self._walks[number] = self._walks[number].after(token)


def _chosen(logits: Tensor, temperature: float, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token of each row, and whether there is one: there is none if the logits are not finite.

    The token is the likeliest, or with `draws` the one at that quantile of the tempered distribution.
    """
    if draws is None:
        best, chosen = logits.max(-1)
        return chosen, best.isfinite()
    # float64, so that the sum over a large vocabulary does not depend on how it is split.
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    quantiles = draws.unsqueeze(1).double() * cumulative[:, -1:]
    # Search to the right of the quantile, so that no token of probability 0 is ever drawn.
    chosen = torch.searchsorted(cumulative, quantiles, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return chosen, cumulative[:, -1].isfinite()


def _draws(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers [rows, count], each row from its own seed."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
