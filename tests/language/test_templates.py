"""Marks in templates, filled with words and vectors."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.language.prompt import Text, Vectors
from raypipe.language.templates import Templates, fill

VECTOR = Vectors(np.ones((1, 3), np.float32), "user")


def test_pieces_stand_in_for_their_marks_and_words_that_meet_are_one_text() -> None:
    prompt = fill("Who is {user}, given {items}?", {"user": VECTOR, "items": ["a ", VECTOR, "; b"]})
    assert prompt.segments == (Text("Who is "), VECTOR, Text(", given a "), VECTOR, Text("; b?"))
    assert fill("{a}{b}", {"a": "x", "b": ""}).segments == (Text("x"),)


def test_a_title_that_reads_like_a_mark_stays_a_title() -> None:
    assert fill("{item} of {user}", {"item": "{user}", "user": "{item} %s \\1"}).text == "{user} of {item} %s \\1"


def test_templates_of_the_tests_are_none_of_the_trainings() -> None:
    with pytest.raises(ValidationError, match="one of the training's"):
        Templates(training=("a {x}",), test=("a {x}",))
    with pytest.raises(ValidationError, match="stands there twice"):
        Templates(training=("a {x}", "a {x}"), test=("b {x}",))


@pytest.mark.parametrize("template", ["none", "{x} {x}", "{x} {y}"])
def test_a_template_has_its_marks_once_and_no_other(template: str) -> None:
    Templates(training=("a {x}",), test=("b {x}",)).require(["x"])
    with pytest.raises(ValueError, match=r"needs the marks \{x\}, each once, and no other"):
        Templates(training=(template,), test=("b {x}",)).require(["x"])
