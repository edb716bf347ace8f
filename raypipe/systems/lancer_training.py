"""Training of LANCER in two stages (arXiv 2309.10435, section 4.3), and its validation.

First the prompts alone, both models as they are: contents of items under the knowledge prompt, and histories under the reasoning
prompt. Then the writer too, on histories. A stretch of items that follow one another is learnt at once: each of its lines, and the
end behind it, is told from what precedes, with the reasoning prompt of the items before the stretch; what joins items is read and
never learnt, so that a stretch of n is n exercises that share their beginning.

`prepare_lancer` writes, and `LancerTask` reads, one folder:

    lines.npy, line_ends.npy            int32 [tokens], int64 [items]: the items' lines, one after the other
    contents.npy, content_ends.npy      alike, their contents as the reader reads them
    histories.npy, history_ends.npy     int32 [events], int64 [users]: what training sees, and behind it what validates
    vectors.npy                         float32 [items + 1, hidden], where items are read once, written between the stages
    first.safetensors                   the prompts after the first stage
    prepared.json                       what is trained, and how; written last: its existence means that the rest is complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, AdapterConfig, build_adapter, save_adapter
from raypipe.language.backbone import Backbone, PromptTokenizer, load_backbone
from raypipe.language.prefixes import PREFIX
from raypipe.language.soft_prompts import IGNORED, SoftPromptLm, padded_vectors
from raypipe.language.trie import answer_tokens
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import Frame, LancerConfig
from raypipe.systems.lancer_reading import padded, read_items, represent

Stage = Literal["first", "second"]
FIRST = "first.safetensors"
VECTORS = "vectors.npy"
_MARKER = "prepared.json"
_SORTED_BATCHES = 16
_VALIDATED_AT_ONCE = 32
_SHOWN = 4  # examples of a batch whose loss is no number
_CHARACTERS = 200


@dataclass(frozen=True)
class FrameTokens:
    """Token ids of the words around items, what wraps a prompt included: before the first item, behind every item, and behind
    the last one, which no tokenizer without a chat template has."""

    start: list[int]
    join: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PromptTokenizer, frame: Frame) -> FrameTokens:
        ((ids, (place,)),) = tokenizer.encode_pieces([[frame.lead, 1]])
        ((both, (left, right)),) = tokenizer.encode_pieces([[1, frame.join, 1]])
        return cls(ids[:place], both[left + 1 : right], ids[place + 1 :])


@dataclass(frozen=True)
class Told:
    """What is trained on: the lines and contents of all items, and histories, the last `validated` events of which are not
    learnt but tell which weights are kept."""

    lines: Sequence[str]
    contents: Sequence[str]
    histories: Histories
    validated: int


def prepare_lancer(
    folder: Path, told: Told, backbone: Backbone, lm: str, card: AdapterCard, config: LancerConfig, seed: int
) -> dict[str, int]:
    """Writes the folder both stages train from, and returns its counts: items, targets, tokens of all lines.

    `lm` is the language model's folder or hub name, found again on every worker. Raises ValueError where no history has two
    events, and UsageError where the model's context does not hold two items.
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
    frame = FrameTokens.of(backbone, config.prompts.frame)
    if frame.after and config.learnt > 1:
        raise UsageError(
            "This language model answers in turns of a chat, and several items cannot be learnt in one.",
            "Set --lancer.learnt 1, or name a model without a chat template.",
        )
    room = backbone.context - config.room
    longest = max(map(len, lines)) + len(frame.join)
    if room < len(frame.start) + len(frame.after) + 2 * longest:
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
                "frame": asdict(frame),
                "config": config.model_dump(mode="json"),
                "card": {**asdict(card), "config": card.config.model_dump(mode="json")},
            }
        )
    )
    return {"items": len(lines), "targets": targets, "line_tokens": sum(map(len, lines))}


def store_vectors(folder: Path) -> None:
    """Writes how items are represented when the second stage begins, into the folder that it trains from."""
    task = LancerTask(folder, "second", 1, 1)
    backbone = load_backbone(task.lm, device="cpu")
    reader = load_backbone(task.lm, device="cpu").model
    prefix = build_adapter(backbone, task.card, task.seed).prefix
    if prefix is not None and (folder / FIRST).is_file():
        told = {name.removeprefix("prefix."): weight for name, weight in load_file(folder / FIRST).items()}
        prefix.load_state_dict(told, strict=False)
    vectors = read_items(reader, prefix, task.contents(), task.config.representation, task.end)
    np.save(folder / VECTORS, vectors)


