"""Training an adapter on prepared examples of prompts with vectors.

`prepare_alignment` writes, and `AlignmentTask` reads, one folder:

    tokens.npy          int32 [tokens], prompts and answers one after the other; 0 in the places of vectors
    ends.npy            int64 [examples], where each example ends in `tokens`
    answer_starts.npy   int32 [examples], how many tokens of each example precede its answer
    segments.npy        int64 [segments, 5]: example, source, first place, first row of its vectors, how many
    vectors-N.npy       float32 [rows, width], the vectors of source N
    prepared.json       what is trained between what; written last, so that its existence means the rest is complete
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raypipe.language.adapters import AdapterCard, AdapterConfig, build_adapter, save_adapter
from raypipe.language.backbone import PromptTokenizer, load_backbone
from raypipe.language.batching import batches_of_like_length
from raypipe.language.prompt import Vectors
from raypipe.language.soft_prompts import Encoded, SoftExample, collate, encode_all
from raypipe.language.trie import answer_tokens

_MARKER = "prepared.json"
_EXAMPLES_AT_ONCE = 1024
_WHITENED_ON = 20_000


def prepare_alignment(
    folder: Path,
    examples: Iterable[SoftExample],
    tokenizer: PromptTokenizer,
    end: int,
    context: int,
    lm: str,
    card: AdapterCard,
    seed: int,
) -> dict[str, int]:
    """Write the folder that a task trains from, and return its counts: examples, tokens, answer_tokens, left_out.

    `lm` is the language model's folder or hub name, which every worker resolves itself; `end` is the token that ends an
    answer. An example longer than `context` is left out, because a truncated one would teach answers to what is not
    shown. Raises ValueError if no example is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(card.config.projectors)
    rows: dict[str, list[NDArray[np.float32]]] = {source: [] for source in sources}
    stored = dict.fromkeys(sources, 0)
    tokens: list[int] = []
    ends: list[int] = []
    answer_starts: list[int] = []
    segments: list[tuple[int, int, int, int, int]] = []
    left_out = 0
    for prompt, answer in _encoded(examples, tokenizer, end, card):
        if len(prompt.ids) + len(answer) > context:
            left_out += 1
            continue
        for start, vectors in prompt.soft:
            count = len(vectors.values)
            segments.append((len(ends), sources.index(vectors.source), start, stored[vectors.source], count))
            rows[vectors.source].append(vectors.values)
            stored[vectors.source] += count
        tokens += [*prompt.ids, *answer]
        answer_starts.append(len(prompt.ids))
        ends.append(len(tokens))
    if not ends:
        raise ValueError(f"Of {left_out} examples none fits the context of {context} tokens.")
    np.save(folder / "tokens.npy", np.array(tokens, np.int32))
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "answer_starts.npy", np.array(answer_starts, np.int32))
    np.save(folder / "segments.npy", np.array(segments, np.int64).reshape(-1, 5))
    for number, source in enumerate(sources):
        np.save(
            folder / f"vectors-{number}.npy",
            np.concatenate([np.zeros((0, card.widths[source]), np.float32), *rows[source]]),
        )
    counts = {
        "examples": len(ends),
        "tokens": len(tokens),
        "answer_tokens": len(tokens) - sum(answer_starts),
        "left_out": left_out,
    }
    told = {"lm": lm, "seed": seed, "card": {**asdict(card), "config": card.config.model_dump(mode="json")}}
    (folder / _MARKER).write_text(json.dumps(told))
    return counts


