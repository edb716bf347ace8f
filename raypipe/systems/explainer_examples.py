"""The training examples of RecExplainer's tasks, and how users and items are represented in prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import SoftExample
from raypipe.language.templates import Piece, Templates, fill
from raypipe.metrics.text import item_values, value_counts
from raypipe.systems.explainer_prompts import ExplainerPrompts
from raypipe.systems.explanations import NO, YES, ExplanationRequest, reference_explanation
from raypipe.systems.source import Source, drawn_places
from raypipe.systems.teacher import CANDIDATES, Taught, most_similar, teach, teachable

USER, ITEM = "user", "item"
SEPARATOR = "; "
Form = Literal["text", "vectors", "both"]
Task = Literal["T1", "T2", "T3", "T4", "T5", "T6", "T6b", "explanation"]
_USERS_AT_ONCE = 512


@dataclass(frozen=True)
class PromptPieces:
    """Represents users and items in a prompt as titles, as a recommender's vectors, or as both.

    `titles` are indexed by item index − 1, `vectors` float32 [items + 1, width] are the items', and at most the last
    `most` titles of a history are shown.
    """

    form: Form
    titles: Sequence[str]
    vectors: NDArray[np.float32]
    most: int

    def user(self, items: Sequence[int], state: NDArray[np.float32]) -> Piece:
        """The piece for a user whose history is `items` (item indices) and whose state after it is `state` [width]."""
        history = SEPARATOR.join(self.titles[item - 1] for item in items[-self.most :])
        vector = Vectors(state[None], USER)
        pieces: dict[Form, Piece] = {"text": history, "vectors": vector, "both": [f"{history} ", vector]}
        return pieces[self.form]

    def item(self, item: int) -> Piece:
        title, vector = self.titles[item - 1], Vectors(self.vectors[item][None], ITEM)
        pieces: dict[Form, Piece] = {"text": title, "vectors": vector, "both": [f"{title} ", vector]}
        return pieces[self.form]

    def request(
        self, items: Sequence[int], state: NDArray[np.float32], item: int, prompts: ExplainerPrompts, focus: str
    ) -> ExplanationRequest:
        """The prompts that ask whether `item` fits the user, and why.

        The user is given by their history `items` and the `state` after it. A non-empty `focus` names what the
        explanation should attend to.
        """
        pieces: dict[str, Piece] = {"user": self.user(items, state), "item": self.item(item), "focus": focus}
        explanation = (prompts.focus if focus else "") + prompts.explanation.test[0]
        return ExplanationRequest(fill(prompts.interest.test[0], pieces), fill(explanation, pieces))

    def items(self, items: Sequence[int]) -> Piece:
        parts: list[str | Vectors] = []
        for number, item in enumerate(items):
            piece = self.item(item)
            parts += [SEPARATOR] if number else []
            parts += [piece] if isinstance(piece, str | Vectors) else piece
        return parts


class ExplainerExamples:
    """Examples of the chosen tasks in the given forms, from users who are not held out."""

    def __init__(
        self,
        source: Source,
        forms: Sequence[Form],
        titles: int,
        prompts: ExplainerPrompts,
        rng: np.random.Generator,
        *,
        listed: bool = True,
        pairs: int = 1,
        text_characters: int = 0,
    ) -> None:
        self.source, self.prompts, self.rng, self.titles = source, prompts, rng, titles
        self.listed, self.pairs, self.text_characters = listed, pairs, text_characters
        self.shown = {form: PromptPieces(form, source.titles, source.item_states, titles) for form in forms}
        self.alone = PromptPieces("vectors", source.titles, source.item_states, titles)

    @property
    def with_vectors(self) -> bool:
        return any(form != "text" for form in self.shown)

    def of_users(self, tasks: Sequence[Task], users: int, positions: int) -> Iterator[SoftExample]:
        rows = self.source.rows(held_out=False, least=1, most=users, rng=self.rng)
        for start in range(0, len(rows), _USERS_AT_ONCE):
            chosen = rows[start : start + _USERS_AT_ONCE]
            last = self.source.histories.lengths[chosen]
            if {"T1", "T2", "T3", "explanation"} & set(tasks):
                longer = last > 1
                yield from self._at_positions(
                    tasks, *drawn_places(chosen[longer], last[longer] - 1, positions, self.rng)
                )
            if "T6" in tasks and self.with_vectors:
                yield from self._histories(*drawn_places(chosen, last, positions, self.rng))
            if "T6b" in tasks:
                yield from self._summaries(chosen)

    def of_items(self, repeats: int = 1) -> Iterator[SoftExample]:
        """The examples of T4, `repeats` times for every item."""
        similar = most_similar(self.source)
        descriptions = self.source.catalogue.descriptions(self.text_characters)
        for row in list(range(len(similar))) * repeats:
            if self.with_vectors:
                yield self._asked(self.prompts.title, {"item": self.alone.item(row + 1)}, self.source.titles[row])
            for shown in self.shown.values():
                item = shown.item(row + 1)
                told = {name: ", ".join(values) for name, values in self.source.catalogue.attributes[row].items()}
                if descriptions[row]:  # else a catalogue's own attribute of that name stays
                    told["description"] = descriptions[row]
                for name, answer in told.items():
                    if answer:
                        yield self._asked(self.prompts.attribute, {"item": item, "attribute": name}, answer)
                nearest = self.source.titles[int(similar[row]) - 1]
                yield self._asked(self.prompts.similar, {"item": item}, nearest)

    def of_lists(self, repeats: int) -> Iterator[SoftExample]:
        """Examples that ask for the titles of several items in turn; each item is in `repeats` lists."""
        count = len(self.source.titles)
        for _ in range(repeats):
            drawn = self.rng.permutation(count) + 1
            for at in range(0, count, CANDIDATES):
                items = drawn[at : at + CANDIDATES].tolist()
                for shown in self.shown.values():
                    answer = SEPARATOR.join(self.source.titles_of(items))
                    yield self._asked(self.prompts.titles, {"items": shown.items(items)}, answer)

    def _at_positions(
        self, tasks: Sequence[Task], rows: NDArray[np.int64], events: NDArray[np.int64]
    ) -> Iterator[SoftExample]:
        enough = teachable(self.source, events)
        rows, events = rows[enough], events[enough]
        if not len(rows):
            return
        taught = teach(self.source, rows, events, self.rng)
        orders = taught.orders
        pairs = set(self._some_of_each(rows).tolist())
        for at, (row, count) in enumerate(zip(rows.tolist(), events.tolist(), strict=True)):
            items = self.source.items(row, count)
            for shown in self.shown.values():
                user = shown.user(items, taught.states[at])
                if "T1" in tasks:
                    favourite = self.source.titles[int(taught.favourites[at]) - 1]
                    yield self._asked(self.prompts.next_item, {"user": user}, favourite)
                if "T2" in tasks:
                    candidates = taught.candidates[at]
                    pieces = {"user": user, "items": shown.items(candidates.tolist())}
                    ranked = SEPARATOR.join(self.source.titles_of(candidates[orders[at]].tolist()))
                    yield self._asked(self.prompts.ranking, pieces, ranked)
                both = ((int(taught.liked[at]), YES), (int(taught.disliked[at]), NO))
                if "T3" in tasks and at in pairs:
                    for item, answer in both:
                        pieces = {"user": user, "item": shown.item(item)}
                        yield self._asked(self.prompts.interest, pieces, answer)
                if "explanation" in tasks:
                    item, answer = both[self.rng.integers(2)]
                    pieces = {"user": user, "item": shown.item(item)}
                    yield self._asked(self.prompts.explanation, pieces, self._explained(answer, items, item))

    def _some_of_each(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw, for each distinct row in `rows`, up to `pairs` of its places uniformly: indices into `rows`."""
        if self.pairs == 1:
            # One draw a row, as the published tasks draw, so that what was trained on them can be trained again.
            _, firsts, counts = np.unique(rows, return_index=True, return_counts=True)
            return firsts + self.rng.integers(counts)
        order = np.lexsort((self.rng.random(len(rows)), rows))
        _, firsts, counts = np.unique(rows[order], return_index=True, return_counts=True)
        return order[np.arange(len(rows)) - np.repeat(firsts, counts) < self.pairs]

    def _explained(self, answer: str, items: Sequence[int], item: int) -> str:
        attributes = self.source.catalogue.attributes
        history = value_counts(item_values(attributes[one - 1]) for one in items[-self.titles :])
        values = sorted(item_values(attributes[item - 1]))
        return reference_explanation(answer, self.source.titles[item - 1], history, values)

    def _histories(self, rows: NDArray[np.int64], events: NDArray[np.int64]) -> Iterator[SoftExample]:
        states = self.source.states(rows, events)
        for row, count, state in zip(rows.tolist(), events.tolist(), states, strict=True):
            items = self.source.items(row, count)
            titles = self.source.titles_of(items[-self.titles :])
            answer = SEPARATOR.join(titles) if self.listed else titles[self.rng.integers(len(titles))]
            yield self._asked(self.prompts.history, {"user": self.alone.user(items, state)}, answer)

    def _summaries(self, rows: NDArray[np.int64]) -> Iterator[SoftExample]:
        rows = np.array([row for row in rows.tolist() if row in self.source.summaries], np.int64)
        events = self.source.histories.lengths[rows]
        states = self.source.states(rows, events)
        for row, count, state in zip(rows.tolist(), events.tolist(), states, strict=True):
            items = self.source.items(row, count)
            for shown in self.shown.values():
                yield self._asked(self.prompts.summary, {"user": shown.user(items, state)}, self.source.summaries[row])

    def _asked(self, templates: Templates, pieces: dict[str, Piece], answer: str) -> SoftExample:
        template = templates.training[self.rng.integers(len(templates.training))]
        return SoftExample(fill(template, pieces), answer)


