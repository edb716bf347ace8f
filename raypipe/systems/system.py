"""The interface of systems that join a recommender to a language model: examples, a trained adapter, judged answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from raypipe.engines.engine import Choices, Engine
from raypipe.language.adapters import AdapterConfig
from raypipe.language.soft_prompts import SoftExample
from raypipe.systems.preference import PreferenceJudges
from raypipe.systems.projection import AdaptedLm
from raypipe.systems.source import Source


class System(Protocol):
    @property
    def name(self) -> str:
        """The name under which its models are stored."""
        ...

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained."""
        ...

    @property
    def judges(self) -> PreferenceJudges | None:
        """Who judges its answers when it is measured, beside the figures that count; None for a system without."""
        ...

    def examples(self, source: Source, users: int, positions: int, rng: np.random.Generator) -> Iterator[SoftExample]:
        """Training examples of at most `users` users who are not held out, at most `positions` places per history."""
        ...

    def choices(self, source: Source) -> Sequence[Choices]:
        """The constraints of answers when it is measured; empty if answers are free."""
        ...

    def measured(self, source: Source, engine: Engine, asked: int, most_tokens: int) -> dict[str, float]:
        """Figures of the adapted model's answers about at most `asked` held-out users, and of controls.

        An answer has at most `most_tokens` tokens.
        """
        ...

    def beside(
        self, source: Source, lm: AdaptedLm, bare: Engine, users: int, positions: int, asked: int, most_tokens: int
    ) -> dict[str, float]:
        """Figures to compare with, on at most `asked` held-out users: probes of vectors, baselines, and `bare`.

        Probes and baselines learn from at most `users` other users at `positions` places of each. `bare` is the
        language model without the adapter.
        """
        ...
