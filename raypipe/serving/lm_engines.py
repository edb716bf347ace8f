"""The engines of a release: its language model, in memory once, with its adapters, and the tasks they answer.

This module knows neither HTTP nor Ray. The engines are those of batch work, so that equal prompts get equal answers
(G7).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from raypipe.engines.engine import Choices, Decoding, Engine, Outcome
from raypipe.engines.timed import TimedEngine
from raypipe.engines.transformers import TransformersEngine
from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.language.prompt import Prompt, Vectors
from raypipe.serving.adapters import INTERPRETER, lm_of
from raypipe.serving.catalogue import ServedCatalogue
from raypipe.serving.config import OF_RELEASE, ServiceConfig
from raypipe.serving.served import UnfitError
from raypipe.serving.service import Code
from raypipe.storage.models import Models, find_model
from raypipe.storage.releases import Release
from raypipe.storage.workspace import Workspace
from raypipe.systems.explanations import NO, YES, Explanation, ExplanationRequest, explain
from raypipe.systems.lancer import NAME as LANCER
from raypipe.systems.lancer_lists import ListWriter, build_writer, stored_config
from raypipe.systems.paradigms import build_summarizer
from raypipe.systems.recinterpreter import InterpreterConfig
from raypipe.systems.summaries import Block, UserSummary
from raypipe.systems.title_search import ONE_TITLE, TitleQuestion
from raypipe.systems.trsr import likelihoods

ECHO = "echo"
# Language models that are kept, and engines of each adapter's name: those of the release in force, and of the one
# before or after it.
_KEPT = 2
_PROBE_TOKENS = 2


@dataclass(frozen=True)
class ModelKey:
    """Which weights answer: a language model as a release names it, and an adapter NAME/HASH, or none.

    `catalogue` is the catalogue's version if the adapter writes items or its answers are held to item titles, else
    None.
    """

    lm: str
    adapter: str = ""
    catalogue: int | None = None

    def __str__(self) -> str:
        return f"{'' if self.catalogue is None else f'{self.catalogue}:'}{self.adapter}@{self.lm}"

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.partition("/")[0]

    @classmethod
    def parse(cls, text: str) -> ModelKey:
        before, _, lm = text.partition("@")
        catalogue, colon, adapter = before.partition(":")
        # An adapter is NAME/HASH and never digits before a colon, so such digits are a catalogue's version.
        return cls(lm, adapter, int(catalogue)) if colon and catalogue.isdecimal() else cls(lm, before)


@dataclass(frozen=True)
class Explain:
    """A task: decide whether an item fits, and explain why in words."""

    request: ExplanationRequest


@dataclass(frozen=True)
class Generate:
    """A task: answer a prompt that asks for titles."""

    prompt: Prompt
    question: TitleQuestion = ONE_TITLE


@dataclass(frozen=True)
class Summarize:
    """A task: summarise a history, which is given in blocks."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class Rank:
    """A task: find how likely the first of two answers to each prompt is."""

    prompts: Sequence[Prompt]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class RankScores:
    """How likely the first answer to each prompt is, or the `reason` why one of them has no answer."""

    yes: NDArray[np.float64]
    reason: str = ""


@dataclass(frozen=True)
class WriteList:
    """A task: write what is chosen after `history`.

    `history` holds item indices in time order; with `filter_seen` none of its items is written.
    """

    history: Sequence[int]
    filter_seen: bool


@dataclass(frozen=True)
class WrittenList:
    """Item indices, best first, and the log-probability of each one's line, or why (`reason`) nothing was written."""

    items: Sequence[int]
    logprobs: Sequence[float]
    reason: str = ""


Task = Explain | Generate | Summarize | Rank | WriteList


@dataclass(frozen=True)
class Failed:
    """Why a task has no answer."""

    code: Code
    message: str


LATE = Failed("deadline", "Nobody waited any more.")
TOO_LONG = Failed("too_much", "This does not fit what the language model reads at once.")
Result = Explanation | Outcome | UserSummary | RankScores | WrittenList | Failed


@dataclass(frozen=True)
class PendingTask:
    """A task and until when its caller waits (Unix seconds). `listen` is called with the explanation while it grows."""

    task: Task
    until: float
    listen: Callable[[Explanation], None] | None = None


@dataclass(frozen=True)
class LoadedEngine:
    """An engine in memory.

    `writer` writes items with the engine, None if its adapter was not trained to. `choices` are, by question, the
    choices that answers are held to; empty if answers are free.
    """

    engine: Engine
    writer: ListWriter | None = None
    choices: Mapping[TitleQuestion, Choices] = field(default_factory=dict)