@dataclass(frozen=True)
class HeldOutPrompts:
    """The prompts about held-out users after their last event before the cut.

    `liked` and `disliked` ask T3's question about one item; `candidates` asks it about each of a user's five in turn.
    """

    next_item: list[Prompt]
    ranking: list[Prompt]
    candidates: list[Prompt]
    liked: list[Prompt]
    disliked: list[Prompt]
    history: list[Prompt]

    @staticmethod
    def of(
        source: Source,
        rows: NDArray[np.int64],
        taught: Taught,
        shown: PromptPieces,
        prompts: ExplainerPrompts,
        shift: int = 0,
    ) -> HeldOutPrompts:
        """Prompts for the users in `rows`. As a control, `shift` replaces each user by the one `shift` places on."""
        users, states = np.roll(rows, -shift), np.roll(taught.states, -shift, axis=0)
        alone = PromptPieces("vectors", shown.titles, shown.vectors, shown.most)
        found = HeldOutPrompts([], [], [], [], [], [])
        for at, (row, state) in enumerate(zip(users.tolist(), states, strict=True)):
            items = source.items(row, int(source.histories.lengths[row]))
            user = {"user": shown.user(items, state)}
            candidates = taught.candidates[at].tolist()
            for asked, templates, pieces in (
                (found.next_item, prompts.next_item, user),
                (found.ranking, prompts.ranking, {**user, "items": shown.items(candidates)}),
                *((found.candidates, prompts.interest, {**user, "item": shown.item(item)}) for item in candidates),
                (found.liked, prompts.interest, {**user, "item": shown.item(int(taught.liked[at]))}),
                (found.disliked, prompts.interest, {**user, "item": shown.item(int(taught.disliked[at]))}),
                (found.history, prompts.history, {"user": alone.user(items, state)}),
            ):
                asked.append(fill(templates.test[at % len(templates.test)], pieces))
        return found
