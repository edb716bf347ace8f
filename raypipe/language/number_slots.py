"""Numbers that a language model would put into the slots of a given answer, as differentiable expectations.

An answer is words with slots between them, each for a number from 1 to `top`. The whole answer is teacher-forced with
some number in each slot, and the model is read at the place before each slot. The expectation of a slot is Σ n p(n),
where p(n) is the probability of the number's whole spelling, normalised over the `top` numbers.

The tokens of a number are not assumed: every number is put into every slot, and the tokens in which these answers
differ are its spelling. "10" may be one token. If it is "1" and then "0", p(1) is the probability of a "1" that is not
followed by "0". For that, a branch for each slot, consisting of the one token "1", is appended behind the answer. It
sees only what comes before the slot and itself, so that one pass is enough.

The numbers in earlier slots shift what is expected in later ones. Training draws these numbers, so that a model learns
to ignore them; a reading puts the middle number into all slots.

Not covered: spellings of more than two tokens (with a tokenizer that spells "10" so, only 1 to 9 can be read), and
layers with an attention window shorter than the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raypipe.errors import UsageError
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.soft_prompts import IGNORED
from raypipe.language.trie import answer_tokens

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class NumberForm:
    """The tokens of an answer: `segments` [slots + 1] of words, `numbers` [top] for the slots between, and `end`."""

    segments: tuple[Tokens, ...]
    numbers: tuple[Tokens, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: PromptTokenizer, words: Sequence[str], top: int, end: int) -> NumberForm:
        """The form of an answer with `words` [slots + 1] around its slots.

        Raises UsageError if the tokenizer does not spell each number by one or two tokens of its own.
        """
        slots = len(words) - 1
        spelled = [_spelled(tokenizer, words, [_middle(top)] * slots, slot, top) for slot in range(slots)]
        numbers = spelled[0].numbers
        segments, at = [], 0
        for mine in spelled:
            segments.append(mine.whole[at : mine.start])
            at = mine.start + len(numbers[_middle(top) - 1])
        form = cls((*segments, spelled[-1].whole[at:]), numbers, end)
        fills = [[top] * slots, [1] * slots, [1 + place % top for place in range(slots)]]
        wholes = answer_tokens(tokenizer, [_text(words, fill) for fill in fills])
        joined = any(form.answer(fill)[0] != whole for fill, whole in zip(fills, wholes, strict=True))
        if joined or any(mine.numbers != numbers for mine in spelled):
            raise _unreadable(top)
        return form

    @property
    def slots(self) -> int:
        return len(self.segments) - 1

    @property
    def top(self) -> int:
        return len(self.numbers)

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest answer, its end included."""
        return sum(map(len, self.segments)) + self.slots * max(map(len, self.numbers)) + 1

    @cached_property
    def branches(self) -> Tokens:
        """The first tokens of numbers that have a second token."""
        return tuple(sorted({number[0] for number in self.numbers if len(number) > 1}))

    def answer(self, fill: Sequence[int]) -> tuple[list[int], list[int], list[bool]]:
        """The answer with `fill` [slots]: tokens without the end, the place before each slot, and which are words."""
        tokens, before, words = list(self.segments[0]), [], [True] * len(self.segments[0])
        for number, segment in zip(fill, self.segments[1:], strict=True):
            before.append(len(tokens) - 1)
            spelling = self.numbers[number - 1]
            tokens += [*spelling, *segment]
            words += [False] * len(spelling) + [True] * len(segment)
        return tokens, before, words

    def collate(self, prompts: Sequence[Sequence[int]], fills: NDArray[np.int64]) -> dict[str, Tensor]:
        """A batch of prompts with answers filled by `fills` int64 [batch, slots], padded on the right.

        It holds `tokens`, `mask` and `labels` int64 [batch, length], with labels only at words and the end, and `slots`
        int64 [batch, slots], the place before each slot.
        """
        rows = [self.answer(fill) for fill in fills.tolist()]
        length = max(len(prompt) + len(tokens) + 1 for prompt, (tokens, _, _) in zip(prompts, rows, strict=True))
        tokens = np.zeros((len(rows), length), np.int64)
        mask = np.zeros_like(tokens)
        labels = np.full_like(tokens, IGNORED)
        slots = np.zeros((len(rows), self.slots), np.int64)
        for row, (prompt, (answer, before, words)) in enumerate(zip(prompts, rows, strict=True)):
            begin, stop = len(prompt), len(prompt) + len(answer) + 1
            tokens[row, :stop] = [*prompt, *answer, self.end]
            mask[row, :stop] = 1
            labels[row, begin:stop] = np.where([*words, True], tokens[row, begin:stop], IGNORED)
            slots[row] = begin + np.array(before)
        named = {"tokens": tokens, "mask": mask, "labels": labels, "slots": slots}
        return {name: torch.from_numpy(values) for name, values in named.items()}

    def middle(self, rows: int) -> NDArray[np.int64]:
        """The numbers in the slots when they are read, all the middle one: [rows, slots]."""
        return np.full((rows, self.slots), _middle(self.top))


@dataclass(frozen=True)
class Expected:
    """What a model expects of answers.

    `numbers` float32 [batch, slots] are the expected numbers. `form` is the summed cross-entropy of the words around
    them and of there being any number in each slot; `count` is the number of terms of that sum.
    """

    numbers: Tensor
    form: Tensor
    count: Tensor


