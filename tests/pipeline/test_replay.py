"""Examples of somebody's own, of single answers and of conversations, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt
from raypipe.language.soft_prompts import SoftExample
from raypipe.pipeline.replay import read_replay


def written(folder: Path, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "replay.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "replay.jsonl")


def chat(*turns: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pairs(examples: list[SoftExample]) -> list[tuple[str, str]]:
    assert not any(example.whole for example in examples)
    return [(example.prompt.text, example.answer) for example in examples]


def test_each_turn_of_the_assistant_is_an_answer_to_all_that_was_said_before(tmp_path: Path) -> None:
    turns = (
        ("system", "Be short."),
        ("user", "Tea?"),
        ("assistant", "Yes."),
        ("user", "Milk?"),
        ("assistant", "No – è."),
    )
    path = written(tmp_path, {"prompt": "Say it.", "answer": "It."}, "", chat(*turns))
    assert pairs(read_replay(path)) == [
        ("Say it.", "It."),
        ("Be short.\n\nTea?", "Yes."),
        ("system: Be short.\n\nuser: Tea?\n\nassistant: Yes.\n\nuser: Milk?", "No – è."),
    ]


def test_a_conversation_of_one_turn_is_what_a_prompt_and_its_answer_are(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "Say it.", "answer": "It."}, chat(("user", "Say it."), ("assistant", "It.")))
    one, other = read_replay(path)
    assert one == other == SoftExample(Prompt.of("Say it."), "It.")


def test_a_greeting_is_shown_and_not_learnt(tmp_path: Path) -> None:
    path = written(tmp_path, chat(("assistant", "Hello."), ("user", "Tea?"), ("assistant", "Yes.")))
    assert pairs(read_replay(path)) == [("assistant: Hello.\n\nuser: Tea?", "Yes.")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "Expecting property name"),
        ([1], "it is no object"),
        ({}, "it has no prompt and no answer, and no messages"),
        ({"prompt": "Say it."}, "it has no answer, and no messages"),
        ({"prompt": "Say it.", "answer": None}, "the answer is no text"),
        ({"prompt": " ", "answer": "It."}, "the prompt is no text"),
        ({"messages": "Tea?"}, "its messages are no list"),
        ({"messages": ["Tea?"]}, "message 1 has none of the roles system, user, assistant"),
        (chat(("user", "Tea?"), ("tool", "3")), "message 2 has none of the roles"),
        (chat(("user", "Tea?"), ("assistant", None)), "the content of message 2 is no text"),
        (chat(("user", "Tea?")), "its messages have no turn of the assistant that follows another"),
        (chat(("assistant", "Hello.")), "its messages have no turn of the assistant that follows another"),
    ],
)
def test_the_first_line_that_is_no_example_is_told_with_its_number(tmp_path: Path, row: object, problem: str) -> None:
    """However many examples the lines before it hold."""
    before = chat(("user", "Tea?"), ("assistant", "Yes."), ("user", "Milk?"), ("assistant", "No."))
    path = written(tmp_path, before, "", row, {})
    with pytest.raises(UsageError) as told:
        read_replay(path)
    assert str(told.value).startswith(f"Line 3 of {path} is no example: {problem}")


def test_a_file_that_is_not_there_or_holds_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_replay(str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="holds no examples"):
        read_replay(written(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "è", "answer": "é"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="are no UTF-8"):
        read_replay(str(tmp_path / "latin.jsonl"))
