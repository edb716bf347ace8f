"""LANCER (arXiv 2309.10435): a language model reads what a user chose and writes the next item.

There are two copies of one model. The `reader` stays frozen; it reads an item's content under a knowledge prompt, which
is virtual tokens before every layer. The state of its last layer at the content's last token represents the item. The
`writer` reads the history as words under a reasoning prompt, which is made of the representations of the last items
(`raypipe.language.prefixes`). It writes the next item's line in as many beams as are asked for. The text is grounded to
the catalogue (`raypipe.language.grounding`), or decoding is constrained to the catalogue's lines.

Where paper and published code differ, the paper is the default, except for the representation: the published code takes
the embedding of padding, which is the same for every item, and that is kept as an ablation. Ours: what replaces a
prompt that is left out (without a reasoning prompt the writer reads the knowledge prompt itself; without a knowledge
prompt items attend to one another), learning several items at once, and the words around items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.engines.engine import Choices, Decoding, Engine, Outcome
from raypipe.language.adapters import AdapterConfig, LoraOptions
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.prefixes import PREFIX, PrefixConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.summary_prompts import SummaryPrompts

NAME = "lancer"
"""Under which its models are stored."""

TRAINING = {"epochs": 20, "batch_size": 16, "lr": 2e-4, "weight_decay": 0.0}
"""Of the second stage, as published, where Adam decays no weights; the first stage has its own number of epochs."""

_ATTRIBUTES, _TITLE = "{attributes}", "{title}"


class Frame(Config):
    """The words around items."""

    lead: str = shaping("A person chose, oldest first:", "what stands before the first", min_length=1)
    join: str = shaping(" ->", "what follows every item", min_length=1)


class Perturbation(Config):
    """Words that replace those of a frame."""

    lead: str | None = shaping(None, "unset: that of the frame", min_length=1)
    join: str | None = shaping(None, "unset: that of the frame", min_length=1)

    def of(self, frame: Frame) -> Frame:
        return Frame(lead=self.lead or frame.lead, join=self.join or frame.join)


class LancerPrompts(Config):
    """The templates of items' lines and the words around them."""

    line: str = shaping("{attributes} : {title}", "an item, in histories and answers; without {attributes} the title")
    frame: Frame = shaping(Frame, "in training, and when it is asked")
    training: tuple[Frame, ...] = shaping(
        (), "other frames of training, drawn as often as that one: figures hang less on the words"
    )
    perturbed: tuple[Perturbation, ...] = free(
        (
            Perturbation(lead="Someone picked these, the oldest first:"),
            Perturbation(lead="History:"),
            Perturbation(join=","),
            Perturbation(lead="What comes next?", join=" |"),
        ),
        "other words in which it is asked too, none of training's: how far figures hang on them",
    )

    @model_validator(mode="after")
    def _lines_hold_titles(self) -> LancerPrompts:
        if self.line.count(_TITLE) != 1 or self.line.count(_ATTRIBUTES) > 1:
            raise ValueError(f"the line {self.line!r} needs {_TITLE} once, and may have {_ATTRIBUTES}")
        if set(self.perturbed_frames) & {self.frame, *self.training}:
            raise ValueError("a perturbed frame is one of training's")
        return self

    @property
    def perturbed_frames(self) -> list[Frame]:
        return [one.of(self.frame) for one in self.perturbed]


