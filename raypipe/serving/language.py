"""A release's language model in memory once, its adapters beside it, and what they are asked: no HTTP and no Ray.

The engines are those of batch work, so that equal prompts get equal answers (G7).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from raypipe.engines.engine import Choices, Decoding, Engine, Outcome
from raypipe.engines.transformers import TransformersEngine
from raypipe.errors import UsageError
from raypipe.language.adapters import read_card
from raypipe.language.prompt import Prompt, Vectors
from raypipe.serving.config import OF_RELEASE, ServiceConfig
from raypipe.serving.readers import lm_of
from raypipe.serving.served import UnfitError
from raypipe.serving.service import Code
from raypipe.storage.models import Models, find_model
from raypipe.storage.releases import Release
from raypipe.storage.workspace import Workspace
from raypipe.systems.explanations import NO, YES, Asked, Explanation, explain
from raypipe.systems.paradigms import build_summarizer
from raypipe.systems.summaries import Block, UserSummary
from raypipe.systems.trsr import likelihoods

ECHO = "echo"
ADAPTERS = 8
"""Most that are kept beside one language model."""
_KEPT = 2  # language models: that of the release, and that of the one which takes its place
_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Key:
    """Which weights answer: a language model as a release names it, and beside it an adapter NAME/HASH, or none."""

    lm: str
    adapter: str = ""

    def __str__(self) -> str:
        return f"{self.adapter}@{self.lm}"

    @classmethod
    def parse(cls, text: str) -> Key:
        adapter, _, lm = text.partition("@")
        return cls(lm, adapter)


@dataclass(frozen=True)
class Explain:
    """To decide, and to put into words."""

    asked: Asked


@dataclass(frozen=True)
class Write:
    """To answer a prompt, if given with one of the choices."""

    prompt: Prompt
    choices: Choices | None = None


@dataclass(frozen=True)
class Summarise:
    """To sum up a history, by its blocks."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class Rank:
    """To tell how likely the first of two answers to each prompt is."""

    prompts: Sequence[Prompt]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Likelihoods:
    """Of the first answer to each prompt; None where a prompt cannot be read."""

    yes: NDArray[np.float64] | None


Task = Explain | Write | Summarise | Rank


@dataclass(frozen=True)
class Failed:
    """No answer, and why not."""

    code: Code
    message: str


Result = Explanation | Outcome | UserSummary | Likelihoods | Failed


@dataclass(frozen=True)
class Job:
    """A task, until when (Unix seconds) somebody waits for it, and who hears of it meanwhile."""

    task: Task
    until: float
    listen: Callable[[Explanation], None] | None = None


@dataclass(frozen=True)
class _Base:
    """A language model, and the engines over its weights by adapter."""

    engine: Engine
    beside: dict[str, Engine]


