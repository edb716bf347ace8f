"""Reads prompts before anything is written: each once, and what some or all of them begin with once for these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from raypipe.engines.beginnings import Family, families
from raypipe.engines.caches import Room, is_plain, new_cache
from raypipe.language.backbone import Backbone

_FEW_TOKENS = 8  # Sharing the keys and values of fewer tokens is not worth copying them.
# A CPU reads prompts in pieces whose activations stay in its caches: 1.7 times as fast as 30,000 tokens at once (measured).
_CPU_READ_TOKENS = 3000
_CPU_HELD_TOKENS = 6000  # The same for keys and values that are copied: they are of at most so many tokens.


class SoftRows(Protocol):
    """Prompts that hold vectors at some places."""

    most_shared: int
    """How many tokens stand before the first vector of any prompt."""

    contents: Sequence[Sequence[int]]
    """The content of each prompt, one number for each place; numbers are equal where tokens or vectors are."""

    def embed(self, numbers: Sequence[int]) -> Tensor:
        """The input embeddings of the prompts of these numbers, [rows, longest, hidden], padded on the left."""
        ...

    def before(self, numbers: Sequence[int]) -> Before | None:
        """The keys and values that stand before these prompts in every layer; None if there are none."""
        ...


@dataclass(frozen=True, slots=True)
class Before:
    """Keys and values of every layer, [rows, heads, tokens, width]; `there` bool [rows, tokens]: which tokens exist."""

    layers: Sequence[tuple[Tensor, Tensor]]
    there: Tensor


def shared_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, none if they are few. At least one token of each prompt is left over."""
    if len(prompts) < 2:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # What these two share, all prompts share.
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(map(len, prompts)) - 1)
    return first[:length] if length >= _FEW_TOKENS else []


@dataclass(frozen=True, slots=True)
class Read:
    """Prompts that were read: their cache, bool [rows, columns] where it holds a token, and their last logits."""

    cache: DynamicCache
    read: Tensor
    logits: Tensor


