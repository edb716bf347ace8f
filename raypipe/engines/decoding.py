"""A decoding loop of our own for models of transformers: rows that have ended make room for prompts that wait.

All rows of a batch share their columns: a row's prompt ends where the batch stands when it joins, so that one mask and one
buffer of keys and values serve rows of any age. When enough rows have ended, the batch is built anew of those that have
not and of as many waiting prompts as its tokens hold; columns that no row needs any more are left behind. What all prompts
begin with is read once, and its keys and values are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from raypipe.engines.engine import Decoding
from raypipe.language.backbone import Backbone

# Building a batch anew copies its cache and reads new prompts at once: it waits until this share of its rows has ended.
_ENDED_SHARE = 0.5
_FEW_TOKENS = 8  # Copying the keys and values of fewer is not worth its while.
# A CPU reads prompts in pieces whose activations stay in its caches: 1.7 times as fast as 30,000 tokens at once (measured).
_CPU_READ_TOKENS = 3000


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens generated for prompt number `prompt`, without the end mark, and whether the model ended them."""

    prompt: int
    tokens: list[int]
    ended: bool


@torch.inference_mode()
def decode(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int],
    batch_tokens: int,
    soft: SoftRows | None = None,
) -> Iterator[Answer]:
    """Answers in the order they end; prompts, longest first, join in theirs. `seeds`, one a prompt, where it samples.

    A batch holds at most `batch_tokens` of prompts and answers, or one row. Where prompts hold more than words, `soft` says
    what is read of them.
    """
    waiting = deque(range(len(prompts)))
    shared = shared_start([prompt[: soft.most_shared] for prompt in prompts] if soft else prompts)
    batch = _Batch(backbone, decoding, shared, soft)
    while waiting or len(batch.prompts):
        if batch.ended_share >= _ENDED_SHARE:
            batch.keep_live()
            joining: list[int] = []
            while waiting and batch.holds(
                len(joining) + 1, len(prompts[joining[0] if joining else waiting[0]]), batch_tokens
            ):
                joining.append(waiting.popleft())
            if joining:
                batch.join(joining, [prompts[row] for row in joining], [seeds[row] for row in joining] if seeds else [])
        else:
            batch.step()
        yield from batch.take_answers()


class SoftRows(Protocol):
    """Prompts in which vectors stand at some places."""

    most_shared: int
    """Tokens before the first such place of any prompt."""

    def embed(self, numbers: Sequence[int]) -> Tensor:
        """What the model reads of the prompts of these numbers, [rows, longest, hidden], padded on the left."""
        ...


def shared_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, none where they are few; at least one of each prompt is left."""
    if len(prompts) < 2:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # In their order these two differ first.
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(map(len, prompts)) - 1)
    return first[:length] if length >= _FEW_TOKENS else []


@dataclass(frozen=True, slots=True)
class _Read:
    """Prompts that were read: their cache, bool [rows, longest] where it holds a token, and the last position's logits."""

    cache: DynamicCache
    read: Tensor
    logits: Tensor


