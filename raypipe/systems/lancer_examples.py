"""LANCER's training data as tokens: stretches of histories, items' lines and contents (arXiv 2309.10435, section 4).

A stretch is a run of consecutive items that are learnt at once. Each of its lines, and the end mark behind it, is
predicted from what precedes it, under the reasoning prompt of the items before the stretch. The words that join items
are read but not learnt. A stretch of n items is thus n examples that share their beginning.

`prepare_lancer` writes, and `LancerExamples` reads, one folder:

    lines.npy, line_ends.npy            int32 [tokens], int64 [items]: the items' lines, one after the other
    contents.npy, content_ends.npy      alike, their contents as the reader reads them
    histories.npy, history_ends.npy     int32 [events], int64 [users]: training's events, then those that validate
    vectors.npy                         float32 [items + 1, hidden], written between the stages if items are read once
    first.safetensors                   the prompts after the first stage
    prepared.json                       what is trained, and how; `prepare_lancer` writes it last, as a marker
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, AdapterConfig
from raypipe.language.backbone import Backbone, PromptTokenizer
from raypipe.language.prefixes import PREFIX
from raypipe.language.soft_prompts import IGNORED, padded_vectors
from raypipe.language.trie import answer_tokens
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import Frame, LancerConfig
from raypipe.systems.lancer_reading import padded

FIRST = "first.safetensors"
VECTORS = "vectors.npy"
_MARKER = "prepared.json"
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class FrameTokens:
    """Token ids of the words around items, including what wraps a prompt.

    `start` comes before the first item, `join` behind every item, `after` behind the last one; `after` is empty for a
    tokenizer without a chat template.
    """

    start: list[int]
    join: list[int]
    after: list[int]

    @property
    def around(self) -> int:
        """How many tokens stand before the first item and behind the last."""
        return len(self.start) + len(self.after)

    @classmethod
    def of(cls, tokenizer: PromptTokenizer, frame: Frame) -> FrameTokens:
        ((ids, (place,)),) = tokenizer.encode_pieces([[frame.lead, 1]])
        ((both, (left, right)),) = tokenizer.encode_pieces([[1, frame.join, 1]])
        return cls(ids[:place], both[left + 1 : right], ids[place + 1 :])


@dataclass(frozen=True)
class LancerTrainingData:
    """The lines and contents of all items, and the histories.

    The last `validated` events of each history are not learnt: they validate, to choose which weights are kept.
    """

    lines: Sequence[str]
    contents: Sequence[str]
    histories: Histories
    validated: int


def prepare_lancer(
    folder: Path,
    told: LancerTrainingData,
    backbone: Backbone,
    lm: str,
    card: AdapterCard,
    config: LancerConfig,
    seed: int,
) -> dict[str, int]:
    """Write the folder that both stages train from, and return its counts: items, targets, line_tokens (of all lines).

    `lm` is the language model's folder or hub name, which every worker resolves itself. Raises ValueError if no history
    has two events before those that validate. Raises UsageError if the model's context does not hold two items, or if
    several items are to be learnt at once by a model with a chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = int(np.maximum(told.histories.lengths - told.validated - 1, 0).sum())
    if not targets:
        raise ValueError("No user has two events before the cut, so there is no next item to learn.")
    lines = answer_tokens(backbone, told.lines)
    contents = [ids[: config.content_tokens] for ids, _ in backbone.encode_pieces([[text] for text in told.contents])]
    for name, rows in (("line", lines), ("content", contents)):
        np.save(folder / f"{name}s.npy", np.concatenate([np.asarray(row, np.int32) for row in rows]))
        np.save(folder / f"{name}_ends.npy", np.cumsum([len(row) for row in rows]))
    np.save(folder / "histories.npy", told.histories.items)
    np.save(folder / "history_ends.npy", told.histories.ends)
    frames = [FrameTokens.of(backbone, frame) for frame in (config.prompts.frame, *config.prompts.training)]
    if frames[0].after and config.learnt > 1:
        raise UsageError(
            "This language model answers in turns of a chat, and several items cannot be learnt in one.",
            "Set --lancer.learnt 1, or name a model without a chat template.",
        )
    room = backbone.context - config.room
    longest = max(map(len, lines)) + max(len(frame.join) for frame in frames)
    if room < max(frame.around for frame in frames) + 2 * longest:
        raise UsageError(
            f"Two items of up to {longest} tokens do not fit the {room} tokens that the language model leaves them.",
            "Shorten --lancer.prompts.line, lower --lancer.reads, or name a language model of a longer context.",
        )
    (folder / _MARKER).write_text(
        json.dumps(
            {
                "lm": lm,
                "seed": seed,
                "end": backbone.ends[0],
                "room": room,
                "validated": told.validated,
                "frames": [asdict(frame) for frame in frames],
                "config": config.model_dump(mode="json"),
                "card": {**asdict(card), "config": card.config.model_dump(mode="json")},
            }
        )
    )
    return {"items": len(lines), "targets": targets, "line_tokens": sum(map(len, lines))}


