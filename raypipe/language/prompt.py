"""The prompt as a value: segments of text and of vectors. Training, generation and serving use the same object.

Not covered here: tokenising (each engine does that with its own model's tokenizer) and where vectors come from.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Text:
    """Words, to be tokenised by the engine."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Precomputed vectors (recommender states, image embeddings) that a model takes in place of tokens.

    `values` is float32 [count, width]; `source` names what they are, e.g. the variant whose hidden states they hold.
    """

    values: np.ndarray
    source: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vectors) and self.source == other.source and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.source, self.values.shape, self.values.tobytes()))

    @property
    def digest(self) -> str:
        shape = f"{self.values.shape} {self.values.dtype}"
        return hashlib.blake2b(shape.encode() + np.ascontiguousarray(self.values).tobytes(), digest_size=16).hexdigest()


Segment = Text | Vectors


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: its segments in reading order."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, *segments: str | Vectors) -> Prompt:
        """A prompt of the given pieces; strings become text segments."""
        return cls(tuple([Text(piece) if isinstance(piece, str) else piece for piece in segments]))

    @property
    def has_vectors(self) -> bool:
        return Vectors in map(type, self.segments)

    @property
    def key(self) -> str:
        """The text with a digest in the place of vectors; only equal prompts have equal keys."""
        return "".join(
            segment.text if isinstance(segment, Text) else f"\0{segment.source} {segment.digest}\0"
            for segment in self.segments
        )

    @property
    def words(self) -> str:
        """The text of all text segments joined, without the vectors between them."""
        if len(self.segments) == 1 and isinstance(self.segments[0], Text):
            return self.segments[0].text
        return "".join([segment.text for segment in self.segments if isinstance(segment, Text)])

    @property
    def text(self) -> str:
        """The whole prompt as text. Raises ValueError if it holds vectors, which have no text."""
        if self.has_vectors:
            raise ValueError("This prompt holds vectors; only an engine with the capability `vectors` can read it.")
        return self.words