def expected_numbers(lm: Any, form: NumberForm, batch: Mapping[str, Tensor]) -> Expected:
    """What a causal language model expects in the slots of a batch made by `form.collate`."""
    tokens, slots = batch["tokens"], batch["slots"]
    hidden = lm.get_decoder()(**_with_branches(lm, form, batch), use_cache=False).last_hidden_state
    head = lm.get_output_embeddings()
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORED
    words = functional.cross_entropy(
        head(hidden[:, : tokens.shape[1] - 1][wanted]).float(), labels[wanted], reduction="sum"
    )
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    logits = head(hidden[rows, slots]).float()  # [batch, slots, vocabulary]
    behind = head(hidden[:, tokens.shape[1] :]).float().log_softmax(-1) if form.branches else logits
    spelled = _spelling_logprobs(form, logits.log_softmax(-1), behind)
    scale = torch.arange(1, form.top + 1, device=tokens.device, dtype=spelled.dtype)
    return Expected(spelled.softmax(-1) @ scale, words - spelled.logsumexp(-1).sum(), wanted.sum() + slots.numel())


def _spelling_logprobs(form: NumberForm, first: Tensor, behind: Tensor) -> Tensor:
    """Log-probabilities of the numbers' whole spellings, [batch, slots, top].

    They are computed from those of the `first` token at the slots [batch, slots, vocabulary] and, if there are
    branches, of the token `behind` each branch [batch, slots · branches, vocabulary].
    """
    found = first[..., [number[0] for number in form.numbers]]
    if not form.branches:
        return found
    behind = behind.view(*first.shape[:2], len(form.branches), -1)
    columns = []
    for place, number in enumerate(form.numbers):
        logprob = found[..., place]
        if number[0] in form.branches:
            after = behind[:, :, form.branches.index(number[0])]
            if len(number) > 1:
                logprob = logprob + after[..., number[1]]
            else:
                others = [other[1] for other in form.numbers if other[0] == number[0] and len(other) > 1]
                # Rounding may make a sum of probabilities 1, and the logarithm of 0 has no gradient.
                logprob = logprob + torch.log1p(-after[..., others].exp().sum(-1).clamp(max=1 - 1e-6))
        columns.append(logprob)
    return torch.stack(columns, -1)


def _with_branches(lm: Any, form: NumberForm, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's arguments: the batch and each slot's branches, which see what precedes the slot and themselves."""
    tokens, mask = batch["tokens"], batch["mask"]
    embed = lm.get_input_embeddings()
    if not form.branches:
        return {"inputs_embeds": embed(tokens), "attention_mask": mask}
    rows, length = tokens.shape
    count = len(form.branches)
    before = batch["slots"].repeat_interleave(count, 1)  # [batch, slots · branches]
    extra = torch.tensor(form.branches, device=tokens.device).repeat(form.slots).expand(rows, -1)
    embedded = embed(torch.cat([tokens, extra], 1))
    columns = torch.arange(length, device=tokens.device)
    main = (columns[:, None] >= columns) & mask[:, None, :].bool()  # [batch, length, length]
    # Every place sees at least itself, because attention over nothing is not a number.
    main = main | torch.eye(length, dtype=torch.bool, device=tokens.device)
    branch = columns <= before[..., None]  # [batch, branches, length]
    alone = torch.eye(extra.shape[1], dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
    nothing = torch.zeros(rows, length, extra.shape[1], dtype=torch.bool, device=tokens.device)
    seen = torch.cat([torch.cat([main, nothing], 2), torch.cat([branch, alone], 2)], 1)[:, None]
    bias = torch.zeros(seen.shape, dtype=embedded.dtype, device=tokens.device)
    positions = torch.cat([columns.expand(rows, -1), before + 1], 1)
    return {
        "inputs_embeds": embedded,
        "attention_mask": bias.masked_fill(~seen, torch.finfo(embedded.dtype).min),
        "position_ids": positions,
    }


@dataclass(frozen=True)
class _Spelled:
    """The answer `whole` with the middle number in all slots, where one slot starts in it, and the spellings there."""

    whole: Tokens
    start: int
    numbers: tuple[Tokens, ...]


def _spelled(tokenizer: PromptTokenizer, words: Sequence[str], fill: list[int], slot: int, top: int) -> _Spelled:
    texts = [_text(words, [*fill[:slot], number, *fill[slot + 1 :]]) for number in range(1, top + 1)]
    found = answer_tokens(tokenizer, texts)
    start = _shared(found)
    most = min(map(len, found)) - start
    end = min(_shared([ids[::-1] for ids in found]), most - 1)
    numbers = tuple(tuple(ids[start : len(ids) - end]) for ids in found)
    if start == 0 or end < 1 or len(set(numbers)) < top or max(map(len, numbers)) > 2:
        raise _unreadable(top)
    return _Spelled(tuple(found[fill[slot] - 1]), start, numbers)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _text(words: Sequence[str], fill: Sequence[int]) -> str:
    return words[0] + "".join(f"{number}{word}" for number, word in zip(fill, words[1:], strict=True))


def _middle(top: int) -> int:
    return (top + 1) // 2


def _unreadable(top: int) -> UsageError:
    return UsageError(
        f"The language model's tokenizer does not spell the numbers from 1 to {top} as one or two tokens of their own.",
        "Ask for numbers from 1 to 9 with --guided.top 9, or name another language model.",
    )