class LancerConfig(Config):
    """Options: what is read and written, what is trained, and how the model is asked."""

    knowledge: bool = shaping(True, "items are read under a knowledge prompt; without one items attend to one another")
    reasoning: bool = shaping(
        True, "the writer reads a reasoning prompt; without one the knowledge prompt itself, where there is one"
    )
    virtual_tokens: int = shaping(20, "of the knowledge prompt, in every layer", ge=1)
    reads: int = shaping(10, "last items of which the reasoning prompt is made, a virtual token each", ge=1)
    residual: bool = shaping(False, "an item's representation stays beside what it reads of the knowledge prompt")
    representation: Literal["last", "mean", "padding"] = shaping(
        "last",
        "the state at a content's last token, the mean of all, or, as published code has it, padding's embedding",
    )
    shown: int = shaping(10, "last items that are shown in words", ge=1)
    learnt: int = shaping(
        1,
        "items that follow one another and are learnt at once, each from those before it; published one at a time",
        ge=1,
    )
    first_stage: Literal["items", "both"] = shaping(
        "both", "while both models stay as they are, contents of items are learnt alone, or histories too"
    )
    first_epochs: float = shaping(5, "of the first stage, over the items; 0 leaves it out", ge=0)
    second_stage: Literal["trained", "frozen"] = shaping(
        "trained", "the knowledge prompt of the second stage; frozen, every item is read once"
    )
    lora: LoraOptions | None = shaping(None, "updates of the writer; unset: all of its weights are trained")
    text_characters: int = shaping(200, "characters of an item's text in its content", ge=0)
    content_tokens: int = shaping(32, "most tokens of a content", ge=2)
    beams: int = shaping(
        10, "lines that are searched for each user; of one alone no search tells the probability", ge=2
    )
    constrained: bool = shaping(False, "lines are held to the catalogue's; the published figures do without")
    filter_seen: bool = shaping(True, "what a user has seen is left out of the list")
    cold_events: int = shaping(5, "a user of fewer events than this is cold, and an item too", ge=1)
    prompts: LancerPrompts = shaping(LancerPrompts)

    @model_validator(mode="after")
    def _prompts_there(self) -> LancerConfig:
        if not self.knowledge and self.first_epochs and self.first_stage == "items":
            raise ValueError("without a knowledge prompt nothing learns the items' contents: set first_epochs to 0")
        return self

    @property
    def prefix(self) -> PrefixConfig | None:
        if not self.knowledge and not self.reasoning:
            return None
        tokens, reads = self.virtual_tokens * self.knowledge, self.reads * self.reasoning
        return PrefixConfig(knowledge=tokens, vectors=reads, residual=self.residual)

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(lora=self.lora, full=self.lora is None, prefix=self.prefix)

    @property
    def reads_once(self) -> bool:
        """Whether items are read only once, before the second stage, as it does not change their representations."""
        moves = self.second_stage == "trained" and self.knowledge and self.representation != "padding"
        return self.reasoning and not moves

    @property
    def room(self) -> int:
        """The largest number of virtual tokens before a prompt."""
        return self.prefix.room if self.prefix else 0

    def lines(self, catalogue: Catalogue) -> list[str]:
        """The line of every item; an item without attribute values is its title alone."""
        found = []
        for title, attributes in zip(catalogue.titles, catalogue.attributes, strict=True):
            values = ", ".join(value for name in sorted(attributes) for value in attributes[name])
            whole = self.prompts.line if values or _ATTRIBUTES not in self.prompts.line else _TITLE
            # Replaced in one pass, so that a title that looks like a mark stays a title.
            line = "".join({_ATTRIBUTES: values, _TITLE: title}.get(piece, piece) for piece in _pieces(whole))
            found.append(" ".join(line.split()))
        return found

    def contents(self, catalogue: Catalogue) -> list[str]:
        """The content of every item, which the reader reads."""
        return catalogue.lines(SummaryPrompts(text_characters=self.text_characters))


