"""Templates of prompts: texts in which marks like {user} stand for pieces of words or vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.prompt import Prompt, Vectors

Piece = str | Vectors | Sequence[str | Vectors]
"""What stands in for a mark."""

_MARK = re.compile(r"\{(\w+)\}")


class Templates(Config):
    """Paraphrases of one question; those for tests are never trained on."""

    training: tuple[str, ...] = shaping(description="what training asks", min_length=1)
    test: tuple[str, ...] = shaping(description="what is asked when it is measured", min_length=1)

    @model_validator(mode="after")
    def _none_twice(self) -> Templates:
        if len({*self.training, *self.test}) < len(self.training) + len(self.test):
            raise ValueError("a template of the tests is one of the training's, or stands there twice")
        return self

    def require(self, marks: Iterable[str]) -> None:
        """As `require_marks`, for all templates."""
        require_marks((*self.training, *self.test), marks)


def require_marks(templates: Iterable[str], marks: Iterable[str]) -> None:
    """Raise ValueError unless every template has each of these marks exactly once, and no other mark."""
    wanted = sorted(marks)
    for template in templates:
        if sorted(_MARK.findall(template)) != wanted:
            names = ", ".join(f"{{{mark}}}" for mark in wanted)
            raise ValueError(f"the template {template!r} needs the marks {names}, each once, and no other")


def fill(template: str, pieces: Mapping[str, Piece]) -> Prompt:
    """The prompt of a template with its marks replaced by `pieces`.

    All marks are replaced in one pass, so that a title that looks like a mark stays a title.
    """
    words = _MARK.split(template)
    segments: list[str | Vectors] = []
    for at, word in enumerate(words):
        piece = pieces[word] if at % 2 else word
        for part in [piece] if isinstance(piece, str | Vectors) else piece:
            if isinstance(part, str) and segments and isinstance(segments[-1], str):
                segments[-1] += part  # Adjacent texts are joined, so that they are tokenised as one.
            elif part != "":
                segments.append(part)
    return Prompt.of(*segments)
