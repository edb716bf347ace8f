"""Examples of somebody's own: prompts with their answers, which a language model learns too, so that it keeps its language."""

from __future__ import annotations

import json
from pathlib import Path

from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import SoftExample


def read_replay(path: str) -> list[SoftExample]:
    """Of a file of JSON lines. Raises UsageError where the file cannot be read, with the first line that is wrong."""
    examples: list[SoftExample] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                examples.append(SoftExample(Prompt.of(str(row["prompt"])), str(row["answer"])))
    except OSError as error:
        raise UsageError(f"The examples {path} cannot be read: {error}.", "Check --replay.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"Line {len(examples) + 1} of {path} is no example: {error!r}.",
            'Write one {"prompt": …, "answer": …} a line.',
        ) from None
    return examples