class LancerLm(nn.Module):
    """The writer with the prompts, and the reader where items are read in training; forward is the loss of a step."""

    def __init__(self, adapted: SoftPromptLm, reader: Any, config: LancerConfig, pad: int) -> None:
        super().__init__()
        self.adapted, self.reader, self.config, self.pad = adapted, reader, config, pad

    def train(self, mode: bool = True) -> LancerLm:
        """The reader stays in eval mode, dropout off."""
        super().train(mode)
        if self.reader is not None:
            self.reader.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of whatever the batch holds: `tokens`, `mask` and `labels` of histories with `prefix/known`, and `contents/tokens` and
        `contents/mask`, which are learnt.

        `prefix/vectors` represent items, or `prefix/rows` [batch, count] say which of `items/tokens` they are, to be read here.
        """
        losses = []
        if "tokens" in batch:
            losses.append(self.adapted(self.with_vectors(batch)))
        if "contents/tokens" in batch:
            losses.append(self._content_loss(batch["contents/tokens"], batch["contents/mask"]))
        return torch.stack(losses).sum()

    def with_vectors(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if "items/tokens" not in batch:
            return batch
        vectors = represent(
            self.reader or self.adapted.lm,
            self.adapted.prefix,
            batch["items/tokens"],
            batch["items/mask"],
            self.config.representation,
            self.pad,
        )
        return {**batch, f"{PREFIX}/vectors": vectors[batch[f"{PREFIX}/rows"]]}

    def _content_loss(self, tokens: Tensor, mask: Tensor) -> Tensor:
        lm: Any = self.reader or self.adapted.lm
        states = represent(lm, self.adapted.prefix, tokens, mask, "all", self.pad)
        labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
        wanted = labels != IGNORED
        logits = lm.get_output_embeddings()(states[:, :-1][wanted])
        return functional.cross_entropy(logits.float(), labels[wanted])


class LancerTask:
    """What a trainer needs to know of one stage; picklable, reads files where it runs. Implements `ValidatedTask`."""

    def __init__(self, folder: Path, stage: Stage, positions: int, asked: int) -> None:
        """An epoch learns at most `positions` stretches of each history, the last ones; at most `asked` users validate."""
        self.folder, self.stage, self.positions, self.asked = Path(folder), stage, positions, asked
        try:
            told = json.loads((self.folder / _MARKER).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no prepared items; call prepare_lancer first.") from None
        config = AdapterConfig.model_validate(told["card"].pop("config"))
        self.card = AdapterCard(config=config, **told["card"])
        self.config = LancerConfig.model_validate(told["config"])
        self.frame = FrameTokens(**told["frame"])
        self.lm, self.seed, self.end = str(told["lm"]), int(told["seed"]), int(told["end"])
        self.room, self.validated = int(told["room"]), int(told["validated"])
        self._order: NDArray[np.int64] = np.zeros((0, 0, 3), np.int64)
        self._order_of: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[type[LancerTask], tuple[Path, Stage, int, int]]:
        return type(self), (self.folder, self.stage, self.positions, self.asked)

    @property
    def learns_histories(self) -> bool:
        return self.stage == "second" or self.config.first_stage == "both"

    def build(self) -> nn.Module:
        """The model of the stage. The second starts from the prompts of the first, where there was one."""
        backbone = load_backbone(self.lm, device="cpu")
        self._tokenizer = backbone
        adapted = build_adapter(backbone, self.card, self.seed)
        self._kept = {f"adapted.{name}" for name, weight in adapted.named_parameters() if weight.requires_grad}
        if self.stage == "first":
            adapted.lm.requires_grad_(False)
            self._kept = {name for name in self._kept if name.startswith("adapted.prefix.")}
            if not self.learns_histories and adapted.prefix is not None:
                for name, weight in adapted.prefix.named_parameters():
                    weight.requires_grad_(name.startswith("knowledge."))
            return LancerLm(adapted, None, self.config, self.end)
        if (self.folder / FIRST).is_file():
            adapted.load_state_dict(load_file(self.folder / FIRST), strict=False)
        reader = None
        if self.config.reasoning and not self._vectors_stored:
            reader = load_backbone(self.lm, device="cpu").model.requires_grad_(False).eval()
        elif self.config.reasoning and self.config.knowledge:
            # What items were represented by may not move any more; their keys and values neither.
            assert adapted.prefix is not None
            adapted.prefix.knowledge.requires_grad_(False)
        return LancerLm(adapted, reader, self.config, self.end)

    def keeps(self, name: str) -> bool:
        return name in self._kept

    def steps_per_epoch(self, batch_size: int) -> int:
        if self.stage == "first":
            return max(1, len(self._content_ends) // batch_size)
        return max(1, self._count // batch_size)

    def batch(self, step: int, seed: int, rank: int, world: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's share of the global batch of `step`: a function of the arguments alone.

        `count` is that of all ranks' learnt tokens, divided by their number.
        """
        found: dict[str, Tensor] = {}
        if self.learns_histories:
            whole = self._drawn(step, seed, batch_size)
            found = self._histories(whole[rank::world])
            learnt = sum(int(self._line_lengths[items].sum()) + len(items) for items in map(self._learnt, whole))
            found["count"] = torch.tensor(learnt / world)
        if self.stage == "first" and self.config.knowledge:
            epoch, index = divmod(step, self.steps_per_epoch(batch_size))
            order = np.random.default_rng((seed, epoch, 3)).permutation(len(self._content_ends)) + 1
            mine = order[index * batch_size : (index + 1) * batch_size][rank::world]
            found |= padded([self._content(int(item)) for item in mine], "contents")
        return found

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {name.removeprefix("adapted."): weight for name, weight in weights.items()}
        if self.stage == "second":
            save_adapter(folder, self.card, named)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in named.items()}, folder / FIRST)

    @torch.no_grad()
    def validate(self, module: nn.Module, rank: int, world: int) -> tuple[float, float]:
        """How likely the line of the first event behind training's is, of this rank's share of users: a sum of logarithms."""
        assert isinstance(module, LancerLm)
        there = np.flatnonzero(self._lengths > self.validated)
        there = there[self._lengths[there] - self.validated >= 1]
        rows = np.sort(np.random.default_rng(0).permutation(there)[: self.asked])[rank::world]
        total = 0.0
        for start in range(0, len(rows), _VALIDATED_AT_ONCE):
            part = rows[start : start + _VALIDATED_AT_ONCE]
            firsts = self._lengths[part] - self.validated
            batch = self._histories(np.stack([part, firsts, np.ones_like(part)], 1))
            batch["count"] = torch.tensor(1.0)
            device = next(module.parameters()).device
            total -= float(module.adapted(module.with_vectors({k: v.to(device) for k, v in batch.items()})))
        return total, float(len(rows))

    def describe(self, step: int, seed: int, batch_size: int) -> str:
        """The beginnings of the batch's texts."""
        batch = self.batch(step, seed, 0, 1, batch_size)
        tokens = batch["tokens"] if "tokens" in batch else batch["contents/tokens"]
        texts = self._tokenizer.decode(tokens[:_SHOWN].tolist())
        return "; ".join(repr(text[:_CHARACTERS]) for text in texts)

    def contents(self) -> list[list[int]]:
        """Of all items, in order of their index."""
        return [self._content(item) for item in range(1, len(self._content_ends) + 1)]

    def _stretches(self, offset: int) -> NDArray[np.int64]:
        """Row, first event and number of events of every stretch of all histories; the first of each has up to `offset` fewer
        events, or `learnt` more where that leaves none."""
        size = self.config.learnt
        targets = np.maximum(
            self._lengths - self.validated - 1, 0
        )  # All events but the first have something before them.
        counts = np.where(targets > 0, -(-(targets + offset) // size), 0)
        rows = np.repeat(np.arange(len(targets)), counts)
        nth = np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts)
        firsts = np.maximum(nth * size - offset, 0)
        stops = np.minimum((nth + 1) * size - offset, targets[rows])
        found = np.stack([rows, 1 + firsts, stops - firsts], 1)
        if self.positions < counts.max(initial=0):
            # The last ones: what somebody does now is nearer to what is asked.
            found = found[(counts[rows] - nth) <= self.positions]
        return found

    def _drawn(self, step: int, seed: int, batch_size: int) -> NDArray[np.int64]:
        """The stretches of a step, int64 [batch, 3], of like length."""
        steps = max(1, self._count // batch_size)
        epoch, index = divmod(step, steps)
        if self._order_of != (epoch, seed, batch_size):
            rng = np.random.default_rng((seed, epoch))
            # Every epoch cuts histories elsewhere.
            found = self._stretches(int(rng.integers(self.config.learnt)))
            found = found[rng.permutation(len(found))][: steps * batch_size]
            lengths = np.minimum(found[:, 1], self.config.shown) + found[:, 2]
            group = np.arange(len(found)) // (batch_size * _SORTED_BATCHES)
            found = found[np.lexsort((lengths, group))]
            if len(found) >= batch_size:
                found = found.reshape(steps, batch_size, 3)[rng.permutation(steps)]
            self._order = found.reshape(steps, -1, 3)
            self._order_of = (epoch, seed, batch_size)
        return self._order[index]

    def _learnt(self, stretch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Items of a stretch that fit."""
        row, first, count = stretch.tolist()
        items = self._events(row, first, first + count)
        frame = len(self.frame.start) + len(self.frame.after) + len(self.frame.join)
        before = int(self._line_lengths[self._events(row, first - 1, first)[0]])
        costs = (self._line_lengths[items] + len(self.frame.join)).cumsum()
        return items[: max(1, int((costs + frame + before <= self.room).sum()))]

    def _histories(self, stretches: NDArray[np.int64]) -> dict[str, Tensor]:
        rows, labels = zip(*(self._words(stretch) for stretch in stretches), strict=True)
        batch = padded(rows)
        batch["labels"] = padded(labels, "labels", IGNORED)["labels/tokens"]
        if not self.config.reasoning:
            return batch
        read = [self._events(row, max(0, first - self.config.reads), first) for row, first, _ in stretches.tolist()]
        if self._vectors_stored:
            return batch | padded_vectors([self._vectors[items] for items in read], PREFIX)
        distinct = np.unique(np.concatenate(read))
        most = max(map(len, read))
        places = np.zeros((len(read), most), np.int64)
        known = np.zeros((len(read), most), bool)
        for row, items in enumerate(read):
            places[row, most - len(items) :] = np.searchsorted(distinct, items)
            known[row, most - len(items) :] = True
        told = {f"{PREFIX}/rows": torch.from_numpy(places), f"{PREFIX}/known": torch.from_numpy(known)}
        return batch | told | padded([self._content(int(item)) for item in distinct], "items")

    def _words(self, stretch: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Tokens and labels of a stretch: behind the lines that are shown, those that are learnt, each with the end for a label
        where what joins it to the next begins."""
        row, first, _ = stretch.tolist()
        learnt = self._learnt(stretch)
        frame = self.frame
        tail: list[int] = []
        labels: list[int] = []
        for number, item in enumerate(learnt.tolist()):
            line = self._line(item)
            follows = frame.join if number < len(learnt) - 1 else [self.end]
            tail += [*line, *follows]
            # The end of one line has the place of another's label: it stands for the token that is not read.
            labels += [*line, self.end, *[IGNORED] * (len(follows) - 1)]
        shown: list[int] = []
        left = self.room - len(tail) - len(frame.start) - len(frame.after)
        for item in reversed(self._events(row, max(0, first - self.config.shown), first).tolist()):
            line = self._line(item)
            left -= len(line) + len(frame.join)
            if left < 0 and shown:
                break
            shown = [*line, *frame.join, *shown]
        head = [*frame.start, *shown, *frame.after]
        return head + tail, [IGNORED] * len(head) + labels

    def _events(self, row: int, first: int, stop: int) -> NDArray[np.int64]:
        start = int(self._starts[row])
        return self._items[start + first : start + stop].astype(np.int64)

    def _line(self, item: int) -> list[int]:
        return self._lines[self._line_ends[item - 1] - self._line_lengths[item] : self._line_ends[item - 1]].tolist()

    def _content(self, item: int) -> list[int]:
        start = self._content_ends[item - 2] if item > 1 else 0
        return self._contents[start : self._content_ends[item - 1]].tolist()

    @cached_property
    def _count(self) -> int:
        """Stretches of an epoch, the fewest."""
        return len(self._stretches(0))

    @cached_property
    def _lines(self) -> NDArray[np.int32]:
        return np.load(self.folder / "lines.npy", mmap_mode="r")

    @cached_property
    def _line_ends(self) -> NDArray[np.int64]:
        return np.load(self.folder / "line_ends.npy")

    @cached_property
    def _line_lengths(self) -> NDArray[np.int64]:
        """By item."""
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
    def _lengths(self) -> NDArray[np.int64]:
        return self._ends - self._starts

    @property
    def _vectors_stored(self) -> bool:
        return self.stage == "second" and self.config.reads_once

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        return np.load(self.folder / VECTORS, mmap_mode="r")
