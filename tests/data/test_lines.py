"""Where records end, against a reader of one character at a time."""

from __future__ import annotations

import random

import pytest

from raypipe.data.lines import record_starts


def records(text: str) -> list[str]:
    """By the states of a CSV reader: at a field's start, in a quoted one, after a quote in it, in a plain one."""
    found, record, state = [], "", "start"
    for sign in text:
        record += sign
        if state == "quoted":
            state = "quote" if sign == '"' else "quoted"
        elif state == "quote" and sign == '"':
            state = "quoted"
        elif sign == "\n":
            found.append(record)
            record, state = "", "start"
        elif sign == ",":
            state = "start"
        else:
            state = "quoted" if sign == '"' and state == "start" else "plain"
    return [line for line in [*found, record] if line not in {"", "\n"}]


@pytest.mark.parametrize("seed", range(50))
def test_quotes_hold_line_breaks_where_they_open_at_a_fields_start(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(40):
        text = "".join(draw.choices('",\na', [4, 2, 2, 2], k=draw.randrange(1, 60)))
        starts, ends = record_starts(text.encode(), ",")
        assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == records(text), repr(text)
