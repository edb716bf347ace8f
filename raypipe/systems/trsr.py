"""LLM-TRSR (arXiv 2403.13325, section 3.3): a language model answers yes or no to a candidate.

A prompt holds the instruction, the summary of the user's long-term preferences, the last items and the candidate's
text. The score is the softmax over the logits of yes and no. For every event that training reads there is one prompt
with its item and one for each item drawn beside it. A summary in a prompt covers only what came before the event. A
user's prompts differ only in the candidate, which comes last, so that an engine reads the rest once.

The paper shows the last 5 items; its code learns both prompt and answer (`loss: text`). `facts` is ours: a candidate's
line ends with numbers of what counts and texts tell about it (`candidate_facts`), also only of what came before the
event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator, model_validator

from raypipe.config import Config, free, shaping
from raypipe.data.candidates import CandidateSets, draw_unseen
from raypipe.engines.engine import Engine, OutcomeError
from raypipe.language.adapters import AdapterConfig, LoraOptions, check_updates
from raypipe.language.answers import telling_beginnings
from raypipe.language.backbone import PromptTokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import SoftExample
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.language.templates import fill, require_marks
from raypipe.recommenders.windows import Histories
from raypipe.storage.hashing import mix
from raypipe.systems.boosted_trees import TreesConfig
from raypipe.systems.candidate_facts import FORM, Facts
from raypipe.systems.trsr_disturbed import Disturbed
from raypipe.systems.trsr_past import Past, PastSummaries

NAME = "trsr"
Shown = Literal["trained", "hierarchical", "recurrent"] | None
"""The paradigm of the summaries that are shown, None for none; `trained` is that of the training."""
TRAINING = {"epochs": 5, "lr": 1e-4, "validate_every": 1}
"""As published: the best of the epochs by validation is kept."""
YES, NO = "yes", "no"
NOTHING = "NULL"
"""Stands where there is no summary, or no last item is shown."""

Control = Literal["no summaries", "shuffled summaries"]

_PROMPT = """One person's preference summary tells what they like in the long term, their recent items what they are after now. \
Weigh both, and say whether the person will choose the candidate next. Answer yes or no.
Preference summary: {summary}
Recent items:
{recent}
Candidate: {candidate}
Answer:"""
_USERS_AT_ONCE = 256
_PROMPTS_AT_ONCE = 5_000
_DISTURBED = np.uint64(0x5851F42D4C957F2D)


class CandidateOptions(Config):
    """The candidates that every model ranks."""

    negatives: int = shaping(20, "items a user never chose, beside the one that came next", ge=1)
    seed: int = shaping(0, "of the draw, which also follows from the user's id and history", ge=0)


def shown_summaries(wanted: Shown, lineage: Mapping[str, Any]) -> str | None:
    """The paradigm of the summaries that a ranker of this lineage is shown, None for none."""
    return lineage["summaries"] if wanted == "trained" else wanted


class TrsrConfig(Config):
    """Options: what is shown of a user and a candidate, what is learnt, and what is ranked."""

    recent: int | None = shaping(
        5, "last items that are shown, of `history` at most: 0 for none, null for all of it", ge=0
    )
    history: int = shaping(25, "last events of a user that are shown or counted, those of the summary apart", ge=1)
    attributes: tuple[str, ...] = shaping((), "an item's attributes that are shown; all of them when empty")
    text_characters: int = shaping(0, "characters of an item's text that are shown beside its title", ge=0)
    facts: bool = shaping(False, "numbers from 0 to 9 in a candidate's line, of what counts and texts tell of it")
    missing: float = shaping(0.0, "share of the users whose summary is left out", ge=0, le=1)
    noise: float = shaping(0.0, "share of the users who have somebody else's summary", ge=0, le=1)
    history_missing: float = shaping(
        0.0, "share of the events before the cut that are neither shown nor counted as the user's own", ge=0, le=1
    )
    history_noise: float = shaping(
        0.0, "share of these events that are shown as of an item drawn at random", ge=0, le=1
    )
    block_items: int = shaping(5, "of the blocks that summaries were written of", ge=1)
    negatives: int = shaping(1, "items drawn beside each item that is learnt", ge=1)
    loss: Literal["answer", "text"] = shaping("answer", "learnt is the answer alone, or the whole text as released")
    lora: LoraOptions | None = shaping(lambda: LoraOptions(rank=8, alpha=16), "updates of the language model")
    embeddings: bool = shaping(False, "the language model's embedding table and head are trained too")
    full: bool = shaping(False, "every weight of the language model is trained; set lora to null")
    prompt: str = shaping(_PROMPT, "marks {summary}, {recent} and, behind them, {candidate}")
    candidates: CandidateOptions = shaping(CandidateOptions, "what is ranked")
    trees: TreesConfig = shaping(TreesConfig, "boosted trees, measured beside it")
    controls: tuple[Control, ...] = free(
        ("no summaries", "shuffled summaries"), "how it is asked once more where there are summaries"
    )
    against: str | None = free(
        None, "NAME or NAME/HASH of a stored one, whose ranks of the same candidates are compared user by user"
    )

    @field_validator("prompt")
    @classmethod
    def _candidate_comes_last(cls, template: str) -> str:
        marks = ("summary", "recent", "candidate")
        require_marks([template], marks)
        places = [template.find(f"{{{mark}}}") for mark in marks]
        if places[2] != max(places):
            raise ValueError(f"the template {template!r} needs {{candidate}} behind the other marks")
        return template

    @model_validator(mode="after")
    def _something_is_trained(self) -> TrsrConfig:
        if self.lora is None and not self.embeddings and not self.full:
            raise ValueError("without lora, embeddings or full nothing would be trained")
        check_updates(self.lora, self.full)
        if self.missing + self.noise > 1:
            raise ValueError("missing and noise are shares of the same users")
        if self.history_missing + self.history_noise > 1:
            raise ValueError("history_missing and history_noise are shares of the same events")
        return self

    def undisturbed(self) -> TrsrConfig:
        """The same config without an ablation's disturbance: every user is shown their own summary and events."""
        return self.model_copy(update={"missing": 0.0, "noise": 0.0, "history_missing": 0.0, "history_noise": 0.0})

    def lines(self, catalogue: Catalogue) -> list[str]:
        """The line that is shown of each item."""
        return catalogue.lines(SummaryPrompts(attributes=self.attributes, text_characters=self.text_characters))

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(lora=self.lora, embeddings=self.embeddings, full=self.full)