class _Batch:
    """Rows being answered; columns of the cache up to `stop` are filled, and every row's newest token is yet to be read.

    Per row: `prompts` its number, `live` whether it goes on, `taken` answer tokens so far, `answers` [rows, most] these
    tokens, `newest` the last of them, `position` where in its text that stands, `mask` [rows, capacity] 1 where a column
    holds one of its tokens, `draws` [rows, most] where it samples. A row's shared start and what follows it may lie apart.
    """

    def __init__(
        self, backbone: Backbone, decoding: Decoding, shared: Sequence[int], soft: SoftRows | None = None
    ) -> None:
        self.soft = soft
        self.model, self.device = backbone.model, backbone.device
        self.most, self.temperature = decoding.max_new_tokens, decoding.temperature
        self.ends = torch.tensor(backbone.ends, device=self.device)
        self.cache: DynamicCache | None = None
        self.stop = 0
        self.prompts = self.taken = self.newest = self.position = torch.zeros(0, dtype=torch.long, device=self.device)
        self.live = self.prompts.bool()
        self.answers, self.mask = self.prompts.view(0, self.most), self.prompts.view(0, 0)
        self.draws = torch.zeros(0, self.most, device=self.device)
        self._done: list[Answer] = []
        self._shared: DynamicCache | None = None
        self._shared_tokens = 0
        if shared:
            cache = _cache(self.model, len(shared))
            if _is_plain(cache):
                self.model(
                    input_ids=torch.tensor([shared], device=self.device), past_key_values=cache, logits_to_keep=1
                )
                self._shared, self._shared_tokens = cache, len(shared)

    @property
    def ended_share(self) -> float:
        return 1 - int(self.live.sum()) / len(self.live) if len(self.live) else 1.0

    def holds(self, joining: int, longest: int, batch_tokens: int) -> bool:
        """Whether so many rows more, the longest of so many tokens, leave the batch within its bound."""
        rows = len(self.prompts) + joining
        if len(self.prompts) and not _is_plain(self.cache):
            return False  # Caches that are no plain buffers cannot take rows of another age.
        return rows == 1 or rows * (max(self.stop, longest) + self.most) <= batch_tokens

    def keep_live(self) -> None:
        """Drop the rows that have ended, and the columns that none of the others needs."""
        kept = self.live.nonzero().squeeze(1)
        if not len(kept):
            self.cache, self.stop = None, 0
        elif _is_plain(self.cache):
            first = int(self.mask[kept].argmax(1).min())
            columns = self.stop - first
            self.cache = _joined(self.cache, kept, first, [], columns, columns + self.most)
            self.mask = torch.nn.functional.pad(self.mask[:, first : self.stop], (0, self.most))
            self.stop = columns
        elif self.cache is not None:
            self.cache.batch_select_indices(kept)
        for name in ("prompts", "live", "taken", "answers", "newest", "position", "mask"):
            setattr(self, name, getattr(self, name)[kept])
        if len(self.draws):
            self.draws = self.draws[kept]

    def join(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        """Read new prompts and choose the first token of each."""
        parts = [self._read(numbers[part], prompts[part]) for part in self._parts(prompts)]
        columns = max(self.stop, *(part.read.shape[1] for part in parts))
        if _is_plain(parts[0].cache):
            everyone = torch.arange(len(self.prompts), device=self.device)
            caches = [part.cache for part in parts]
            self.cache = _joined(self.cache, everyone, 0, caches, columns, columns + self.most)
        else:
            self.cache = parts[0].cache
        pad = torch.nn.functional.pad
        masks = [self.mask[:, : self.stop], *(part.read.long() for part in parts)]
        self.mask = torch.cat([pad(mask, (columns - mask.shape[1], self.most)) for mask in masks if len(mask)])
        self.stop = columns
        before, rows = len(self.prompts), len(prompts)
        zeros = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.prompts = torch.cat([self.prompts, torch.tensor(list(numbers), device=self.device)])
        self.live = torch.cat([self.live, zeros == 0])
        self.taken, self.newest = torch.cat([self.taken, zeros]), torch.cat([self.newest, zeros])
        self.answers = torch.cat([self.answers, zeros[:, None].expand(rows, self.most)])
        self.position = torch.cat([self.position, *(part.read.sum(1) - 1 for part in parts)])
        if seeds:
            self.draws = torch.cat([self.draws, _draws(seeds, self.most).to(self.device)])
        self._choose(
            torch.cat([part.logits for part in parts]), torch.arange(before, before + rows, device=self.device)
        )

    def _parts(self, prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
        """Of prompts, longest first, those that are read at once."""
        whole = self.device.type != "cpu" or not _is_plain(_cache(self.model, 0))
        at = 0
        while at < len(prompts):
            rows = len(prompts) if whole else max(1, _CPU_READ_TOKENS // len(prompts[at]))
            yield slice(at, at + rows)
            at += rows

    def _read(self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]) -> _Read:
        longest, rows, known = max(map(len, prompts)), len(prompts), self._shared_tokens
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        tokens = torch.zeros(rows, longest - known, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt[known:])
        place = torch.arange(longest, device=self.device)
        read = (place < known) | (place - known >= padding[:, None])
        cache = _cache(self.model, longest)
        if self._shared is not None:
            for layer, start in zip(cache.layers, self._shared.layers, strict=True):
                layer.update(start.keys.expand(rows, -1, -1, -1), start.values.expand(rows, -1, -1, -1))
        words = {"input_ids": tokens.to(self.device)}
        logits = self.model(
            **(words if self.soft is None else {"inputs_embeds": self.soft.embed(numbers)[:, known:]}),
            attention_mask=read.long() if padding.any() else None,
            position_ids=(read.cumsum(1) - 1).clamp(min=0)[:, known:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return _Read(cache, read, logits)

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

    def _choose(self, logits: Tensor, rows: Tensor) -> None:
        """The next token of `rows`, of which logits [rows, vocabulary] are; who ends is done."""
        at = self.taken[rows].clamp(max=self.most - 1)
        draws = self.draws[rows, at] if len(self.draws) else None
        chosen = _chosen(logits, self.temperature, draws)
        stops = torch.isin(chosen, self.ends)
        goes_on = self.live[rows] & ~stops
        writing = rows[goes_on]
        self.answers[writing, self.taken[writing]] = chosen[goes_on]
        self.taken[writing] += 1
        self.newest[rows] = chosen
        self.position[rows] += 1
        done = self.live[rows] & (stops | (self.taken[rows] >= self.most))
        if done.any():
            ended = rows[done]
            self.live[ended] = False
            told = zip(self.prompts[ended].tolist(), self.taken[ended].tolist(), stops[done].tolist(), strict=True)
            for (number, taken, stopped), tokens in zip(told, self.answers[ended].tolist(), strict=True):
                self._done.append(Answer(number, tokens[:taken], stopped))


def _chosen(logits: Tensor, temperature: float, draws: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the one at quantile `draws` of the tempered distribution."""
    if draws is None:
        return logits.argmax(-1)
    # float64, so that the sum over a large vocabulary does not depend on how it is split.
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    quantiles = draws.unsqueeze(1).double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantiles).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _draws(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers [rows, count], each row from its own seed."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _cache(model: Any, capacity: int) -> DynamicCache:
    """A cache whose plain layers fill buffers of `capacity` positions; sliding and other layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_BufferedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _is_plain(cache: DynamicCache | None) -> bool:
    return cache is not None and all(isinstance(layer, _BufferedLayer) for layer in cache.layers)


def _joined(
    old: DynamicCache | None, kept: Tensor, first: int, new: Sequence[DynamicCache], columns: int, capacity: int
) -> DynamicCache:
    """Rows `kept` of `old` from column `first`, then all of `new`, all ending at `columns`, with room up to `capacity`."""
    caches = [*([old] if old is not None else []), *new]
    joined = DynamicCache()
    joined.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        taken = [(layer.keys, layer.values) for layer in layers]
        if old is not None:
            keys, values = taken[0]
            taken[0] = (keys[kept, :, first:], values[kept, :, first:])
        keys, values = (_placed(parts, columns, capacity) for parts in zip(*taken, strict=True))
        joined.layers.append(_BufferedLayer.holding(keys, values, columns))
    return joined


class _BufferedLayer(DynamicLayer):
    """Keys and values [rows, heads, positions, width] in a buffer allocated once: appending copies one position only.

    transformers' own layer concatenates, copying the whole cache at every token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self._capacity, width)
            self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._keys[:, :, start : self._length] = key_states
        self._values[:, :, start : self._length] = value_states
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]

    @staticmethod
    def holding(keys: Tensor, values: Tensor, length: int) -> _BufferedLayer:
        """A layer of these buffers, of which `length` positions are filled."""
        layer = _BufferedLayer(keys.shape[2])
        layer.lazy_initialization(keys, values)
        layer._keys, layer._values, layer._length = keys, values, length
        layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
        return layer


def _placed(parts: Sequence[Tensor], columns: int, capacity: int) -> Tensor:
    """Keys or values of several batches, one after the other, each ending at `columns` of one buffer.

    Zeros where a row has no token: what is masked must still be finite.
    """
    _, heads, _, width = parts[0].shape
    buffer = parts[0].new_zeros(sum(map(len, parts)), heads, capacity, width)
    row = 0
    for part in parts:
        buffer[row : row + len(part), :, columns - part.shape[2] : columns] = part
        row += len(part)
    return buffer
