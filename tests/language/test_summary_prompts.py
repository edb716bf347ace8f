"""Item lines, prompts, and the reference answers that train the built-in LM."""

import pytest
from pydantic import ValidationError

from raypipe.language.summary_prompts import NOTHING, SummaryPrompts
from raypipe.metrics.text import Vocabulary

PROMPTS = SummaryPrompts()
DRAMA, WAR, BOTH = {"genre": ["Drama"]}, {"genre": ["War"]}, {"genre": ["Drama", "War"], "brand": ["3M"]}


def test_an_item_is_one_line_of_its_columns():
    assert PROMPTS.item_line("Alien\n(1979)", BOTH) == "title: Alien (1979); brand: 3M; genre: Drama, War"
    assert PROMPTS.item_line("Alien", {"genre": []}) == "title: Alien"
    assert SummaryPrompts(attributes=("genre",)).item_line("Alien", BOTH) == "title: Alien; genre: Drama, War"


def test_text_is_left_out_by_default_and_cut_with_an_ellipsis():
    assert PROMPTS.item_line("Alien", DRAMA, "In space") == "title: Alien; genre: Drama"
    short = SummaryPrompts(text_characters=8)
    assert short.item_line("Alien", DRAMA, "In space no one") == "title: Alien; genre: Drama; text: In space…"
    assert short.item_line("Alien", DRAMA, "In space") == "title: Alien; genre: Drama; text: In space"


def test_prompts_show_items_as_lines_and_summaries_numbered_in_time_order():
    prompts = SummaryPrompts(block="Items:\n{items}\nSo:", merge="Parts:\n{summaries}\nSo {far}:")
    assert prompts.block_prompt(["a", "b"]).text == "Items:\na\nb\nSo:"
    assert prompts.merge_prompt(["First.", "Sec\nond."]).text == "Parts:\n1. First.\n2. Sec ond.\nSo {far}:"


def test_a_template_without_its_placeholder_is_refused():
    with pytest.raises(ValidationError, match="exactly once"):
        SummaryPrompts(block="Summarise.")
    with pytest.raises(ValidationError, match="exactly once"):
        SummaryPrompts(merge="{summaries}{summaries}")


def test_a_block_is_summarised_by_how_often_each_value_occurs():
    assert PROMPTS.reference_block_summary([DRAMA, BOTH, DRAMA]) == "3M once, Drama three times and War once."
    assert PROMPTS.reference_block_summary([DRAMA] * 9) == "Drama 9 times."
    assert PROMPTS.reference_block_summary([{}, {"genre": []}]) == NOTHING


def test_a_value_repeated_within_an_item_counts_once():
    assert PROMPTS.reference_block_summary([{"genre": ["War", "War"], "mood": ["War"]}]) == "War once."


def test_a_crowded_block_keeps_its_most_frequent_values():
    two = SummaryPrompts(block_values=2)
    assert two.reference_block_summary([BOTH, WAR, WAR, DRAMA]) == "Drama twice and War three times."


def test_a_merge_names_the_most_frequent_values_and_what_rose_lately():
    assert PROMPTS.reference_merge([[DRAMA, DRAMA], [BOTH, WAR]]) == "Mostly chooses Drama and War; also 3M."
    earlier, recent = [[DRAMA, DRAMA]] * 4, [[DRAMA, WAR]] * 3
    assert PROMPTS.reference_merge(earlier + recent) == "Mostly chooses Drama and War. Lately more War."
    assert PROMPTS.reference_merge([[DRAMA]] * 9) == "Mostly chooses Drama."
    assert PROMPTS.reference_merge([[{}], []]) == NOTHING


def test_an_update_weighs_what_the_summary_named_first_against_the_new_items():
    worth = {"Drama": 6, "Comedy": 4, "War": 3}
    assert PROMPTS.reference_update(worth, {}) == ("Mostly chooses Drama and Comedy; also War.", worth)
    summary, worth = PROMPTS.reference_update(worth, {"War": 4, "Drama": 1, "Horror": 2})
    # 7 each for Drama and War, by name; War rose to a place it did not have.
    assert (summary, worth) == (
        "Mostly chooses Drama and War; also Comedy. Lately more War.",
        {"Drama": 6, "War": 4, "Comedy": 3},
    )
    assert PROMPTS.reference_update({}, {"War": 1}) == ("Mostly chooses War. Lately more War.", {"War": 6})
    assert PROMPTS.reference_update({}, {}) == (NOTHING, {})


def test_the_metric_reads_what_the_grammar_writes():
    vocabulary = Vocabulary(["Drama", "War", "3M"])
    summary = PROMPTS.reference_merge([[DRAMA, DRAMA, BOTH]] * 4 + [[WAR, WAR]] * 3)
    assert vocabulary.named(summary) == ("Drama", "War", "3M")
    assert vocabulary.named_lately(summary) == ("War",)
    assert vocabulary.named(PROMPTS.reference_block_summary([BOTH, WAR])) == ("3M", "Drama", "War")