class Trsr:
    """The prompts of a ranker for one language model: what it learns, and what it is asked.

    `tokenizer` is that of the model, and `context` the largest number of tokens it reads. `facts` replaces the facts
    that would otherwise be counted from all of `past`. Raises ValueError if the tokenizer cannot tell yes and no apart
    after a prompt.
    """

    def __init__(
        self, config: TrsrConfig, past: Past, tokenizer: PromptTokenizer, context: int, facts: Facts | None = None
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.lines = config.lines(past.catalogue)
        self._costs = np.array(tokenizer.count_tokens([f"{line}\n" for line in self.lines]))
        bare = self._prompt("", "", "").text
        self.answers = telling_beginnings(tokenizer, bare, (YES, NO))
        (frame,), spelled = tokenizer.encode([bare]), tokenizer.count_tokens([f" {YES}", f" {NO}"])
        # Tokens left for the summary and the lines of items, the candidate's included; 1 is for the end mark.
        self._room = context - len(frame) - max(spelled) - 1
        if config.facts:
            self._room -= max(tokenizer.count_tokens([f"; {FORM.replace('{}', str(number))}" for number in range(10)]))
        self._facts = {} if facts is None else {0: facts}
        self._learn_of(past)

    def of(self, histories: Histories, summaries: PastSummaries) -> Trsr:
        """The same ranker for other users: it keeps what was made from the catalogue alone, or was given."""
        other = copy(self)
        nobody = np.zeros(len(histories), bool)
        other._learn_of(Past(histories, nobody, self.past.catalogue, summaries))
        return other

    def _learn_of(self, past: Past) -> None:
        keys = np.arange(len(past.histories)) if past.histories.users is None else past.histories.users
        self.past = past
        shares = self.config.history_missing, self.config.history_noise
        # Only what is told of a user's past is disturbed, and not what is learnt, asked for or counted of all users.
        self._told_past = Disturbed.of(past.histories, keys, *shares, len(self.lines))
        self._fates = mix(keys.view(np.uint64) ^ _DISTURBED)
        # The rows whose summaries may be shown as another user's.
        self._summarised = np.array([row for row in sorted(past.summaries.texts) if not past.held_out[row]], np.int64)

    def examples(self, users: int, positions: int, left: int, rng: np.random.Generator) -> Iterator[SoftExample]:
        """Training examples: yes to an item that was chosen, no to items drawn beside it.

        They are of the last `positions` items of at most `users` histories that are not held out. The last `left`
        events before the cut are left to validation.
        """
        histories = self.past.histories
        rows = rng.permutation(np.flatnonzero(~self.past.held_out & (histories.lengths > left + 1)))[:users]
        whole = self.config.loss == "text"
        for back in range(left + 1, left + positions + 1):
            learnt = rows[histories.lengths[rows] > back]
            for start in range(0, len(learnt), _USERS_AT_ONCE):
                chosen = learnt[start : start + _USERS_AT_ONCE]
                targets = histories.items[histories.ends[chosen] - back]
                # What a user chose before the cut is never learnt as a no; what they chose after it is not known here.
                seen = histories.take(histories.starts[chosen], histories.lengths[chosen])
                seeds = rng.integers(0, 2**63, len(chosen)).astype(np.uint64)
                negatives, filled = draw_unseen(seeds, seen.items, seen.lengths, len(self.lines), self.config.negatives)
                owners = chosen[filled]
                candidates = np.concatenate([targets[filled, None], negatives[filled]], 1)
                for prompts in self.prompts(owners, back, candidates, self.summaries(owners, back)):
                    for number, prompt in enumerate(prompts):
                        yield SoftExample(prompt, NO if number else YES, whole)

    def summaries(self, rows: NDArray[np.int64], back: int, control: Control | None = None) -> list[str | None]:
        """Summaries of all but the last `back` events of histories `rows` [n], disturbed by config or control."""
        if control == "no summaries":
            return [None] * len(rows)
        pairs = list(zip(rows.tolist(), (self.past.histories.lengths[rows] - back).tolist(), strict=True))
        if control == "shuffled summaries" and len(pairs) > 1:
            pairs = [*pairs[1:], *pairs[:1]]
        found = [self.past.summaries.at(row, count) for row, count in pairs]
        if control == "shuffled summaries" and len(pairs) == 1:
            found = [self._of_another(int(rows[0]), back)]
        fates = self._fates[rows].astype(np.float64) / 2.0**64
        for place in np.flatnonzero(fates < self.config.missing + self.config.noise):
            missing = fates[place] < self.config.missing
            found[place] = None if missing else self._of_another(int(rows[place]), back)
        return found

    def _of_another(self, row: int, back: int) -> str | None:
        """The summary of another drawn user than that of `row`; None if nobody else has one."""
        count = len(self._summarised)
        at = int(self._fates[row] >> np.uint64(8)) % count if count else 0
        if count and self._summarised[at] == row:
            at = (at + 1) % count
        if not count or self._summarised[at] == row:
            return None
        other = int(self._summarised[at])
        return self.past.summaries.at(other, int(self.past.histories.lengths[other]) - back)

    def prompts(
        self, rows: NDArray[np.int64], back: int, candidates: NDArray[np.int32], summaries: Sequence[str | None]
    ) -> Iterator[list[Prompt]]:
        """Prompts about each of `candidates` [n, k] after all but the last `back` events of the histories `rows` [n].

        A prompt shows as many last items as fit. One that is too long even without any is given as it is; the caller or
        engine has to reject it.
        """
        known = _told_of(summaries)
        rooms = self._rooms(known, candidates)
        prefixes = self._told_past.prefixes(rows, self.past.histories.lengths[rows] - back)
        facts = self._told(prefixes, back, candidates)
        for place, (room, told) in enumerate(zip(rooms, facts, strict=False)):
            recent = self._recent(prefixes, place, room)
            shown = "\n".join(self.lines[item - 1] for item in recent) or NOTHING
            lines = [
                f"{self.lines[item - 1]}{fact}" for item, fact in zip(candidates[place].tolist(), told, strict=False)
            ]
            yield [self._prompt(known[place], shown, line) for line in lines]

    def shown(
        self, rows: NDArray[np.int64], back: int, candidates: NDArray[np.int32], summaries: Sequence[str | None]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many last items the `prompts` of the same arguments show of each history: int64 [n].

        Also how many they would show if the context had no limit: int64 [n].
        """
        rooms = self._rooms(_told_of(summaries), candidates)
        prefixes = self._told_past.prefixes(rows, self.past.histories.lengths[rows] - back)
        shown = [len(self._recent(prefixes, place, room)) for place, room in enumerate(rooms)]
        return np.array(shown, np.int64), np.array([self._most(count) for count in prefixes.lengths.tolist()], np.int64)

    def scores(
        self, engine: Engine, rows: NDArray[np.int64], sets: CandidateSets, control: Control | None = None
    ) -> Iterator[Scored]:
        """Score the candidates of users in `rows` [n] after all events before the cut; yield parts of the users."""
        summaries = self.summaries(rows, 0, control)
        at_once = max(1, _PROMPTS_AT_ONCE // sets.items.shape[1])
        for start in range(0, len(rows), at_once):
            part = slice(start, min(start + at_once, len(rows)))
            asked = list(self.prompts(rows[part], 0, sets.items[part], summaries[part]))
            yield self._scored(engine, part, [prompt for prompts in asked for prompt in prompts])

    def _scored(self, engine: Engine, part: slice, prompts: Sequence[Prompt]) -> Scored:
        found, users = likelihoods(engine, prompts, [self.answers] * len(prompts)), part.stop - part.start
        each = len(prompts) // users
        errors = {number // each: error for number, error in found.errors.items()}
        yes = found.yes.reshape(users, each)
        # If one candidate of a user could not be asked about, all get the same score, which ranks them by chance.
        yes[list(errors)] = 0
        return Scored(part, yes, found.tokens.reshape(users, each).sum(1), errors)

    def facts(self, back: int = 0) -> Facts:
        """The facts by the counts of all but the last `back` events of users who are not held out."""
        if back not in self._facts:
            base, past = self.past.learnable.without_last(back), self.past
            # Only one is kept: learning goes back event by event.
            self._facts = {back: Facts.of(base, past.vectors, past.neighbours, self.config.history)}
        return self._facts[back]

    def _told(self, prefixes: Histories, back: int, candidates: NDArray[np.int32]) -> Iterable[Iterable[str]]:
        """The text that ends the line of each candidate of each prefix."""
        if not self.config.facts:
            return repeat(repeat(""))
        return ([f"; {fact}" for fact in mine] for mine in self.facts(back).told(prefixes, candidates))

    def _rooms(self, known: Sequence[str], candidates: NDArray[np.int32]) -> list[int]:
        """How many tokens each summary and the longest line of its candidates leave for the last items."""
        longest = self._costs[candidates - 1].max(1).tolist()
        taken = self.tokenizer.count_tokens(known)
        return [self._room - summary - line for summary, line in zip(taken, longest, strict=True)]

    def _most(self, events: int) -> int:
        """How many of `events` events are shown if they fit."""
        most = min(self.config.history, events)
        return most if self.config.recent is None else min(most, self.config.recent)

    def _recent(self, prefixes: Histories, place: int, room: int) -> list[int]:
        """The last items of the prefix at `place`, oldest first, that are shown in `room` tokens."""
        most, end = self._most(int(prefixes.lengths[place])), int(prefixes.ends[place])
        recent = prefixes.items[end - most : end]
        # Lines are counted one by one: joined they may take fewer tokens, and at most one newline's cost more.
        fits = int(np.searchsorted(self._costs[recent[::-1] - 1].cumsum(), room, side="right"))
        return recent[most - fits :].tolist()

    def _prompt(self, summary: str, recent: str, candidate: str) -> Prompt:
        return fill(self.config.prompt, {"summary": summary, "recent": recent, "candidate": candidate})


@dataclass(frozen=True)
class Scored:
    """Scores of a `part` of the users [n].

    `yes` [n, candidates] is the probability of yes, `tokens` int64 [n] counts the prompts' tokens. `errors` says why a
    user has no answer, by the user's number in the part.
    """

    part: slice
    yes: NDArray[np.float64]
    tokens: NDArray[np.int64]
    errors: Mapping[int, OutcomeError]


@dataclass(frozen=True)
class Likelihoods:
    """Answers to n prompts.

    `yes` float64 [n] is the probability of the first of a prompt's two answers, NaN if there is no answer; `tokens`
    int64 [n] counts the prompt's tokens; `errors` says why there is no answer, by the prompt's number.
    """

    yes: NDArray[np.float64]
    tokens: NDArray[np.int64]
    errors: Mapping[int, OutcomeError]


def likelihoods(engine: Engine, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Likelihoods:
    """How likely the first of the two answers to each prompt is, as the engine scores them."""
    yes, tokens = np.full(len(prompts), np.nan), np.zeros(len(prompts), np.int64)
    errors: dict[int, OutcomeError] = {}
    for scores in engine.score(prompts, answers):
        tokens[scores.index] = scores.tokens_in
        if scores.error is None:
            yes[scores.index] = 1 / (1 + np.exp(scores.logprobs[1] - scores.logprobs[0]))
        else:
            errors[scores.index] = scores.error
    return Likelihoods(yes, tokens, errors)


def best_first(yes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places of candidates [..., k] by falling probability of yes; equally likely ones keep their order."""
    return np.argsort(-yes, axis=-1, kind="stable")


def _told_of(summaries: Iterable[str | None]) -> list[str]:
    """The text of each user's long past in prompts: the summary in one line, or `NOTHING`."""
    return [" ".join(summary.split()) if summary else NOTHING for summary in summaries]
