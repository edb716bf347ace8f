"""Recurrent summaries: what a history costs, what is built on, and what is never fed forward."""

from __future__ import annotations

import pytest

from raypipe.engines.echo import EchoEngine
from raypipe.systems.paradigms import build_summarizer, calls_needed
from raypipe.systems.recurrent import RecurrentSummarizer
from raypipe.systems.summaries import Block, SummariesConfig, UserSummary
from tests.systems.test_summaries import CountingEngine, known_of

CONFIG = SummariesConfig(paradigm="recurrent")


def blocks_of(events: int, words: dict[int, str] | None = None) -> list[Block]:
    """Blocks whose keys are of everything up to them; `words` replaces single titles."""
    lines = [f"title: {(words or {}).get(n, f'Title {n}')}" for n in range(events)]
    return [
        Block(at // 5, "|".join(lines[: at + 5]), lines[at : at + 5], len(lines[at : at + 5]) == 5)
        for at in range(0, events, 5)
    ]


def one(engine: EchoEngine, blocks: list[Block], known: dict | None = None, **options: object) -> UserSummary:
    config = CONFIG.model_copy(update=options)
    (result,) = build_summarizer(engine, config, "").summarize({"u": blocks}, {"u": known or {}})
    return result


@pytest.mark.parametrize("events", range(1, 41))
def test_a_history_costs_one_call_a_block(events: int) -> None:
    engine = CountingEngine()
    result = one(engine, blocks_of(events))
    expected = -(-events // 5)
    assert (result.reason, result.calls, len(engine.prompts)) == ("", expected, expected)
    read, merges = calls_needed(CONFIG, blocks_of(events), {})
    assert (len(read), merges) == (expected, 0)
    assert [text.number for text in result.written] == list(range(events // 5))
    for n in range(events):
        assert sum(f"title: Title {n}\n" in prompt for prompt in engine.prompts) == 1


def test_each_call_reads_the_summary_before_it_and_a_partial_block_is_never_built_upon() -> None:
    engine = CountingEngine()
    result = one(engine, blocks_of(13))
    texts = [text.text for text in result.written]
    assert len(texts) == 2
    assert f"Summary: {texts[0]}\n" in engine.prompts[1]
    assert f"Summary: {texts[1]}\n" in engine.prompts[2]
    assert result.summary not in texts
    later = CountingEngine()
    grown = one(later, blocks_of(15), known_of(result))
    assert grown.calls == 1
    assert f"Summary: {texts[1]}\n" in later.prompts[0]
    assert grown.summary == grown.written[-1].text


@pytest.mark.parametrize("events", [5, 9, 10, 23, 30])
@pytest.mark.parametrize("more", [1, 2, 5, 11])
def test_a_night_reads_what_is_new_and_equals_all_at_once(events: int, more: int) -> None:
    first = one(CountingEngine(), blocks_of(events))
    engine = CountingEngine()
    second = one(engine, blocks_of(events + more), known_of(first))
    expected = -(-(events + more) // 5) - events // 5
    assert second.calls == len(engine.prompts) == expected
    assert len(calls_needed(CONFIG, blocks_of(events + more), known_of(first))[0]) == expected
    whole = one(CountingEngine(), blocks_of(events + more))
    assert (second.summary, second.written) == (whole.summary, whole.written)


def test_a_late_event_is_read_with_all_that_comes_after_it() -> None:
    first = one(CountingEngine(), blocks_of(30))
    changed = blocks_of(30, {12: "Another"})
    second = one(CountingEngine(), changed, known_of(first))
    assert second.calls == 4  # blocks 2 to 5
    assert second.written == one(CountingEngine(), changed).written
    assert second.written[:2] == first.written[:2]


def test_an_endless_history_is_read_over_several_runs_and_ends_equal() -> None:
    blocks, known, calls = blocks_of(58), {}, []
    for run in range(4):
        result = one(CountingEngine(), blocks, known, max_blocks_per_run=4)
        calls.append(result.calls)
        assert result.unfinished == (run < 2)
        assert result.summary
        known = known_of(result)
    # The last run reads the partial block again: it is kept nowhere.
    assert calls == [4, 4, 4, 1]
    assert result.summary == one(CountingEngine(), blocks).summary


def test_users_go_in_step_and_one_that_fails_stops_alone() -> None:
    engine = CountingEngine(100)
    users = {
        "short": blocks_of(7),
        "poison": [*blocks_of(5), Block(1, "k", ["title: " + "w " * 100])],
        "long": blocks_of(17),
    }
    decoding = {"max_new_tokens": 12}
    config = SummariesConfig.model_validate(
        {"paradigm": "recurrent", "block_decoding": decoding, "merge_decoding": decoding}
    )
    short, poison, long = RecurrentSummarizer(engine, config).summarize(users, {})
    assert (short.reason, short.calls, long.reason, long.calls) == ("", 2, "", 4)
    assert (poison.reason, poison.calls, len(poison.written)) == ("prompt_too_long", 2, 1)


def test_a_title_that_reads_like_a_placeholder_stays_a_title() -> None:
    prompt = CONFIG.prompts.update_prompt("She likes {items}.", ["title: {summary}", "title: B"]).text
    assert "Summary: She likes {items}.\ntitle: {summary}\ntitle: B\n" in prompt
