"""RecExplainer's examples: their exact numbers, what each shows, and whose."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt, Text, Vectors
from raypipe.language.soft_prompts import SoftExample
from raypipe.language.templates import Templates
from raypipe.recommenders.windows import Histories
from raypipe.systems.explainer_examples import ExplainerExamples, Form, HeldOutPrompts, PromptPieces, Task
from raypipe.systems.explainer_prompts import ExplainerPrompts
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.source import Source
from raypipe.systems.teacher import teach
from tests.systems.sources import HELD_OUT, ITEMS, LENGTHS, source_of

PROMPTS = ExplainerPrompts()
TRAINED = LENGTHS[~HELD_OUT]


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of()


def made(
    source: Source, tasks: Sequence[Task], forms: Sequence[Form] = ("text",), titles: int = 3
) -> list[SoftExample]:
    made = ExplainerExamples(source, forms, titles, PROMPTS, np.random.default_rng(0))
    return list(made.of_users(tasks, 100, 100))


def words_of(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt.segments if isinstance(segment, Text))


def is_asked_by(prompt: Prompt, templates: Templates) -> bool:
    """Whether the prompt's words are those of one of the training's templates, whatever stands for its marks."""
    patterns = [re.sub(r"\\\{\w+\\\}", ".*", re.escape(template)) for template in templates.training]
    return any(re.fullmatch(pattern, words_of(prompt)) for pattern in patterns)


def test_there_are_as_many_examples_as_the_paper_counts(source: Source) -> None:
    # Histories here end before the cut: N interactions of U users are one more for each user.
    users, interactions = len(TRAINED), int(TRAINED.sum() + len(TRAINED))
    assert len(made(source, ["T1"])) == interactions - 2 * users
    assert len(made(source, ["T2"])) == interactions - 2 * users
    assert len(made(source, ["T3"])) == 2 * users
    assert len(made(source, ["T6"], ["vectors"])) == interactions - users
    assert len(made(source, ["T1"], ["text", "vectors", "both"])) == 3 * (interactions - 2 * users)
    assert len(made(source, ["T6"], ["text", "vectors", "both"])) == interactions - users
    assert made(source, ["T6"], ["text"]) == []


def test_a_history_of_one_event_teaches_its_title_and_no_prediction(source: Source) -> None:
    histories = source.histories.take(source.histories.starts, np.ones_like(LENGTHS))
    short = replace(source, histories=histories)
    assert made(short, ["T1", "T2", "T3"]) == []
    told = made(short, ["T6"], ["vectors"])
    assert sorted(one.answer for one in told) == sorted(
        source.titles[source.items(row, 1)[0] - 1] for row in np.flatnonzero(~HELD_OUT).tolist()
    )


def test_what_a_catalogue_calls_description_is_asked_where_an_item_has_no_text(source: Source) -> None:
    attributes = [{"description": [f"kind {n}"]} for n in range(len(source.titles))]
    described = replace(source, catalogue=replace(source.catalogue, attributes=attributes))
    examples = ExplainerExamples(described, ["text"], 3, PROMPTS, np.random.default_rng(0))
    answers = {example.answer for example in examples.of_items()}
    assert {f"kind {n}" for n in range(len(source.titles))} <= answers


def test_the_next_item_is_the_recommenders_favourite_and_never_what_was_chosen(source: Source) -> None:
    rows = np.flatnonzero(~HELD_OUT)
    owners = np.repeat(rows, LENGTHS[rows] - 1)
    events = np.concatenate([np.arange(1, length) for length in LENGTHS[rows]])
    taught = teach(source, owners, events, np.random.default_rng(0))
    expected = Counter(
        (tuple(source.titles_of(source.items(row, count))[-3:]), source.titles[favourite - 1])
        for row, count, favourite in zip(owners, events, taught.favourites, strict=True)
    )
    found = Counter()
    for example in made(source, ["T1"]):
        (segment,) = example.prompt.segments
        shown = [title for title in source.titles if re.search(rf"{title}(?!\d)", segment.text)]
        found[frozenset(shown), example.answer] += 1
    assert found == Counter({(frozenset(history), answer): 1 for history, answer in expected.elements()})
    for example in made(source, ["T1"]):
        assert is_asked_by(example.prompt, PROMPTS.next_item)


def test_a_form_shows_titles_or_vectors_or_both(source: Source) -> None:
    state = source.states(np.array([1]), np.array([4]))[0]
    items = source.items(1, 4)
    history = "; ".join(source.titles_of(items)[-2:])
    text, vectors, both = (
        PromptPieces(form, source.titles, source.item_states, 2) for form in ("text", "vectors", "both")
    )
    assert text.user(items, state) == history
    assert vectors.user(items, state) == Vectors(state[None], "user")
    assert both.user(items, state) == [f"{history} ", Vectors(state[None], "user")]
    item = Vectors(source.item_states[7][None], "item")
    assert (text.item(7), vectors.item(7), both.item(7)) == ("Film 7", item, ["Film 7 ", item])
    assert text.items([7, 8]) == ["Film 7", "; ", "Film 8"]
    assert both.items([7, 8])[2:4] == ["; ", "Film 8 "]


def test_a_ranking_answers_with_the_candidates_it_shows_in_the_recommenders_order(source: Source) -> None:
    for example in made(source, ["T2"]):
        (segment,) = example.prompt.segments
        ranked = example.answer.split("; ")
        assert len(set(ranked)) == 5
        assert all(title in segment.text for title in ranked)
    for example in made(source, ["T2"], ["vectors"]):
        shown = [segment.values[0] for segment in example.prompt.segments if isinstance(segment, Vectors)]
        user = next(vector for vector in shown if not any(np.array_equal(vector, item) for item in source.item_states))
        scores = [source.item_states[int(title.split()[1])] @ user for title in example.answer.split("; ")]
        assert scores == sorted(scores, reverse=True)
        assert len(shown) == 6


def test_interest_has_a_yes_and_a_no_of_every_user_at_one_place(source: Source) -> None:
    answers = Counter(example.answer for example in made(source, ["T3"]))
    assert answers == {"Yes": len(TRAINED), "No": len(TRAINED)}


def test_an_explanation_says_what_the_choices_and_the_item_have_in_common(source: Source) -> None:
    made_ones = made(source, ["explanation"])
    assert len(made_ones) == (TRAINED - 1).sum()
    for example in made_ones:
        decision, taste, item = example.answer.removesuffix(".").split(". ")
        assert decision in {"Yes", "No"}
        genres = set(taste.removeprefix("The choices are mostly ").replace(" and ", ", ").split(", "))
        title, kind = item.split(" is ")
        genre, fits = kind.split(", ")
        assert source.catalogue.attributes[source.titles.index(title)]["genre"] == [genre]
        assert (fits == "as they are") == (genre in genres)


def test_a_history_is_read_from_its_state_alone_oldest_first(source: Source) -> None:
    answers = Counter(example.answer for example in made(source, ["T6"], ["vectors"]))
    rows = np.flatnonzero(~HELD_OUT)
    expected = Counter(
        "; ".join(source.titles_of(source.items(row, count))[-3:])
        for row in rows
        for count in range(1, LENGTHS[row] + 1)
    )
    assert answers == expected
    config = ExplainerConfig(variant="I", titles=3, tasks=("T6",), listed=False)
    drawn = [list(config.build().examples(source, 100, 100, np.random.default_rng(seed))) for seed in range(20)]
    # One title of every history, whichever; a history is known by its state.
    histories = {state_of(example): example.answer.split("; ") for example in made(source, ["T6"], ["vectors"])}
    found = {
        state: {example.answer for mine in drawn for example in mine if state_of(example) == state}
        for state in histories
    }
    assert found == {state: set(titles) for state, titles in histories.items()}
    assert {len(mine) for mine in drawn} == {len(histories)}
    assert all(is_asked_by(example.prompt, PROMPTS.history_of_one) for example in drawn[0])


def state_of(example: SoftExample) -> tuple[float, ...]:
    (vectors,) = (segment for segment in example.prompt.segments if isinstance(segment, Vectors))
    return tuple(vectors.values[0].round(3).tolist())


def test_pairs_are_of_as_many_places_of_each_user_as_are_asked_for_or_there_are(source: Source) -> None:
    made = ExplainerExamples(source, ["vectors"], 3, PROMPTS, np.random.default_rng(0), pairs=3)
    users = Counter(example.prompt.segments[-1].values.tobytes() for example in made.of_users(["T3"], 100, 100))
    assert set(users.values()) == {2}  # a yes and a no at each place
    assert len(users) == np.minimum(TRAINED - 1, 3).sum()


def test_lists_name_each_item_as_often_as_is_said_in_the_order_they_are_shown(source: Source) -> None:
    made = ExplainerExamples(source, ["text", "vectors"], 3, PROMPTS, np.random.default_rng(0))
    lists = list(made.of_lists(4))
    assert Counter(title for example in lists for title in example.answer.split("; ")) == dict.fromkeys(
        source.titles, 8
    )
    for example in lists:
        titles = example.answer.split("; ")
        vectors = [segment.values[0] for segment in example.prompt.segments if isinstance(segment, Vectors)]
        if vectors:
            items = np.stack([source.item_states[source.titles.index(title) + 1] for title in titles])
            np.testing.assert_array_equal(vectors, items)
        else:
            assert example.answer in example.prompt.text
    assert list(made.of_lists(0)) == []
    assert all(is_asked_by(example.prompt, PROMPTS.titles) for example in lists)


def test_summaries_are_learnt_of_users_who_have_one_and_are_not_held_out(source: Source) -> None:
    held_out, trained = int(np.flatnonzero(HELD_OUT)[0]), int(np.flatnonzero(~HELD_OUT)[0])
    told = replace(source, summaries={held_out: "Nobody may read this.", trained: "Likes War."})
    assert [example.answer for example in made(told, ["T6b"], ["text", "both"])] == ["Likes War."] * 2
    assert made(source, ["T6b"]) == []


def test_items_are_told_apart_by_vector_attribute_and_neighbour(source: Source) -> None:
    made = ExplainerExamples(source, ["vectors"], 3, PROMPTS, np.random.default_rng(0))
    examples = list(made.of_items())
    assert len(examples) == 3 * ITEMS  # title, genre, nearest
    assert {example.answer for example in examples if is_asked_by(example.prompt, PROMPTS.title)} == set(source.titles)
    text = list(ExplainerExamples(source, ["text"], 3, PROMPTS, np.random.default_rng(0)).of_items())
    assert len(text) == 2 * ITEMS
    again = list(ExplainerExamples(source, ["vectors"], 3, PROMPTS, np.random.default_rng(0)).of_items(3))
    assert Counter(example.answer for example in again) == {
        answer: 3 * count for answer, count in Counter(example.answer for example in examples).items()
    }
    genres = [example.answer for example in text if "genre" in example.prompt.text]
    assert sorted(genres) == sorted(values["genre"][0] for values in source.catalogue.attributes)


def test_descriptions_are_asked_of_items_that_have_one_and_no_longer_than_is_said(source: Source) -> None:
    texts = ["A ship\nis lost in space.", "", *["A tale."] * (ITEMS - 2)]
    told = replace(source, catalogue=replace(source.catalogue, texts=texts))
    for form in ("text", "vectors"):
        rng = np.random.default_rng(0)
        examples = list(ExplainerExamples(told, [form], 3, PROMPTS, rng, text_characters=14).of_items())
        described = [example for example in examples if "description" in words_of(example.prompt)]
        assert [example.answer for example in described] == ["A ship is lost…", *["A tale."] * (ITEMS - 2)]
        assert all(is_asked_by(example.prompt, PROMPTS.attribute) for example in described)
    assert len(list(ExplainerExamples(told, ["text"], 3, PROMPTS, np.random.default_rng(0)).of_items())) == 2 * ITEMS


def test_questions_use_the_tests_templates_and_a_control_asks_as_somebody_else(source: Source) -> None:
    rows = np.flatnonzero(HELD_OUT)
    taught = teach(source, rows, LENGTHS[rows], np.random.default_rng(0))
    shown = PromptPieces("text", source.titles, source.item_states, 3)
    own = HeldOutPrompts.of(source, rows, taught, shown, PROMPTS)
    other = HeldOutPrompts.of(source, rows, taught, shown, PROMPTS, shift=1)
    for asked, templates in ((own.next_item, PROMPTS.next_item), (own.liked, PROMPTS.interest)):
        assert len(asked) == len(rows)
        assert not any(is_asked_by(prompt, templates) for prompt in asked)
    # Each is put as the next one, in the words of their own question.
    as_next = [prompt.text.rsplit(": ")[-1].rsplit("after ")[-1] for prompt in own.next_item]
    as_own = [prompt.text.rsplit(": ")[-1].rsplit("after ")[-1] for prompt in other.next_item]
    assert as_next[1:] + as_next[:1] == as_own
    assert len(set(as_own)) == len(rows)
    candidates = source.titles_of(taught.candidates[0].tolist())
    assert all(title in other.ranking[0].text for title in candidates)
    assert len(other.candidates) == 5 * len(rows)
    assert all(title in prompt.text for title, prompt in zip(candidates, other.candidates[:5], strict=True))
    assert as_own[0] in other.candidates[4].text
    assert [len(prompt.segments) for prompt in own.history] == [2] * len(rows)


def test_a_catalogue_that_everybody_has_seen_is_told_before_training(source: Source) -> None:
    seen = Histories(np.tile(np.arange(1, 37, dtype=np.int32), len(LENGTHS)), 36 * np.arange(1, len(LENGTHS) + 1))
    full = replace(source, histories=seen)
    with pytest.raises(UsageError, match="have seen nearly all of the catalogue's 40 items"):
        list(ExplainerConfig().build().examples(full, 10, 10, np.random.default_rng(0)))
    # Of users who have seen all of it nothing is asked, and the others' examples stay.
    late = made(full, ["T1"])
    assert len(late) == len(TRAINED) * 30
