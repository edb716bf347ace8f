"""Log-probabilities of given answers to prompts.

A prompt is read once for all of its answers, and each answer in one pass. What many prompts begin with, such as the
questions about all candidates of one user, is read once for all of these.

The logits of a prompt's last position score an answer's first token, so answers of one token cost nothing more. The
other tokens are read behind copies of the prompt's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raypipe.engines.caches import copied
from raypipe.engines.prefill import Read, SoftRows, read_all
from raypipe.language.backbone import Backbone

_MOST_LOGITS = 2**28  # of one pass: 1 GiB in float32


@torch.inference_mode()
def score(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    batch_tokens: int,
    soft: SoftRows | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """Yield the number of each prompt and the log-probability of each of its answers, in any order of prompts.

    A log-probability is the sum over the answer's tokens, in float32. Each of `answers` holds at least one token. A
    batch holds at most `batch_tokens` tokens, or one row; `soft` is as in `decode`.
    """
    for numbers, read in read_all(backbone, prompts, batch_tokens, soft):
        pairs = [(row, answer) for row, number in enumerate(numbers) for answer in answers[number]]
        scores = iter(_scores(backbone, read, pairs, batch_tokens).tolist())
        for number in numbers:
            yield number, [next(scores) for _ in answers[number]]


def _scores(backbone: Backbone, read: Read, pairs: Sequence[tuple[int, Sequence[int]]], batch_tokens: int) -> Tensor:
    """The log-probability of each pair of a row that was read and an answer to it, [pairs]."""
    columns, vocabulary = read.read.shape[1], read.logits.shape[1]
    rows = torch.tensor([row for row, _ in pairs], device=backbone.device)
    first = torch.tensor([answer[0] for _, answer in pairs], device=backbone.device)
    found = torch.log_softmax(read.logits.float(), -1)[rows, first]
    # Answers of similar length share a pass, the longest first.
    longer = sorted((n for n, (_, answer) in enumerate(pairs) if len(answer) > 1), key=lambda n: -len(pairs[n][1]))
    while longer:
        most = len(pairs[longer[0]][1]) - 1
        count = max(1, min(batch_tokens // (columns + most), _MOST_LOGITS // (most * vocabulary)))
        chosen, longer = longer[:count], longer[count:]
        found[chosen] += _rest(backbone, read, rows[chosen], [pairs[number][1] for number in chosen])
    return found


def _rest(backbone: Backbone, read: Read, rows: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """The log-probability [answers] of all tokens but the first. `answers`, longest first, are to `rows` of `read`."""
    columns, most = read.read.shape[1], len(answers[0]) - 1
    tokens = torch.zeros(len(answers), most + 1, dtype=torch.long)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = torch.tensor(answer)
    tokens = tokens.to(backbone.device)
    lengths = torch.tensor([len(answer) - 1 for answer in answers], device=backbone.device)
    place = torch.arange(most, device=backbone.device)
    known = read.read[rows]
    logits = backbone.model(
        input_ids=tokens[:, :-1],
        # Padding stands behind an answer, where none of the answer's tokens attends to it.
        attention_mask=torch.cat([known, known.new_ones(len(rows), most)], 1).long(),
        position_ids=known.sum(1)[:, None] + place,
        past_key_values=copied(read.cache, rows, columns, columns + most),
        use_cache=True,
    ).logits.float()
    told = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
    return (told * (place < lengths[:, None])).sum(1)