@dataclass(frozen=True)
class Lancer:
    """Makes the prompts about users and asks an engine.

    `vectors` float32 [items + 1, hidden] represent the items; None without a reasoning prompt. `room` is the largest
    number of tokens that a prompt's words may take.
    """

    config: LancerConfig
    lines: Sequence[str]
    vectors: NDArray[np.float32] | None
    tokenizer: PromptTokenizer
    room: int

    def prompts(
        self, histories: Sequence[Sequence[int]], read: Sequence[Sequence[int]], frame: Frame | None = None
    ) -> list[Prompt]:
        """The prompt after each history.

        `histories` hold item indices in time order, each at least one; `read` are the items that the reasoning prompts
        are made of. A prompt shows as many of the last items as fit, and the last one in any case. Raises ValueError if
        a history is empty.
        """
        frame = frame or self.config.prompts.frame
        lead, join = self.tokenizer.count_tokens([frame.lead, frame.join])
        found = []
        for history, others in zip(histories, read, strict=True):
            if not len(history):
                raise ValueError("A history without an item tells nothing of the next.")
            left, shown = self.room - lead - self._wrapping, 0
            for item in reversed(history[-self.config.shown :]):
                left -= int(self._costs[item - 1]) + join
                if left < 0 and shown:
                    break
                shown += 1
            pieces = [piece for item in history[-shown:] for piece in (f" {self.lines[item - 1]}", frame.join)]
            segments: list[str | Vectors] = [frame.lead, *pieces]
            if self.vectors is not None:
                segments.insert(0, Vectors(self.vectors[list(others[-self.config.reads :])], PREFIX))
            found.append(Prompt.of(*segments))
        return found

    def choices(self) -> Choices | None:
        """The lines that answers are constrained to, or None if answers are free."""
        return Choices(tuple(self.lines)) if self.config.constrained else None

    def answers(self, engine: Engine, prompts: Sequence[Prompt], most_tokens: int) -> list[Outcome]:
        """The outcome of each prompt, in order, with its beams best first; without an answer there are no beams."""
        decoding = Decoding(max_new_tokens=most_tokens, beams=self.config.beams)
        return sorted(engine.generate(prompts, decoding, self.choices()), key=attrgetter("index"))

    @cached_property
    def _costs(self) -> NDArray[np.int64]:
        return np.array(self.tokenizer.count_tokens([f" {line}" for line in self.lines]), np.int64)

    @cached_property
    def _wrapping(self) -> int:
        """Tokens that special marks and a chat turn take."""
        ((ids, _),) = self.tokenizer.encode_pieces([[""]])
        return len(ids)


def _pieces(line: str) -> list[str]:
    """A line's template split at its marks; the marks are pieces of their own."""
    for mark in (_ATTRIBUTES, _TITLE):
        line = line.replace(mark, f"\0{mark}\0")
    return line.split("\0")


def lists_of(
    grounded: Sequence[NDArray[np.int64]], seen: Sequence[Sequence[int]], *, filter_seen: bool
) -> list[dict[int, int]]:
    """For each user, the listed items in the order of their beams, each with the first beam that was grounded to it.

    `grounded` holds an item index per beam; 0 means no item and is left out. With `filter_seen`, items that the user
    has `seen` are left out too.
    """
    found = []
    for items, mine in zip(grounded, seen, strict=True):
        without = {0, *(mine if filter_seen else ())}
        first: dict[int, int] = {}
        for beam, item in enumerate(items.tolist()):
            if item not in without:
                first.setdefault(item, beam)
        found.append(first)
    return found


def ranks_of_lists(
    lists: Sequence[Sequence[int]], targets: Sequence[int], candidates: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each user, how many items rank above the target and how many tie with it (with itself): int64 [users] each.

    A target that is not in the user's list is tied, behind the list, with all the other unlisted items; `candidates`
    says how many items there are to rank for each user.
    """
    above, same = np.zeros(len(lists), np.int64), np.ones(len(lists), np.int64)
    for row, (mine, target, count) in enumerate(zip(lists, targets, candidates, strict=True)):
        if target in mine:
            above[row] = mine.index(target)
        else:
            above[row], same[row] = len(mine), max(1, count - len(mine))
    return above, same


def grounding_figures(
    exact: Sequence[NDArray[np.bool_]], margins: Sequence[NDArray[np.float32]], cutoffs: Sequence[int] = (1, 5, 10)
) -> Mapping[str, float]:
    """How far lists are the model's own words rather than a result of grounding.

    `exact@k` is the share of the first k answers that are exactly a line, `guessed` the share of all answers that are
    not. `margin` is, over these, the mean by which the nearest line's cosine exceeds the second nearest's.
    """
    found = {}
    for k in cutoffs:
        first = np.concatenate([np.zeros(0, bool), *(mine[:k] for mine in exact)])
        found[f"exact@{k}"] = float(first.mean()) if len(first) else 0.0
    guessed = [margin[~mine] for margin, mine in zip(margins, exact, strict=True)]
    wide = np.concatenate([np.zeros(0, np.float32), *guessed])
    return found | {"guessed": 1 - _mean(exact), "margin": float(wide.mean()) if len(wide) else 0.0}


def _mean(rows: Sequence[NDArray[np.bool_]]) -> float:
    flat = np.concatenate([np.zeros(0, bool), *rows])
    return float(flat.mean()) if len(flat) else 0.0