class Prefill:
    """Reads prompts. `soft` says what is read of them if they hold more than words."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Sequence[int]], soft: SoftRows | None = None) -> None:
        self.model, self.device = backbone.model, backbone.device
        self.prompts, self.soft = prompts, soft
        self._shared: DynamicCache | None = None
        self._shared_tokens = 0
        shared = shared_start([prompt[: soft.most_shared] for prompt in prompts] if soft else prompts)
        if shared:
            cache = new_cache(self.model, len(shared))
            if is_plain(cache):
                self.model(
                    input_ids=torch.tensor([shared], device=self.device), past_key_values=cache, logits_to_keep=1
                )
                self._shared, self._shared_tokens = cache, len(shared)

    def parts(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split prompts, which are longest first, into those that are read at once."""
        whole = self.device.type != "cpu" or not is_plain(new_cache(self.model, 0))
        at = 0
        while at < len(numbers):
            rows = len(numbers) if whole else max(1, _CPU_READ_TOKENS // len(self.prompts[numbers[at]]))
            yield numbers[at : at + rows]
            at += rows

    def read(self, numbers: Sequence[int]) -> Read:
        """Read the prompts of these numbers, padded on the left, behind what stands before them."""
        prompts = [self.prompts[number] for number in numbers]
        longest, rows, known = max(map(len, prompts)), len(prompts), self._shared_tokens
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        tokens = torch.zeros(rows, longest - known, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt[known:])
        place = torch.arange(longest, device=self.device)
        read = (place < known) | (place - known >= padding[:, None])
        before = None if self.soft is None else self.soft.before(numbers)
        columns = 0 if before is None else before.there.shape[1]
        cache = new_cache(self.model, columns + longest)
        if before is not None:
            read = torch.cat([before.there, read], 1)
            for layer, (keys, values) in zip(cache.layers, before.layers, strict=True):
                layer.update(keys, values)
        if self._shared is not None:
            for layer, start in zip(cache.layers, self._shared.layers, strict=True):
                layer.update(start.keys.expand(rows, -1, -1, -1), start.values.expand(rows, -1, -1, -1))
        words = {"input_ids": tokens.to(self.device)}
        logits = self.model(
            **(words if self.soft is None else {"inputs_embeds": self.soft.embed(numbers)[:, known:]}),
            attention_mask=None if read.all() else read.long(),
            position_ids=(read.cumsum(1) - 1).clamp(min=0)[:, columns + known :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return Read(cache, read, logits)


def read_all(
    backbone: Backbone, prompts: Sequence[Sequence[int]], batch_tokens: int, soft: SoftRows | None = None
) -> Iterator[tuple[list[int], Read]]:
    """Read every prompt once, several at a time, and yield their numbers and what was read.

    What was read is valid until the next prompts are read. What a family of prompts begins with, such as all questions
    about one user, is read once, and its keys and values are copied to the members. A batch holds at most
    `batch_tokens` tokens, or one prompt.
    """
    if is_plain(new_cache(backbone.model, 0)):
        found = families(prompts if soft is None else soft.contents, _FEW_TOKENS)
    else:
        found = [Family((number,)) for number in range(len(prompts))]
    # Families that share something come first, and of both kinds the longest: if memory does not suffice, that shows at
    # once.
    found.sort(key=lambda family: (not family.shared, -(family.shared or len(prompts[family.members[0]]))))
    starts = [prompts[family.members[0]][: family.shared or None] for family in found]
    prefill = Prefill(backbone, starts, None if soft is None else _Starts(soft, prompts, found))
    room = Room()
    at, sharing = 0, sum(family.shared > 0 for family in found)
    while at < len(found):
        stop = min(sharing if at < sharing else len(found), at + max(1, batch_tokens // len(starts[at])))
        for part in prefill.parts(range(at, stop)):
            read, mine = prefill.read(part), [found[number] for number in part]
            if at < sharing:
                yield from _read_members(backbone, prompts, mine, read, batch_tokens, soft, room)
            else:
                yield [family.members[0] for family in mine], read
        at = stop


def _read_members(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    shared: Sequence[Family],
    read: Read,
    batch_tokens: int,
    soft: SoftRows | None,
    room: Room,
) -> Iterator[tuple[list[int], Read]]:
    """Read the members of the families `shared`, whose beginnings are the rows of `read`, the longest ends first."""
    ends = {number: len(prompts[number]) - family.shared for family in shared for number in family.members}
    rows = {number: row for row, family in enumerate(shared) for number in family.members}
    left = sorted(ends, key=lambda number: -ends[number])
    columns, device, dtype = read.read.shape[1], backbone.device, read.logits.dtype
    most = min(batch_tokens, _CPU_HELD_TOKENS) if device.type == "cpu" else batch_tokens
    while left:
        longest = ends[left[0]]
        count = max(1, most // (columns + longest))
        numbers, left = left[:count], left[count:]
        chosen = torch.tensor([rows[number] for number in numbers], device=device)
        tokens = torch.zeros(len(numbers), longest, dtype=torch.long)
        for row, number in enumerate(numbers):
            tokens[row, longest - ends[number] :] = torch.tensor(prompts[number][-ends[number] :])
        padding = torch.tensor([longest - ends[number] for number in numbers], device=device)
        known = torch.cat([read.read[chosen], torch.arange(longest, device=device) >= padding[:, None]], 1)
        cache = room.copied(read.cache, chosen, columns, columns + longest)
        words = {"input_ids": tokens.to(device)}
        logits = backbone.model(
            **(words if soft is None else {"inputs_embeds": soft.embed(numbers)[:, -longest:]}),
            attention_mask=_after(columns, longest, dtype, device) if known.all() else known.long(),
            position_ids=(known.cumsum(1) - 1).clamp(min=0)[:, columns:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        yield numbers, Read(cache, known, logits)


def _after(columns: int, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The causal mask of `longest` places behind so many columns, one for all rows; the model would make one each."""
    mask = torch.full((longest, columns + longest), -torch.inf, dtype=dtype, device=device)
    return mask.triu(columns + 1)[None, None]


class _Starts:
    """The beginnings of families, in place of whole prompts; implements `SoftRows`."""

    def __init__(self, soft: SoftRows, prompts: Sequence[Sequence[int]], found: Sequence[Family]) -> None:
        self.soft, self.most_shared = soft, soft.most_shared
        self.first = [family.members[0] for family in found]
        self.whole = [len(prompts[number]) for number in self.first]
        self.kept = [family.shared or whole for family, whole in zip(found, self.whole, strict=True)]
        contents = zip((soft.contents[number] for number in self.first), self.kept, strict=True)
        self.contents: Sequence[Sequence[int]] = [content[:kept] for content, kept in contents]

    def embed(self, numbers: Sequence[int]) -> Tensor:
        embedded = self.soft.embed([self.first[number] for number in numbers])
        longest = max(self.kept[number] for number in numbers)
        # Whole prompts end at the last column; their beginnings must end there too.
        cut = [self.whole[number] - self.kept[number] for number in numbers]
        rows = [
            torch.nn.functional.pad(row, (0, 0, gone, 0))[: len(row)] for row, gone in zip(embedded, cut, strict=True)
        ]
        return torch.stack(rows)[:, -longest:]

    def before(self, numbers: Sequence[int]) -> Before | None:
        return self.soft.before([self.first[number] for number in numbers])