class Language:
    """Loads engines and lets them answer. Loading may go on in one thread while another one answers."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.workspace = Workspace(config.workspace)
        self._models = Models(self.workspace.store)
        self._bases: dict[str, _Base] = {}
        self._loading = Lock()

    def ready(self, key: Key) -> Engine | None:
        """The engine of these weights if they are in memory; waits for no loading."""
        base = self._bases.get(key.lm)
        if base is None:
            return None
        return base.beside.get(key.adapter) if key.adapter else base.engine

    def load(self, key: Key) -> Engine:
        """The engine of these weights; those of the language model are shared by all of its adapters.

        Raises UsageError for what is missing, damaged or does not belong together.
        """
        with self._loading:
            base = self._bases.pop(key.lm, None) or _Base(self._base(key.lm), {})
            self._bases[key.lm] = base
            while len(self._bases) > _KEPT:
                self._bases.pop(next(iter(self._bases)))
            if not key.adapter:
                return base.engine
            if key.adapter not in base.beside:
                base.beside[key.adapter] = self._beside(base.engine, key)
                while len(base.beside) > ADAPTERS:
                    base.beside.pop(next(iter(base.beside)))
            return base.beside[key.adapter]

    def prove(self, key: Key, engine: Engine) -> None:
        """Raises UnfitError where the engine gives no answer, or one that is no number."""
        prompt = Prompt.of("Is this read?")
        if key.adapter:
            widths = read_card(self._models.fetch(find_model(self._models, key.adapter), Path(self.config.model_cache)))
            rng = np.random.default_rng(0)
            soft = [
                Vectors(rng.normal(size=(1, width)).astype(np.float32), source)
                for source, width in sorted(widths.widths.items())
            ]
            prompt = Prompt.of("Is this read: ", *soft, "?")
        if engine.capabilities.logprobs:
            (scores,) = engine.score([prompt], [(YES, NO)])
            fit = scores.error is None and all(map(math.isfinite, scores.logprobs))
        else:
            (outcome,) = engine.generate([prompt], Decoding(max_new_tokens=_PROBE_TOKENS))
            fit = outcome.error is None
        if not fit:
            name = f"adapter {key.adapter[:40]}" if key.adapter else f"language model {key.lm[:40]}"
            raise UnfitError(f"The {name} does not answer.", "Train or align it again, and release that.")

    def answer(self, engine: Engine, jobs: Sequence[Job]) -> list[Result]:
        """In their order; one that nobody waits for any more is not begun."""
        now = time.time()
        found: list[Result] = [Failed("deadline", "Nobody waited any more.")] * len(jobs)
        due = [at for at, job in enumerate(jobs) if job.until > now]
        kinds = (
            (Explain, self._explain),
            (Write, self._write),
            (Summarise, self._summarise),
            (Rank, self._rank),
        )
        for kind, ask in kinds:
            mine = [at for at in due if isinstance(jobs[at].task, kind)]
            if mine:
                for at, result in zip(mine, ask(engine, [jobs[at] for at in mine]), strict=True):
                    found[at] = result
        return found

    def _beside(self, base: Engine, key: Key) -> Engine:
        if not isinstance(base, TransformersEngine):
            raise UsageError(
                f"The adapter {key.adapter[:40]} cannot be read beside {key.lm}.",
                "Serve it with --language.engine.engine transformers.",
            )
        adapter = find_model(self._models, key.adapter)
        return base.beside(self._models.fetch_unharmed(adapter, Path(self.config.model_cache)))

    def _base(self, lm: str) -> Engine:
        engine = self.config.language.engine
        if engine.lm != OF_RELEASE or not engine.reads_checkpoint:
            return engine.build()
        if lm == ECHO:
            return engine.model_copy(update={"engine": ECHO}).build()
        return engine.model_copy(update={"lm": lm_of(self._models, lm, Path(self.config.model_cache))}).build()

    def _explain(self, engine: Engine, jobs: Sequence[Job]) -> Sequence[Result]:
        options = self.config.language

        def listen(at: int, so_far: Explanation) -> None:
            hearer = jobs[at].listen
            if hearer is not None:
                hearer(so_far)

        asked = [job.task.asked for job in jobs if isinstance(job.task, Explain)]
        heard = any(job.listen is not None for job in jobs)
        return explain(engine, asked, options.explanation, options.checks, listen if heard else None)

    def _write(self, engine: Engine, jobs: Sequence[Job]) -> Sequence[Result]:
        tasks = [job.task for job in jobs if isinstance(job.task, Write)]
        found: list[Result] = [Failed("internal", "No answer.")] * len(tasks)
        for choices in dict.fromkeys(task.choices for task in tasks):
            mine = [at for at, task in enumerate(tasks) if task.choices == choices]
            prompts = [tasks[at].prompt for at in mine]
            for outcome in engine.generate(prompts, self.config.language.reading, choices):
                found[mine[outcome.index]] = outcome
        return found

    def _summarise(self, engine: Engine, jobs: Sequence[Job]) -> Sequence[Result]:
        blocks = {str(at): job.task.blocks for at, job in enumerate(jobs) if isinstance(job.task, Summarise)}
        summarizer = build_summarizer(engine, self.config.language.summaries, "")
        return summarizer.summarize(blocks, {})

    def _rank(self, engine: Engine, jobs: Sequence[Job]) -> Sequence[Result]:
        tasks = [job.task for job in jobs if isinstance(job.task, Rank)]
        prompts = [prompt for task in tasks for prompt in task.prompts]
        answers = [task.answers for task in tasks for _ in task.prompts]
        yes, _ = likelihoods(engine, prompts, answers)
        ends = np.cumsum([len(task.prompts) for task in tasks])
        return [Likelihoods(None if np.isnan(mine).any() else mine) for mine in np.split(yes, ends[:-1])]


def keys_of(release: Release) -> list[Key]:
    """All weights of a release that may be asked."""
    if not release.lm:
        return []
    return [Key(release.lm), *(Key(release.lm, f"{name}/{content}") for name, content in release.adapters.items())]
