"""RecInterpreter (arXiv 2310.20487): a language model puts a recommender's hidden state into words.

There are two tasks (section 3.3). Recovery names, from one soft token of the state after a history, its last titles in
order. Residual names, from two soft tokens of what was before and after one event, the title of that event. If residual
is learnt from item vectors, it also puts into words what a recommender would have next: the oracle of DreamRec (section
3.4), and the query of any other recommender. Templates of training and of tests are disjoint.

A small language model learns both tasks far sooner if states are whitened and stand right before the answer, and if it
also learns every item's title from the state after that item alone (`whitened`, `catalogue_repeats`; not in the paper).
When it writes a list, it reads the first title from the state and the others from what it already wrote. If each title
is an answer of its own and the likeliest are named (`listed`: false; ours), all of them come from the state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from raypipe.config import Config, free, shaping
from raypipe.engines.engine import Choices, Decoding, Engine, EngineConfig, Outcome
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterConfig, LoraOptions, check_updates
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import Injection, SoftExample
from raypipe.language.templates import Templates, fill
from raypipe.recommenders.prefixes import prefix_states
from raypipe.recommenders.windows import Histories
from raypipe.systems.interpreter_figures import SEPARATOR, recovery_figures, residual_figures, title_in
from raypipe.systems.interpreter_prompts import InterpreterPrompts
from raypipe.systems.judges import Rubric
from raypipe.systems.oracles import SOURCE, Oracle, oracles_of
from raypipe.systems.preference import PREFERENCE, RULE, PreferenceJudges, preferences
from raypipe.systems.probes import LabelledVectors
from raypipe.systems.projection import AdaptedLm, probed
from raypipe.systems.source import Source, drawn_places
from raypipe.systems.title_search import ONE_TITLE, TitleQuestion

TRAINING = {"epochs": 100, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-6}
"""As its code has it; the paper says nothing of it."""
_USERS_AT_ONCE = 256
_TITLES_OF_A_PLACE = 4  # learnt as answers of their own; no more, as neighbouring places share most of their titles
CONTROLS = ("shuffled states", "no states")
NEAREST = "nearest item"


class InterpreterConfig(Config):
    """Options: what is read, from which states, and how states become tokens."""

    titles: int = shaping(10, "last events of a history that recovery names", ge=1)
    listed: bool = shaping(
        True,
        "they are one answer, oldest first, as published; else each is an answer of its own, and those that a search finds "
        "likeliest are named",
    )
    pool: Literal["last", "learned_positions", "each"] = shaping(
        "last",
        "the state after the last event; or the states after each of these, of which the projector reads, as released, a "
        "learned sum, or each by itself",
    )
    after: Literal["state", "item"] = shaping(
        "state", "residual's other side: the state after the event, or the vector of its item, as an oracle needs it"
    )
    projector: Literal["linear", "mlp", "qformer"] = shaping("linear", "as published; the others for comparison")
    tokens: int = shaping(1, "tokens that a qformer makes of the states; with pool: each it attends over them", ge=1)
    whitened: bool = shaping(False, "the projector's first layer starts as the whitening of the states")
    injection: Injection = shaping("replace", "tokens of states replace what the model reads, or are added to a word")
    lora: LoraOptions | None = shaping(None, "unset: the language model is frozen")
    embeddings: bool = shaping(False, "the language model's embedding table and head are trained too")
    full: bool = shaping(False, "every weight of the language model is trained; set lora to null")
    catalogue_repeats: int = shaping(
        0, "how often each item's title is learnt, from the state after it alone or, with after: item, its vector", ge=0
    )
    constrained: bool = shaping(
        False,
        "when it is measured, titles are decoded among the catalogue's; the published tables do without, and `serve` has a "
        "switch of its own",
    )
    prompts: InterpreterPrompts = shaping(InterpreterPrompts)
    judges: dict[str, EngineConfig] = free(
        dict,
        "name → engine, as JSON, lm `builtin` being the workspace's own: whether what an oracle names fits better than another "
        "item, beside a rule that counts",
    )
    rubric: Rubric = free(
        lambda: Rubric(prompt=PREFERENCE),
        "what they are asked: {history}, {one} and {other}; decoding.seed draws which of the two comes first",
    )

    @model_validator(mode="after")
    def _can_be_trained_and_judged(self) -> InterpreterConfig:
        if RULE in self.judges:
            raise ValueError(f"the judge {RULE!r} is there anyway: give the engine another name")
        self.rubric.ask(dict.fromkeys(("history", "one", "other"), ""))
        check_updates(self.lora, self.full)
        if self.projector == "qformer" and self.pool == "learned_positions":
            raise ValueError("a qformer attends to nothing where one sum of the states is left: set pool to each")
        return self

    @property
    def projection(self) -> ProjectorConfig:
        return ProjectorConfig(
            kind=self.projector,
            pool="learned_positions" if self.pool == "learned_positions" else "each",
            positions=self.titles,
            tokens=self.tokens,
            whitened=self.whitened,
        )

    def build(self) -> RecInterpreter:
        return RecInterpreter(self)


@dataclass(frozen=True)
class Reading:
    """One history to be read.

    The vectors `before` and `after` its last event, the `other_side` of residual, and its last titles, oldest first.
    """

    before: Vectors
    after: Vectors
    other_side: Vectors
    history: list[str]

    @property
    def title(self) -> str:
        return self.history[-1]


class RecInterpreter:
    """Implements `System`."""

    name = "recinterpreter"

    def __init__(self, config: InterpreterConfig) -> None:
        self.config, self.prompts = config, config.prompts
        self.judges = PreferenceJudges(config.judges, config.rubric)

    @property
    def recovery(self) -> Templates:
        """The templates of recovery: for the list of titles or, if not `listed`, for one of them."""
        return self.prompts.recovery if self.config.listed else self.prompts.recovery_of_one

    @property
    def recovery_question(self) -> TitleQuestion:
        """The question of recovery; residual and the oracle ask for one title."""
        return TitleQuestion(self.config.titles, searched=not self.config.listed)

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained; one projector reads the states of both tasks."""
        config = self.config
        return AdapterConfig(
            projectors={SOURCE: config.projection},
            injection=config.injection,
            lora=config.lora,
            embeddings=config.embeddings,
            full=config.full,
        )

    def examples(self, source: Source, users: int, positions: int, rng: np.random.Generator) -> Iterator[SoftExample]:
        """Examples of both tasks at each place (residual from the second event on), then those of the catalogue.

        Raises UsageError, before anything is trained, if a judge cannot be asked.
        """
        self._check_judges()
        rows = source.rows(held_out=False, least=2, most=users, rng=rng)
        for start in range(0, len(rows), _USERS_AT_ONCE):
            chosen = rows[start : start + _USERS_AT_ONCE]
            owners, events = drawn_places(chosen, source.histories.lengths[chosen], positions, rng)
            for reading in self.readings(source, owners, events):
                for answer in self._recovered(reading, rng):
                    template = self.recovery.training[rng.integers(len(self.recovery.training))]
                    yield SoftExample(recovery_prompt(template, reading), answer)
                if len(reading.before.values):
                    template = self.prompts.residual.training[rng.integers(len(self.prompts.residual.training))]
                    yield SoftExample(residual_prompt(template, reading), reading.title)
        if not self.config.catalogue_repeats:
            return
        vectors = self._item_vectors(source)
        for _ in range(self.config.catalogue_repeats):
            for vector, title in zip(vectors, source.titles, strict=True):
                template = self.prompts.item[rng.integers(len(self.prompts.item))]
                yield SoftExample(fill(template, {"item": Vectors(vector[None], SOURCE)}), title)

    def _recovered(self, reading: Reading, rng: np.random.Generator) -> list[str]:
        """The answers that recovery learns for a history: its titles as one list, or some drawn titles one by one."""
        if self.config.listed:
            return [SEPARATOR.join(reading.history)]
        count = min(_TITLES_OF_A_PLACE, len(reading.history))
        return rng.choice(np.array(reading.history, object), count, replace=False).tolist()

    def _item_vectors(self, source: Source) -> NDArray[np.float32]:
        """A vector for every item, [items, width]: its own with `after: item`, otherwise the state after it alone."""
        if self.config.after == "item":
            return source.item_states[1:]
        count = len(source.titles)
        alone = Histories(np.arange(1, count + 1, dtype=np.int32), np.arange(1, count + 1))
        return prefix_states(source.recommender, alone, np.arange(count), np.ones(count, np.int64))

    def readings(self, source: Source, rows: NDArray[np.int64], events: NDArray[np.int64]) -> Iterator[Reading]:
        """Read the first `events` [n] of the histories in `rows` [n], in order.

        Before the first event of a history there is no vector: `before` is then empty.
        """
        span = 1 if self.config.pool == "last" else self.config.titles
        firsts = np.maximum(events - span, 1)  # the first event after which the state is needed
        counts = events - firsts + 1
        offsets = np.concatenate([[0], counts.cumsum()])
        needed = np.repeat(firsts - offsets[:-1], counts) + np.arange(offsets[-1])
        # Readings of one history share most of their states, so each state is computed once.
        pairs, places = np.unique(np.stack([np.repeat(rows, counts), needed], 1), axis=0, return_inverse=True)
        states = source.states(pairs[:, 0], pairs[:, 1])[places.ravel()]
        for at, (row, count) in enumerate(zip(rows.tolist(), events.tolist(), strict=True)):
            mine = states[offsets[at] : offsets[at + 1]]
            items = source.items(row, count)
            after = Vectors(mine[-span:], SOURCE)
            item = Vectors(source.item_states[items[-1]][None], SOURCE)
            yield Reading(
                Vectors(mine[:-1][-span:], SOURCE),
                after,
                after if self.config.after == "state" else item,
                source.titles_of(items[-self.config.titles :]),
            )

    def measured(self, source: Source, engine: Engine, asked: int, most_tokens: int) -> dict[str, float]:
        """Figures of the tasks after the last event of held-out users; a control's figures begin with its name.

        In the control "shuffled states" each user is asked with the next user's states, in "no states" with the words
        alone. `refused` counts the questions of a task that could not be asked; they count as answers that say nothing.
        Raises UsageError if a judge cannot be asked.
        """
        self._check_judges()
        rows = source.rows(held_out=True, least=2, most=asked, rng=np.random.default_rng(0))
        events = source.histories.lengths[rows]
        readings: list[Reading] = list(self.readings(source, rows, events))
        told: list[Oracle] = []
        if self.config.after == "item":
            states = np.concatenate([reading.after.values[-1:] for reading in readings])
            told = oracles_of(source, source.queries(states, rows, events))
        judges = self.judges.build(source) if told else {}
        seed = self.judges.rubric.decoding.seed
        drawn = np.random.default_rng(0).integers(len(source.titles), size=len(told)) + 1
        random, nearest = source.titles_of(drawn.tolist()), [oracle.title for oracle in told]
        histories = [reading.history for reading in readings]
        recovery, (held, one) = self.recovery_question, self.choices(source) or (None, None)
        found: dict[str, float] = {"asked": len(readings)}
        for control in ("", *CONTROLS):
            prompts = self.questions(readings, told, control)
            count = len(readings)
            recovered = _outcomes(engine, prompts[:count], recovery.decoding(most_tokens), held)
            others = _outcomes(engine, prompts[count:], ONE_TITLE.decoding(most_tokens), one)
            outcomes = [*recovered, *others]
            answers = [*map(recovery.answer, recovered), *map(ONE_TITLE.answer, others)]
            prefix = f"{control}: " if control else ""
            figures = self.figures(answers, readings, told, source.known)
            for number, task in enumerate(("recovery", "residual", "oracle") if told else ("recovery", "residual")):
                mine = outcomes[number * count : (number + 1) * count]
                figures[f"refused {task}"] = sum(outcome.error is not None for outcome in mine)
            named = [title_in(answer, source.known) for answer in answers[2 * count :]]
            figures |= preferences(judges, named, {"random": random, "nearest": nearest}, histories, source.known, seed)
            found |= {prefix + name: round(value, 4) for name, value in figures.items()}
        ceiling = preferences(judges, nearest, {"random": random}, histories, source.known, seed)
        return found | {f"{NEAREST}: {name}": round(value, 4) for name, value in ceiling.items()}

    def _check_judges(self) -> None:
        """Raise UsageError if there are judges but no oracle is read, or if a judge's checkpoint does not exist."""
        if self.config.judges and self.config.after != "item":
            raise UsageError(
                "Judges are asked about an oracle, and this adapter reads none.",
                "Train one with --recinterpreter.after item.",
            )
        _ = self.judges.identities  # reads their checkpoints

    def choices(self, source: Source) -> Sequence[Choices]:
        """The constraints of the answers to recovery, and to residual and the oracle. Empty if unconstrained."""
        if not self.config.constrained:
            return ()
        return [question.choices(source.titles) for question in (self.recovery_question, ONE_TITLE)]

    def beside(
        self, source: Source, lm: AdaptedLm, bare: Engine, users: int, positions: int, asked: int, most_tokens: int
    ) -> dict[str, float]:
        """What probes recover of held-out users.

        For recovery, probes read the last titles from states, from the states' tokens, and from the language model's
        hidden states at the end of the prompt. For residual, a probe reads the last title from the states before and
        after it.
        """
        rng = np.random.default_rng(0)
        rows = source.rows(held_out=False, least=2, most=users, rng=rng)
        owners, events = drawn_places(rows, source.histories.lengths[rows], positions, rng)
        learnt = self._probed(source, lm, owners[events > 1], events[events > 1])
        rows = source.rows(held_out=True, least=2, most=asked, rng=np.random.default_rng(0))
        told = self._probed(source, lm, rows, source.histories.lengths[rows])
        items = source.recommender.items
        return {
            **probed(learnt[0], told[0], items, {"recovered": "recovery"}),
            **probed(learnt[1], told[1], items, {"recovered": "residual"}),
        }

    def _probed(
        self, source: Source, lm: AdaptedLm, rows: NDArray[np.int64], events: NDArray[np.int64]
    ) -> tuple[dict[str, LabelledVectors], dict[str, LabelledVectors]]:
        """Vectors and targets to probe for recovery and for residual, by kind of vectors."""
        readings = list(self.readings(source, rows, events))
        items = [source.items(row, count) for row, count in zip(rows.tolist(), events.tolist(), strict=True)]
        targets = [mine[-self.config.titles :] for mine in items]
        states = np.concatenate([reading.after.values[-1:] for reading in readings])
        before = np.concatenate([reading.before.values[-1:] for reading in readings])
        prompts = [recovery_prompt(self.recovery.test[0], reading) for reading in readings]
        vectors = {
            "states": states,
            "tokens": lm.tokens([reading.after for reading in readings]),
            "hidden states": lm.hidden_states(prompts),
        }
        recovery = {kind: LabelledVectors(mine, targets, rows) for kind, mine in vectors.items()}
        return recovery, {
            "two states": LabelledVectors(np.hstack([before, states]), [mine[-1:] for mine in targets], rows)
        }

    def questions(self, readings: Sequence[Reading], oracles: Sequence[Oracle], control: str = "") -> list[Prompt]:
        """Prompts for recovery of every reading, then residual, then the oracle if there is one.

        The templates of tests are used in turn. `control` names one of `CONTROLS`.
        """
        if control == "shuffled states":
            readings, oracles = [*readings[1:], *readings[:1]], [*oracles[1:], *oracles[:1]]
        recovery, residual = self.recovery.test, self.prompts.residual.test
        prompts = [recovery_prompt(recovery[at % len(recovery)], mine) for at, mine in enumerate(readings)]
        prompts += [residual_prompt(residual[at % len(residual)], mine) for at, mine in enumerate(readings)]
        for at, (mine, oracle) in enumerate(zip(readings, oracles, strict=False)):
            prompts.append(oracle_prompt(residual[at % len(residual)], mine, oracle))
        return [Prompt.of(prompt.words) for prompt in prompts] if control == "no states" else prompts

    def figures(
        self, answers: Sequence[str], readings: Sequence[Reading], oracles: Sequence[Oracle], known: Collection[str]
    ) -> dict[str, float]:
        """Figures of answers in the order of `questions`; `oracle` is the share that name the item nearest to it."""
        count = len(readings)
        figures = {
            **recovery_figures(
                answers[:count],
                [mine.history for mine in readings],
                known,
                searched=self.recovery_question.searched,
            ),
            **residual_figures(answers[count : 2 * count], [mine.title for mine in readings], known),
        }
        if oracles:
            named = residual_figures(answers[2 * count :], [oracle.title for oracle in oracles], known)
            figures |= {"oracle": named["residual"], "oracle valid": named["residual valid"]}
        return figures


def recovery_prompt(template: str, reading: Reading) -> Prompt:
    return fill(template, {"state": reading.after})


def residual_prompt(template: str, reading: Reading) -> Prompt:
    return fill(template, {"before": reading.before, "after": reading.other_side})


def oracle_prompt(template: str, reading: Reading, oracle: Oracle) -> Prompt:
    """Residual's prompt after the whole history, with what the recommender would have next on the other side."""
    return fill(template, {"before": reading.after, "after": oracle.vector})


def _outcomes(engine: Engine, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None) -> list[Outcome]:
    """The engine's outcomes, in the order of the prompts."""
    outcomes = [Outcome(index) for index in range(len(prompts))]
    for outcome in engine.generate(prompts, decoding, choices):
        outcomes[outcome.index] = outcome
    return outcomes