def _encoded(
    examples: Iterable[SoftExample], tokenizer: PromptTokenizer, end: int, card: AdapterCard
) -> Iterator[tuple[Encoded, list[int]]]:
    """Yield each example's encoded prompt and its answer's tokens with the end mark.

    Of an example learnt as a `whole`, all but the first token belong to the answer. Raises ValueError if such a prompt
    holds vectors.
    """
    rest = iter(examples)
    while some := list(islice(rest, _EXAMPLES_AT_ONCE)):
        prompts = encode_all(tokenizer, [one.prompt for one in some], card.config.projectors, card.widths)
        answers = answer_tokens(tokenizer, [one.answer for one in some])
        for one, prompt, answer in zip(some, prompts, answers, strict=True):
            if one.whole:
                if prompt.soft:
                    raise ValueError("A prompt that holds vectors cannot be learnt as a whole.")
                # The first token is not predicted: it only precedes the others.
                yield Encoded(prompt.ids[:1], []), [*prompt.ids[1:], *answer, end]
            else:
                yield prompt, [*answer, end]


class AlignmentTask:
    """The training task of an adapter. It is picklable and reads its files where it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            told = json.loads((self.folder / _MARKER).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared examples; call prepare_alignment first.") from None
        config = AdapterConfig.model_validate(told["card"].pop("config"))
        self.card = AdapterCard(config=config, **told["card"])
        self.lm, self.seed = str(told["lm"]), int(told["seed"])
        self._batches: list[NDArray[np.int64]] = []
        self._batches_of: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[type[AlignmentTask], tuple[Path]]:
        return type(self), (self.folder,)

    def build(self) -> nn.Module:
        """Build the adapted model; forward(batch) is the mean cross-entropy of the answers."""
        self._backbone = load_backbone(self.lm, device="cpu")
        model = build_adapter(self._backbone, self.card, self.seed)
        for (source, config), vectors in zip(sorted(self.card.config.projectors.items()), self._vectors, strict=True):
            if config.whitened and len(vectors):
                some = np.linspace(0, len(vectors) - 1, min(len(vectors), _WHITENED_ON)).astype(np.int64)
                model.projectors[source].whiten(torch.from_numpy(vectors[some]))  # type: ignore[operator]
        self._kept = {name for name, weight in model.named_parameters() if weight.requires_grad}
        return model

    def keeps(self, name: str) -> bool:
        return name in self._kept

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self._ends) // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's share of the global batch of `step`: a function of the arguments alone.

        `count` is the number of answer tokens of all ranks, divided by the number of ranks.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        if self._batches_of != (epoch, seed, batch_size):
            self._batches = batches_of_like_length(np.diff(self._ends, prepend=0), (seed, epoch), batch_size)
            self._batches_of = (epoch, seed, batch_size)
        whole = self._batches[index]
        prompts, answers = zip(*(self._example(int(example)) for example in whole[rank::world]), strict=True)
        lengths = np.diff(self._ends, prepend=0)[whole] - self._answer_starts[whole]
        return {**collate(prompts, answers), "count": torch.tensor(lengths.sum() / world)}

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_adapter(folder, self.card, weights)

    def _example(self, example: int) -> tuple[Encoded, list[int]]:
        stop = int(self._ends[example])
        start = int(self._ends[example - 1]) if example else 0
        ids, prompt = self._tokens[start:stop].tolist(), int(self._answer_starts[example])
        first, last = np.searchsorted(self._segments[:, 0], [example, example + 1])
        soft = []
        for _, number, place, row, count in self._segments[first:last].tolist():
            source = sorted(self.card.config.projectors)[number]
            soft.append((place, Vectors(self._vectors[number][row : row + count], source)))
        return Encoded(ids[:prompt], soft), ids[prompt:]

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return np.load(self.folder / "tokens.npy", mmap_mode="r")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "ends.npy")

    @cached_property
    def _answer_starts(self) -> NDArray[np.int32]:
        return np.load(self.folder / "answer_starts.npy")

    @cached_property
    def _segments(self) -> NDArray[np.int64]:
        return np.load(self.folder / "segments.npy")

    @cached_property
    def _vectors(self) -> list[Any]:
        return [
            np.load(self.folder / f"vectors-{number}.npy", mmap_mode="r")
            for number in range(len(self.card.config.projectors))
        ]
