"""Prompts of text and vectors as a language model's input, for training: projectors turn vectors into tokens.

A segment of vectors takes as many places as its projector makes tokens of it. There its tokens `replace` what the model
would read, or are added (`add`) to a learnt word embedding of their source, as for RecExplainer's `<user>` and `<item>`
(arXiv 2311.10947, section 3.2). The loss is taken on the answer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from raypipe.language.backbone import PromptTokenizer
from raypipe.language.prefixes import PREFIX, Prefix, behind
from raypipe.language.projectors import Projector, ProjectorConfig
from raypipe.language.prompt import Prompt, Text, Vectors

IGNORED = -100
"""Label of what is not to be learnt."""

Injection = Literal["replace", "add"]


@dataclass(frozen=True, slots=True)
class SoftExample:
    """One example: a prompt and its answer. The answer is learnt, or with `whole` the text of both."""

    prompt: Prompt
    answer: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, and its vectors with the first place of each; the ids at vectors' places mean nothing."""

    ids: list[int]
    soft: list[tuple[int, Vectors]]
    prefix: Vectors | None = None
    """What stands before it in every layer."""

    @property
    def length(self) -> int:
        """How many places it takes, its prefix included."""
        return len(self.ids) + (0 if self.prefix is None else len(self.prefix.values))

    @property
    def content(self) -> list[int]:
        """The ids, with negative hashes in the first places of vectors: equal if tokens and vectors are equal."""
        found = list(self.ids)
        for start, vectors in self.soft:
            found[start] = -1 - abs(hash(vectors))
        if self.prefix is not None and found:
            found[0] = -1 - abs(hash((self.prefix, found[0])))
        return found


def encode(
    tokenizer: PromptTokenizer, prompt: Prompt, projectors: Mapping[str, ProjectorConfig], widths: Mapping[str, int]
) -> Encoded:
    """As `encode_all`, for one prompt."""
    return encode_all(tokenizer, [prompt], projectors, widths)[0]


def encode_all(
    tokenizer: PromptTokenizer,
    prompts: Sequence[Prompt],
    projectors: Mapping[str, ProjectorConfig],
    widths: Mapping[str, int],
) -> list[Encoded]:
    """Encode prompts segment by segment, each tokenised by itself, in the same way for training and generation.

    `projectors` and `widths` say, by source, how vectors become tokens and how wide they are. Raises ValueError if no
    projector fits the source or the width of some vectors.
    """
    pieces: list[list[str | int]] = []
    vectors: list[list[Vectors]] = []
    for prompt in prompts:
        pieces.append([])
        vectors.append([])
        for segment in prompt.segments:
            if isinstance(segment, Text):
                pieces[-1].append(segment.text)
                continue
            projector = projectors.get(segment.source)
            if projector is None:
                raise ValueError(f"There is no projector for vectors of {segment.source!r}.")
            if segment.values.shape[1] != widths[segment.source]:
                raise ValueError(
                    f"Vectors of {segment.source!r} are {segment.values.shape[1]} wide, and their projector reads "
                    f"{widths[segment.source]}."
                )
            vectors[-1].append(segment)
            pieces[-1].append(projector.tokens_of(len(segment.values)))
    encoded = zip(tokenizer.encode_pieces(pieces), vectors, strict=True)
    return [Encoded(ids, list(zip(starts, mine, strict=True))) for (ids, starts), mine in encoded]


