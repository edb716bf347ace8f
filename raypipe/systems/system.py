"""The seam of the systems that join a recommender to a language model: examples in, a trained adapter out, answers judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from raypipe.engines.engine import Choices, Engine
from raypipe.language.adapters import AdapterConfig
from raypipe.language.soft_prompts import SoftExample
from raypipe.systems.projection import AdaptedLm
from raypipe.systems.source import Source


class System(Protocol):
    @property
    def name(self) -> str:
        """Under which its models are stored."""
        ...

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained."""
        ...

    def examples(self, source: Source, users: int, positions: int, rng: np.random.Generator) -> Iterator[SoftExample]:
        """Examples of at most so many users who are not held out, at so many places in each of their histories."""
        ...

    def choices(self, source: Source) -> Sequence[Choices]:
        """What answers are held to when it is measured; nothing where they are free."""
        ...

    def measured(self, source: Source, engine: Engine, asked: int, most_tokens: int) -> dict[str, float]:
        """What the adapted model answers about so many held-out users, and what the controls do; `most_tokens` an answer."""
        ...

    def beside(
        self, source: Source, lm: AdaptedLm, bare: Engine, users: int, positions: int, asked: int, most_tokens: int
    ) -> dict[str, float]:
        """What else tells of held-out users, having learnt from so many others at so many places of each: probes of vectors,
        baselines, and `bare`, the language model as it was."""
        ...