class LancerExamples:
    """Reads the prepared folder; an epoch learns at most the last `positions` stretches of each history."""

    def __init__(self, folder: Path, positions: int) -> None:
        self.folder, self.positions = folder, positions
        try:
            told = json.loads((folder / _MARKER).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared items; call prepare_lancer first.") from None
        config = AdapterConfig.model_validate(told["card"].pop("config"))
        self.card = AdapterCard(config=config, **told["card"])
        self.config = LancerConfig.model_validate(told["config"])
        self.frames = [FrameTokens(**frame) for frame in told["frames"]]
        self.lm, self.seed, self.end = str(told["lm"]), int(told["seed"]), int(told["end"])
        self.room, self.validated = int(told["room"]), int(told["validated"])
        self._order: NDArray[np.int64] = np.zeros((0, 0, 3), np.int64)
        self._order_of: tuple[int, int, int] | None = None

    @property
    def items(self) -> int:
        return len(self._content_ends)

    def contents(self) -> list[list[int]]:
        """Token ids of the contents of all items, in order of index."""
        return [self.content(item) for item in range(1, self.items + 1)]

    def stretches(self, offset: int) -> NDArray[np.int64]:
        """The stretches of all histories, int64 [stretches, 3]: row, first event, and number of events.

        Stretches have `learnt` events, but a history's first stretch has `offset` fewer and its last one may be cut
        short.
        """
        size = self.config.learnt
        targets = np.maximum(
            self.lengths - self.validated - 1, 0
        )  # All events but the first have something before them.
        counts = np.where(targets > 0, -(-(targets + offset) // size), 0)
        rows = np.repeat(np.arange(len(targets)), counts)
        nth = np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)
        firsts = np.maximum(nth * size - offset, 0)
        stops = np.minimum((nth + 1) * size - offset, targets[rows])
        found = np.stack([rows, 1 + firsts, stops - firsts], 1)
        if self.positions < counts.max(initial=0):
            # The last ones are kept: recent choices are nearer to what is asked.
            found = found[(counts[rows] - nth) <= self.positions]
        return found

    def drawn(self, step: int, seed: int, batch_size: int) -> NDArray[np.int64]:
        """The stretches of a step, of similar length: int64 [batch, 3]."""
        steps = max(1, self.count // batch_size)
        epoch, index = divmod(step, steps)
        if self._order_of != (epoch, seed, batch_size):
            rng = np.random.default_rng((seed, epoch))
            # Every epoch cuts the histories at other places.
            found = self.stretches(int(rng.integers(self.config.learnt)))
            found = found[rng.permutation(len(found))][: steps * batch_size]
            lengths = np.minimum(found[:, 1], self.config.shown) + found[:, 2]
            group = np.arange(len(found)) // (batch_size * _SORTED_BATCHES)
            found = found[np.lexsort((lengths, group))]
            if len(found) >= batch_size:
                found = found.reshape(steps, batch_size, 3)[rng.permutation(steps)]
            self._order = found.reshape(steps, -1, 3)
            self._order_of = (epoch, seed, batch_size)
        return self._order[index]

    def learnt(self, stretch: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first items of a stretch, as many as fit the context in every frame, and at least one."""
        row, first, count = stretch.tolist()
        items = self._events(row, first, first + count)
        join = max(len(frame.join) for frame in self.frames)
        before = int(self.line_lengths[self._events(row, first - 1, first)[0]]) + join
        before += max(frame.around for frame in self.frames)
        costs = (self.line_lengths[items] + join).cumsum()
        return items[: max(1, int((costs + before <= self.room).sum()))]

    def histories(
        self, stretches: NDArray[np.int64], *, read_once: bool, frames: NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """A batch of `stretches` int64 [batch, 3].

        For the reasoning prompt, the batch holds the vectors of the items before each stretch if items are `read_once`,
        otherwise their contents. `frames` int64 [batch] are numbers of frames; None is the first frame for all.
        """
        around = np.zeros(len(stretches), np.int64) if frames is None else frames
        told = [self._words(stretch, self.frames[frame]) for stretch, frame in zip(stretches, around, strict=True)]
        rows, labels = zip(*told, strict=True)
        batch = padded(rows)
        batch["labels"] = padded(labels, "labels", IGNORED)["labels/tokens"]
        if not self.config.reasoning:
            return batch
        read = [self._events(row, max(0, first - self.config.reads), first) for row, first, _ in stretches.tolist()]
        if read_once:
            return batch | padded_vectors([self._vectors[items] for items in read], PREFIX)
        distinct = np.unique(np.concatenate(read))
        most = max(map(len, read))
        places = np.zeros((len(read), most), np.int64)
        known = np.zeros((len(read), most), bool)
        for row, items in enumerate(read):
            places[row, most - len(items) :] = np.searchsorted(distinct, items)
            known[row, most - len(items) :] = True
        batch |= {f"{PREFIX}/rows": torch.from_numpy(places), f"{PREFIX}/known": torch.from_numpy(known)}
        return batch | padded([self.content(int(item)) for item in distinct], "items")

    def _words(self, stretch: NDArray[np.int64], frame: FrameTokens) -> tuple[list[int], list[int]]:
        """Tokens and labels of a stretch: the lines that are shown, then the lines that are learnt.

        Behind a learnt line, where the words that join it to the next begin, the label is the end mark.
        """
        row, first, _ = stretch.tolist()
        learnt = self.learnt(stretch)
        tail: list[int] = []
        labels: list[int] = []
        for number, item in enumerate(learnt.tolist()):
            line = self._line(item)
            follows = frame.join if number < len(learnt) - 1 else [self.end]
            tail += [*line, *follows]
            # Where the joining words begin, the token read is theirs and the label is the end mark.
            labels += [*line, self.end, *[IGNORED] * (len(follows) - 1)]
        shown: list[int] = []
        left = self.room - len(tail) - frame.around
        for item in reversed(self._events(row, max(0, first - self.config.shown), first).tolist()):
            line = self._line(item)
            left -= len(line) + len(frame.join)
            if left < 0 and shown:
                break
            shown = [*line, *frame.join, *shown]
        head = [*frame.start, *shown, *frame.after]
        return head + tail, [IGNORED] * len(head) + labels

    def learnt_tokens(self, stretch: NDArray[np.int64]) -> int:
        """How many tokens of a stretch are learnt: those of its lines and one end mark for each."""
        items = self.learnt(stretch)
        return int(self.line_lengths[items].sum()) + len(items)

    def _events(self, row: int, first: int, stop: int) -> NDArray[np.int64]:
        start = int(self._starts[row])
        return self._items[start + first : start + stop].astype(np.int64)

    def _line(self, item: int) -> list[int]:
        return self._lines[self._line_ends[item - 1] - self.line_lengths[item] : self._line_ends[item - 1]].tolist()

    def content(self, item: int) -> list[int]:
        start = self._content_ends[item - 2] if item > 1 else 0
        return self._contents[start : self._content_ends[item - 1]].tolist()

    @cached_property
    def count(self) -> int:
        """The number of stretches of an epoch at offset 0, which gives the fewest."""
        return len(self.stretches(0))

    @cached_property
    def _lines(self) -> NDArray[np.int32]:
        return np.load(self.folder / "lines.npy", mmap_mode="r")

    @cached_property
    def _line_ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "line_ends.npy")

    @cached_property
    def line_lengths(self) -> NDArray[np.int64]:
        """Tokens of each item's line, int64 [items + 1], indexed by item; entry 0 is 0."""
        return np.concatenate([[0], np.diff(self._line_ends, prepend=0)])

    @cached_property
    def _contents(self) -> NDArray[np.int32]:
        return np.load(self.folder / "contents.npy", mmap_mode="r")

    @cached_property
    def _content_ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "content_ends.npy")

    @cached_property
    def _items(self) -> NDArray[np.int32]:
        return np.load(self.folder / "histories.npy", mmap_mode="r")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "history_ends.npy")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], self._ends[:-1]])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return self._ends - self._starts

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        return np.load(self.folder / VECTORS, mmap_mode="r")
