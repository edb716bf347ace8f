"""Hierarchical summaries: what a history costs, what is reused, and that no prompt outgrows the context."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from raypipe.engines.echo import EchoEngine
from raypipe.engines.engine import Decoding, EngineConfig, Outcome
from raypipe.language.prompt import Prompt
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.systems.paradigms import build_summarizer, calls_needed
from raypipe.systems.summaries import (
    STEP_VERSION,
    Block,
    SummariesConfig,
    Summarizer,
    UserSummary,
    Written,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "summaries-echo.json"
COMMAND = "GOLDEN=write python -m pytest tests/systems/test_summaries.py -k golden"


class CountingEngine(EchoEngine):
    """The echo engine that remembers every prompt it was given."""

    def __init__(self, context: int = 8192) -> None:
        super().__init__(context)
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
        self.prompts += [prompt.text for prompt in prompts]
        return super().generate(prompts, decoding)


def blocks_of(events: int, first: int = 0, word: str = "Title") -> list[Block]:
    lines = [f"title: {word} {n}" for n in range(events)]
    return [
        Block(first + at // 5, f"{word} {at} {len(lines[at : at + 5])}", lines[at : at + 5])
        for at in range(0, events, 5)
    ]


def summarizer(engine: EchoEngine, **config: object) -> Summarizer:
    return build_summarizer(engine, SummariesConfig.model_validate(config), "merge recipe")


def one(engine: EchoEngine, blocks: list[Block], known: dict | None = None, **config: object) -> UserSummary:
    (result,) = summarizer(engine, **config).summarize({"u": blocks}, {"u": known or {}})
    return result


def known_of(result: UserSummary) -> dict[tuple[int, int], Written]:
    return {(text.level, text.number): text for text in result.written}


@pytest.mark.parametrize("events", range(1, 51))
def test_a_history_costs_one_call_up_to_five_items_and_above_one_a_block_and_a_merge(events: int) -> None:
    engine = CountingEngine()
    result = one(engine, blocks_of(events))
    expected = 1 if events <= 5 else -(-events // 5) + 1
    assert (result.reason, result.calls, len(engine.prompts)) == ("", expected, expected)
    read, merges = calls_needed(SummariesConfig(), blocks_of(events), {})
    assert len(read) + merges == expected
    assert result.summary
    assert [(text.level, text.number) for text in result.written] == [(0, n) for n in range(-(-events // 5))]


def test_a_summary_of_one_block_is_that_blocks_text() -> None:
    result = one(CountingEngine(), blocks_of(4))
    assert result.summary == result.written[0].text


def test_every_item_stands_in_exactly_one_prompt_and_every_block_text_in_the_merge() -> None:
    engine = CountingEngine()
    result = one(engine, blocks_of(23))
    *blocks, merge = engine.prompts
    for n in range(23):
        assert sum(f"title: Title {n}\n" in prompt for prompt in blocks) == 1
    for number, text in enumerate(result.written, 1):
        assert f"{number}. {text.text}" in merge


def test_tokens_are_those_of_all_the_prompts() -> None:
    engine = CountingEngine()
    result = one(engine, blocks_of(23))
    assert result.tokens_in == sum(len(prompt.split()) for prompt in engine.prompts)
    assert result.tokens_out == 9 * 6


@pytest.mark.parametrize("context", [160, 200, 300])
def test_summaries_that_do_not_fit_one_prompt_are_merged_level_by_level(context: int) -> None:
    engine = CountingEngine(context)
    result = one(engine, blocks_of(500), merge_decoding={"max_new_tokens": 12}, block_decoding={"max_new_tokens": 12})
    assert result.reason == ""
    assert all(len(prompt.split()) + 12 <= context for prompt in engine.prompts)
    levels = [text.level for text in result.written]
    assert levels.count(0) == 100
    assert max(levels) >= 1
    # The last merge is the summary itself and no block summary.
    assert result.calls == len(engine.prompts) == len(result.written) + 1
    assert result.summary not in {text.text for text in result.written}


def test_summaries_of_which_no_two_fit_a_prompt_are_a_reason_and_not_a_loop() -> None:
    result = one(
        CountingEngine(110), blocks_of(20), merge_decoding={"max_new_tokens": 12}, block_decoding={"max_new_tokens": 12}
    )
    assert (result.reason, result.summary) == ("prompt_too_long", "")


def test_an_item_too_long_for_the_context_fails_its_user_only() -> None:
    engine = CountingEngine(150)
    users = {"long": [Block(0, "k", ["w " * 200])], "short": blocks_of(3)}
    long, short = summarizer(engine, block_decoding={"max_new_tokens": 12}).summarize(users, {})
    assert (long.user_id, long.reason, long.calls) == ("long", "prompt_too_long", 1)
    assert (short.reason, bool(short.summary)) == ("", True)


def test_known_texts_are_used_and_only_what_is_new_is_asked() -> None:
    first = one(CountingEngine(), blocks_of(23))
    engine = CountingEngine()
    second = one(engine, blocks_of(28), known_of(first))
    # Block 4 was partial and is new, block 5 is new, and the merge; blocks 0 to 3 are known.
    assert second.calls == len(engine.prompts) == 3
    assert second.summary == one(CountingEngine(), blocks_of(28)).summary
    assert [text.number for text in second.written] == [0, 1, 2, 3, 4, 5]


def test_a_known_text_of_another_key_is_not_used() -> None:
    stale = {(0, n): Written(0, n, "other key", "stale") for n in range(5)}
    engine = CountingEngine()
    result = one(engine, blocks_of(23), stale)
    assert result.calls == 6
    assert not any("stale" in prompt for prompt in engine.prompts)


def test_known_merges_on_the_way_are_used_too() -> None:
    options = {"merge_decoding": {"max_new_tokens": 12}, "block_decoding": {"max_new_tokens": 12}}
    first = one(CountingEngine(200), blocks_of(500), **options)
    engine = CountingEngine(200)
    again = one(engine, blocks_of(500), known_of(first), **options)
    assert again.summary == first.summary
    assert len(engine.prompts) == 1  # the last merge, which is kept nowhere else than in the summary


def test_company_changes_nobodys_summary() -> None:
    users = {f"u{n}": blocks_of(n, word=f"W{n}") for n in range(1, 30)}
    together = summarizer(CountingEngine()).summarize(users, {})
    for result in together:
        assert result.summary == one(CountingEngine(), users[result.user_id]).summary
    assert [result.user_id for result in together] == list(users)


@pytest.mark.parametrize("context", [160, 300, 8192])
@pytest.mark.parametrize("events", [1, 6, 50, 500])
def test_what_a_cap_grants_is_never_less_than_what_is_spent(context: int, events: int) -> None:
    options = {"merge_decoding": {"max_new_tokens": 12}, "block_decoding": {"max_new_tokens": 12}}
    engine = CountingEngine(context)
    most = summarizer(engine, **options).most_calls(blocks_of(events), {})
    result = one(engine, blocks_of(events), **options)
    tokens_in, tokens_out = summarizer(engine, **options).most_tokens(most)
    assert result.reason == ""
    assert result.calls <= most
    assert result.tokens_in <= tokens_in
    assert result.tokens_out <= tokens_out
    if context == 8192:
        assert result.calls == most


def test_a_silent_model_is_a_reason() -> None:
    class Silent(EchoEngine):
        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[Outcome]:
            yield from (Outcome(index, "  ", 1, 0, "stop") for index, _ in enumerate(prompts))

    assert one(Silent(), blocks_of(3)).reason == "empty_output"
    assert one(Silent(), blocks_of(13)).reason == "empty_output"


def test_recipes_know_exactly_what_shapes_their_stage() -> None:
    def recipes(**config: object) -> tuple[str, str]:
        made = SummariesConfig.model_validate(config)
        identity = EngineConfig(engine="echo").identity()
        return made.block_recipe(identity), made.merge_recipe(identity)

    plain = recipes()
    block = recipes(prompts={"block": SummaryPrompts().block.replace("kind", "sort")})
    merge = recipes(prompts={"merge": SummaryPrompts().merge.replace("mostly", "often")})
    window = recipes(window_events=40)
    assert block[0] != plain[0]
    assert block[1] != plain[1]
    assert (merge[0], window[0]) == (plain[0], plain[0])
    assert len({plain[1], merge[1], window[1]}) == 3
    # What only makes training examples shapes no summary.
    assert recipes(prompts={"summary_values": 2, "recent_blocks": 1, "block_values": 3}) == plain


def test_the_golden_summaries_are_those_of_this_step_version() -> None:
    """Fails when the same input gives another text: raise STEP_VERSION, then write the file anew with its command."""
    rows = []
    for events in (1, 5, 6, 23, 50):
        engine = CountingEngine(300)
        lines = SummaryPrompts()
        blocks = [
            Block(
                at // 5,
                str(at),
                [
                    lines.item_line(
                        f"Title {n}", {"genre": ["Drama", "War"][n % 2 :], "brand": [f"B{n % 3}"]}, "A text."
                    )
                    for n in range(at, min(at + 5, events))
                ],
            )
            for at in range(0, events, 5)
        ]
        result = one(engine, blocks, merge_decoding={"max_new_tokens": 12}, block_decoding={"max_new_tokens": 12})
        rows.append({"events": events, "calls": result.calls, "tokens_in": result.tokens_in, "summary": result.summary})
    found = {"command": COMMAND, "step_version": STEP_VERSION, "rows": rows}
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert json.loads(GOLDEN.read_text()) == found