def collate(
    prompts: Sequence[Encoded], answers: Sequence[Sequence[int]] | None = None, *, left: bool = False
) -> dict[str, Tensor]:
    """Collate one batch, padded on the right, or on the `left`.

    It holds `tokens` and `mask` int64 [batch, length] and, with answers, `labels` alike. For each source of vectors,
    over all its segments, it holds `vectors/SOURCE` float32 [segments, count, width], `known/SOURCE` bool [segments,
    count], and `rows/SOURCE` and `starts/SOURCE` int64 [segments]. For prefixes it holds `prefix/vectors` float32
    [batch, count, width] and `prefix/known` bool [batch, count].
    """
    whole = [[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers or [()] * len(prompts), strict=True)]
    length = max(map(len, whole))
    tokens = np.zeros((len(whole), length), np.int64)
    mask = np.zeros((len(whole), length), np.int64)
    labels = np.full((len(whole), length), IGNORED, np.int64)
    begins = [length - len(ids) if left else 0 for ids in whole]
    for row, (ids, prompt, begin) in enumerate(zip(whole, prompts, begins, strict=True)):
        tokens[row, begin : begin + len(ids)] = ids
        mask[row, begin : begin + len(ids)] = 1
        labels[row, begin + len(prompt.ids) : begin + len(ids)] = ids[len(prompt.ids) :]
    batch = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
    if answers is not None:
        batch["labels"] = torch.from_numpy(labels)
    if any(prompt.prefix is not None for prompt in prompts):
        batch |= padded_vectors([prompt.prefix.values for prompt in prompts if prompt.prefix is not None], PREFIX)
    segments: dict[str, list[tuple[int, int, Vectors]]] = {}
    for row, prompt in enumerate(prompts):
        for start, vectors in prompt.soft:
            segments.setdefault(vectors.source, []).append((row, begins[row] + start, vectors))
    for source, found in segments.items():
        told = padded_vectors([vectors.values for _, _, vectors in found], source)
        batch[f"vectors/{source}"], batch[f"known/{source}"] = told[f"{source}/vectors"], told[f"{source}/known"]
        batch[f"rows/{source}"] = torch.tensor([row for row, _, _ in found])
        batch[f"starts/{source}"] = torch.tensor([start for _, start, _ in found])
    return batch


def padded_vectors(rows: Sequence[NDArray[np.float32]], name: str) -> dict[str, Tensor]:
    """`NAME/vectors` float32 [rows, longest, width] and `NAME/known` bool [rows, longest], padded at the beginning."""
    most = max(map(len, rows))
    values = np.zeros((len(rows), most, rows[0].shape[1]), np.float32)
    known = np.zeros((len(rows), most), bool)
    for row, mine in enumerate(rows):
        values[row, most - len(mine) :] = mine
        known[row, most - len(mine) :] = True
    return {f"{name}/vectors": torch.from_numpy(values), f"{name}/known": torch.from_numpy(known)}


class SoftPromptLm(nn.Module):
    """A causal language model with its projectors, by source of vectors, and its prefix.

    `forward` returns the cross-entropy of answers.
    """

    def __init__(
        self, lm: Any, projectors: Mapping[str, Projector], injection: Injection, prefix: Prefix | None = None
    ) -> None:
        super().__init__()
        self.lm, self.injection, self.prefix = lm, injection, prefix
        self.projectors = nn.ModuleDict(projectors)
        hidden = lm.get_input_embeddings().weight.shape[1]
        # With "add", the word embedding to which the tokens of a source are added.
        self.words = nn.ParameterDict(
            {source: nn.Parameter(torch.zeros(hidden)) for source in projectors} if injection == "add" else {}
        )

    def train(self, mode: bool = True) -> SoftPromptLm:
        """Set the mode; a language model that is not trained stays in eval mode, dropout off."""
        super().train(mode)
        if not any(weight.requires_grad for weight in self.lm.parameters()):
            self.lm.eval()
        return self

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The embeddings that the model reads, [batch, length, hidden]."""
        embedded = self.lm.get_input_embeddings()(batch["tokens"])
        for source, projector in self.projectors.items():
            if f"rows/{source}" not in batch:
                continue
            vectors, known = batch[f"vectors/{source}"], batch[f"known/{source}"]
            soft, there = projector(vectors.to(embedded.dtype), known)
            if self.injection == "add":
                soft = soft + self.words[source]
            columns = batch[f"starts/{source}"][:, None] + there.cumsum(1) - 1
            rows = batch[f"rows/{source}"][:, None].expand_as(columns)
            embedded = embedded.index_put((rows[there], columns[there]), soft[there].to(embedded.dtype))
        return embedded

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The last layer's states [batch, length, hidden] of a batch that is padded on the right."""
        decoder, words = self.lm.get_decoder(), {"inputs_embeds": self.embed(batch), "use_cache": False}
        if self.prefix is None:
            return decoder(**words, attention_mask=batch["mask"]).last_hidden_state
        tokens, there = self.prefix.of_batch(batch)
        return behind(decoder, self.prefix.shape, tokens, there, words, batch["mask"])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy summed over answer tokens and divided by `count`, or by their number if there is no `count`.

        Logits are computed only where there is something to predict.
        """
        hidden = self.states(batch)
        labels = batch["labels"][:, 1:]
        wanted = labels != IGNORED
        logits = self.lm.get_output_embeddings()(hidden[:, :-1][wanted])
        total = functional.cross_entropy(logits.float(), labels[wanted], reduction="sum")
        return total / (batch["count"] if "count" in batch else wanted.sum())
