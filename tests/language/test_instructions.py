"""Training examples: cut histories, the templates of summarising, the same answers for the same arguments."""

import re

import pytest

from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import InstructionConfig, histories_before_cut, summary_examples
from raypipe.language.summary_prompts import SummaryPrompts
from raypipe.metrics.text import Vocabulary

PROMPTS = SummaryPrompts()


def test_held_out_events_are_cut_from_the_end():
    assert histories_before_cut([[1, 2, 3], [4], []], 1) == [[1, 2]]
    assert histories_before_cut([[1, 2, 3], [4]], 2) == [[1]]
    assert histories_before_cut([[1, 2]], 0) == [[1, 2]]
    with pytest.raises(ValueError, match="makes no sense"):
        histories_before_cut([[1]], -1)


def test_the_last_title_of_a_user_is_in_no_example():
    titles = [f"Film {n}" for n in range(30)] + ["PLANTED"]
    catalogue = Catalogue(titles, [{"genre": ["Drama"]}] * 31)
    histories = [[*range(1, 30), 31]] * 5
    config = InstructionConfig(block_examples=300, merge_examples=20, update_examples=0, synthetic_share=0)
    with_leak = list(summary_examples(histories, catalogue, PROMPTS, config))
    cut = list(summary_examples(histories_before_cut(histories, 1), catalogue, PROMPTS, config))
    assert any("PLANTED" in example.prompt for example in with_leak)
    assert not any("PLANTED" in example.prompt + example.answer for example in cut)


def test_examples_are_a_function_of_their_arguments(catalogue, histories):
    config = InstructionConfig(block_examples=50, merge_examples=50, update_examples=0)
    first = list(summary_examples(histories, catalogue, PROMPTS, config))
    assert first == list(summary_examples(histories, catalogue, PROMPTS, config))
    other = config.model_copy(update={"seed": 1})
    assert first != list(summary_examples(histories, catalogue, PROMPTS, other))


def test_block_examples_use_the_very_prompt_and_answer_of_summarising():
    catalogue = Catalogue(["Alien"], [{"genre": ["Horror", "Sci-Fi"]}])
    config = InstructionConfig(block_examples=20, merge_examples=0, update_examples=0, block_size=2)
    line = PROMPTS.item_line("Alien", catalogue.attributes[0])
    expected = {
        (PROMPTS.block_prompt([line] * n).text, PROMPTS.reference_block_summary([catalogue.attributes[0]] * n))
        for n in (1, 2)
    }
    assert {(e.prompt, e.answer) for e in summary_examples([[1, 1, 1]], catalogue, PROMPTS, config)} == expected


def test_the_answer_of_a_merge_follows_from_what_the_prompt_shows():
    catalogue = Catalogue(["Alien", "Big"], [{"genre": ["Horror"]}, {"genre": ["Comedy"]}])
    config = InstructionConfig(block_examples=0, merge_examples=100, update_examples=0, noise=1.0)
    examples = list(summary_examples([[1] * 30], catalogue, PROMPTS, config))
    words = {"once": 1, "twice": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    for example in examples:
        shown = {
            value: sum(count for word, count in words.items() for _ in range(example.prompt.count(f"{value} {word}")))
            for value in ("Horror", "Comedy")
        }
        named = [value for value in sorted(shown, key=lambda value: (-shown[value], value)) if shown[value]]
        expected = f"Mostly chooses {' and '.join(named)}." if named else "No clear preference."
        assert example.answer.split(" Lately")[0] == expected


def test_few_users_suffice_because_histories_are_made_up_too(catalogue):
    config = InstructionConfig(block_examples=30, merge_examples=30, update_examples=0)
    examples = list(summary_examples([], catalogue, PROMPTS, config))
    assert len(examples) == 60
    assert len({example.prompt for example in examples}) > 50


def test_an_update_follows_from_the_summary_and_the_items_it_shows(catalogue):
    config = InstructionConfig(block_examples=0, merge_examples=0, update_examples=200)
    examples = list(summary_examples([], catalogue, PROMPTS, config))
    attributes = dict(zip(catalogue.lines(PROMPTS), catalogue.attributes, strict=True))
    vocabulary = Vocabulary(value for item in catalogue.attributes for values in item.values() for value in values)
    later = 0
    for example in examples:
        summary = re.search(r"^Summary: (.*)$", example.prompt, re.MULTILINE)[1]
        block = PROMPTS.counts([attributes[line] for line in example.prompt.splitlines() if line in attributes])
        if not summary.startswith(("Mostly", "No clear")):
            continue
        named = vocabulary.named(summary.split(" Lately")[0])
        worth = dict(zip(named, (6, 4, 3), strict=False))
        assert PROMPTS.reference_update(worth, block)[0] == example.answer
        later += 1
    assert len(examples) == 200
    assert later > 100


def test_catalogue_lines_are_plain_text_without_a_prompt(catalogue):
    config = InstructionConfig(block_examples=0, merge_examples=0, update_examples=0, catalogue_repeats=2)
    examples = list(summary_examples([], catalogue, PROMPTS, config))
    assert [example.answer for example in examples] == catalogue.lines(PROMPTS) * 2
    assert {example.prompt for example in examples} == {""}