class LmEngines:
    """Loads engines and lets them answer. One thread may load while another one answers.

    The two last used language models are kept, and the two last used adapters of each name: an adapter may be a whole
    copy of its language model.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.workspace = Workspace(config.workspace)
        self._models = Models(self.workspace.store)
        self._loaded: dict[ModelKey, LoadedEngine] = {}
        self._used: dict[ModelKey, float] = {}
        self._loading = Lock()

    def get(self, key: ModelKey) -> LoadedEngine | None:
        """The engine with these weights if they are in memory, else None. It does not wait for loading."""
        loaded = self._loaded.get(key)
        if loaded is not None:
            self._used[key] = time.monotonic()
        return loaded

    def load(self, key: ModelKey) -> LoadedEngine:
        """The engine with these weights, loaded if it is not in memory.

        All adapters of a language model share its weights. Raises UsageError if something is missing, is damaged or
        does not belong together.
        """
        with self._loading:
            for wanted in dict.fromkeys((ModelKey(key.lm), key)):
                if wanted not in self._loaded:
                    self._evict(wanted)
                    made = self._load_adapter(wanted) if wanted.adapter else LoadedEngine(self._load_lm(wanted.lm))
                    self._loaded[wanted] = made
                self._used[wanted] = time.monotonic()
            return self._loaded[key]

    def _evict(self, key: ModelKey) -> None:
        """Make room for `key` before it is loaded: drop all but the last used of what it may take the place of."""
        if key.adapter:
            rivals = {one: str(one) for one in self._loaded if (one.lm, one.name) == (key.lm, key.name)}
        else:
            rivals = {one: one.lm for one in self._loaded}
        newest = sorted(rivals, key=self._used.__getitem__, reverse=True)
        kept = list(dict.fromkeys(rivals[one] for one in newest))[: _KEPT - 1]
        for one in newest:
            if rivals[one] not in kept:
                self._loaded.pop(one)
                self._used.pop(one)

    def keys(self, release: Release, catalogue: int) -> list[ModelKey]:
        """The keys of all weights of a release that may be asked, with this version of the catalogue."""
        if not release.lm:
            return []
        found = [ModelKey(release.lm)]
        for name, content in release.adapters.items():
            adapter = f"{name}/{content}"
            system = find_model(self._models, adapter).lineage.get("system")
            held = system == LANCER or (system == INTERPRETER and self.config.language.reading.constrained)
            found.append(ModelKey(release.lm, adapter, catalogue if held else None))
        return found

    def check(self, key: ModelKey, loaded: LoadedEngine) -> None:
        """Ask the weights something. Raises UnfitError if they do not answer, or a log-probability is not finite."""
        if loaded.writer is not None:
            written = loaded.writer.lists([[1]])
            answered = written.outcomes[0].error is None
            fit = answered and all(map(math.isfinite, written.logprobs[0]))
        else:
            fit = self._answers_probes(key, loaded)
        if not fit:
            name = f"adapter {key.adapter[:40]}" if key.adapter else f"language model {key.lm[:40]}"
            raise UnfitError(f"The {name} does not answer.", "Train or align it again, and release that.")

    def _answers_probes(self, key: ModelKey, loaded: LoadedEngine) -> bool:
        engine, prompt = loaded.engine, Prompt.of("Is this read?")
        if key.adapter:
            widths = read_card(self._models.fetch(find_model(self._models, key.adapter), Path(self.config.model_cache)))
            rng = np.random.default_rng(0)
            soft = [
                Vectors(rng.normal(size=(1, width)).astype(np.float32), source)
                for source, width in sorted(widths.widths.items())
            ]
            prompt = Prompt.of("Is this read: ", *soft, "?")
        for question in loaded.choices:
            (outcome,) = self._titles(loaded, question, [prompt])
            if outcome.error is not None:
                return False
        if engine.capabilities.logprobs:
            (scores,) = engine.score([prompt], [(YES, NO)])
            return scores.error is None and all(map(math.isfinite, scores.logprobs))
        (outcome,) = engine.generate([prompt], Decoding(max_new_tokens=_PROBE_TOKENS))
        return outcome.error is None

    def answer(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> list[Result]:
        """Results in the order of the tasks. A task that nobody waits for any more is not begun."""
        now = time.time()
        found: list[Result] = [LATE] * len(pending)
        due = [at for at, one in enumerate(pending) if one.until > now]
        kinds = (
            (Explain, self._explain),
            (Generate, self._generate),
            (Summarize, self._summarize),
            (Rank, self._rank),
            (WriteList, self._write_lists),
        )
        for kind, ask in kinds:
            mine = [at for at in due if isinstance(pending[at].task, kind)]
            if mine:
                for at, result in zip(mine, ask(loaded, [pending[at] for at in mine]), strict=True):
                    found[at] = result
        return found

    def _load_adapter(self, key: ModelKey) -> LoadedEngine:
        reader = self._loaded[ModelKey(key.lm)].engine
        if not isinstance(reader, TransformersEngine):
            raise UsageError(
                f"The adapter {key.adapter[:40]} cannot be read beside {key.lm}.",
                "Serve it with --language.engine.engine transformers.",
            )
        adapter = find_model(self._models, key.adapter)
        same = [loaded.engine for one, loaded in self._loaded.items() if (one.lm, one.adapter) == (key.lm, key.adapter)]
        engine = same[0] if same else reader.beside(self._models.fetch_unharmed(adapter, Path(self.config.model_cache)))
        if key.catalogue is None:
            return LoadedEngine(engine)
        assert isinstance(engine, TransformersEngine)
        catalogue = ServedCatalogue.of(self.workspace.tables["items"].read(key.catalogue)).for_prompts
        if adapter.lineage.get("system") == INTERPRETER:
            system = InterpreterConfig.model_validate(adapter.lineage["options"]).build()
            titles = tuple(catalogue.titles)
            questions = (system.recovery_question, ONE_TITLE)
            return LoadedEngine(engine, choices={question: question.choices(titles) for question in questions})
        options = stored_config(adapter.name, adapter.lineage)
        return LoadedEngine(
            engine, build_writer(options, catalogue, reader, engine, self.config.language.answer_tokens)
        )

    def _load_lm(self, lm: str) -> Engine:
        engine = self.config.language.engine
        if engine.lm != OF_RELEASE or not engine.reads_checkpoint:
            return engine.build()
        if lm == ECHO:
            return engine.model_copy(update={"engine": ECHO}).build()
        return engine.model_copy(update={"lm": lm_of(self._models, lm, Path(self.config.model_cache))}).build()

    def _explain(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> Sequence[Result]:
        options = self.config.language

        def listen(at: int, so_far: Explanation) -> None:
            hearer = pending[at].listen
            if hearer is not None:
                hearer(so_far)

        requests = [one.task.request for one in pending if isinstance(one.task, Explain)]
        heard = any(one.listen is not None for one in pending)
        return explain(loaded.engine, requests, options.explanation, options.checks, listen if heard else None)

    def _generate(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> Sequence[Result]:
        tasks = [one.task for one in pending if isinstance(one.task, Generate)]
        found: list[Result] = [Failed("internal", "No answer.")] * len(tasks)
        for question in dict.fromkeys(task.question for task in tasks):
            mine = [at for at, task in enumerate(tasks) if task.question == question]
            for outcome in self._titles(loaded, question, [tasks[at].prompt for at in mine]):
                found[mine[outcome.index]] = outcome
        return found

    def _titles(self, loaded: LoadedEngine, question: TitleQuestion, prompts: Sequence[Prompt]) -> Iterator[Outcome]:
        """One outcome for each prompt, all of which ask this question, in any order."""
        decoding = question.decoding(self.config.language.reading.max_new_tokens)
        return loaded.engine.generate(prompts, decoding, loaded.choices.get(question))

    def _summarize(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> Sequence[Result]:
        blocks = {str(at): one.task.blocks for at, one in enumerate(pending) if isinstance(one.task, Summarize)}
        # A long history takes one level of summaries after the other; none begins after the last caller stopped
        # waiting.
        engine = TimedEngine(loaded.engine, max(one.until for one in pending))
        summaries = build_summarizer(engine, self.config.language.summaries, "").summarize(blocks, {})
        return [LATE if summary.reason == "timeout" else summary for summary in summaries]

    def _rank(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> Sequence[Result]:
        """Answer one task after the other: a batch of them would take longer than callers wait."""
        scores: list[Result] = []
        for one in pending:
            task = one.task
            assert isinstance(task, Rank)
            if one.until <= time.time():
                scores.append(LATE)
                continue
            found = likelihoods(loaded.engine, task.prompts, [task.answers] * len(task.prompts))
            reason = next((found.errors[number].kind for number in sorted(found.errors)), "")
            scores.append(RankScores(found.yes, reason))
        return scores

    def _write_lists(self, loaded: LoadedEngine, pending: Sequence[PendingTask]) -> Sequence[Result]:
        tasks = [one.task for one in pending if isinstance(one.task, WriteList)]
        found: list[Result] = [Failed("internal", "No answer.")] * len(tasks)
        assert loaded.writer is not None, "asked by the key of what writes items"
        for filter_seen in {task.filter_seen for task in tasks}:
            mine = [at for at, task in enumerate(tasks) if task.filter_seen == filter_seen]
            written = loaded.writer.lists([tasks[at].history for at in mine], filter_seen=filter_seen)
            rows = zip(mine, written.items, written.logprobs, written.outcomes, strict=True)
            for at, items, logprobs, outcome in rows:
                found[at] = WrittenList(items, logprobs, "" if outcome.error is None else outcome.error.kind)
        return found
