"""Examples of one's own: prompts with their answers, which a language model learns too, so that it keeps its language.

A line of the file is {"prompt": …, "answer": …}, or a conversation as chats are published: {"messages": [{"role": …,
"content": …}, …]} with the roles system, user and assistant. Every turn of the assistant that follows another turn is
an example, whose prompt is all that was said before. If the assistant has spoken before, each turn of the prompt begins
with its role.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import SoftExample

_ANSWERS = "assistant"
_ROLES = ("system", "user", _ANSWERS)
_BETWEEN_TURNS = "\n\n"


def read_replay(path: str) -> list[SoftExample]:
    """The examples of a file of JSON lines; empty lines are left out.

    Raises UsageError if the file cannot be read or holds no example, and names the first line that is wrong.
    """
    examples: list[SoftExample] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                examples += _of_line(path, number, line)
    except OSError as error:
        raise UsageError(f"The examples {path} cannot be read: {error}.", "Check --replay.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"The examples {path} are no UTF-8: {error}.", "Write the file anew.") from None
    if not examples:
        raise UsageError(f"The file {path} holds no examples.", "Leave out --replay, or name another.")
    return examples


def _of_line(path: str, number: int, line: str) -> list[SoftExample]:
    if not line.strip():
        return []
    try:
        return list(_examples(json.loads(line)))
    except ValueError as error:
        raise UsageError(
            f"Line {number} of {path} is no example: {error}.",
            'Write one {"prompt": …, "answer": …} or {"messages": [{"role": …, "content": …}, …]} a line.',
        ) from None


def _examples(row: Any) -> Iterator[SoftExample]:
    """The examples of one row. Raises ValueError for a row of neither form."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if "messages" in row:
        yield from _turns(row["messages"])
        return
    missing = [name for name in ("prompt", "answer") if name not in row]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}, and no messages")
    yield SoftExample(Prompt.of(_text(row["prompt"], "prompt")), _text(row["answer"], "answer"))


def _turns(messages: Any) -> Iterator[SoftExample]:
    if not isinstance(messages, list):
        raise ValueError("its messages are no list")
    said: list[tuple[str, str]] = []
    found = False
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {place} has none of the roles {', '.join(_ROLES)}")
        role, text = message["role"], _text(message.get("content"), f"content of message {place}")
        if role == _ANSWERS and said:
            found = True
            yield SoftExample(Prompt.of(_prompt(said)), text)
        said.append((role, text))
    if not found:
        raise ValueError("its messages have no turn of the assistant that follows another")


def _prompt(said: list[tuple[str, str]]) -> str:
    if all(role != _ANSWERS for role, _ in said):
        return _BETWEEN_TURNS.join(text for _, text in said)
    return _BETWEEN_TURNS.join(f"{role}: {text}" for role, text in said)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {what} is no text")
    return value
