"""An engine that begins no work after a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from raypipe.engines.engine import Choices, Decoding, Engine, Outcome, OutcomeError, Piece, Scores
from raypipe.language.prompt import Prompt


class TimedEngine:
    """An engine whose callers wait until `until` (Unix seconds); implements `Engine`.

    From then on `generate` fails every prompt with kind `timeout`. A call that has begun is finished.
    """

    def __init__(self, engine: Engine, until: float) -> None:
        self.engine, self.until = engine, until
        self.capabilities, self.context = engine.capabilities, engine.context

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.engine.count_tokens(texts)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
        return self.engine.score(prompts, answers)

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
    ) -> Iterator[Outcome]:
        if time.time() < self.until:
            yield from self.engine.generate(prompts, decoding, choices)
            return
        for index in range(len(prompts)):
            yield Outcome(index, error=OutcomeError("timeout", "Nobody waited any more."), calls=0)

    def stream(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Piece | Outcome]:
        return self.engine.stream(prompts, decoding)
