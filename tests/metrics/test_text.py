"""What a summary says of a user, against what the user did; with controls that must score at chance."""

import random
import time

import pytest

from raypipe.metrics.text import (
    Vocabulary,
    attribute_coverage,
    attribute_precision,
    distinctness,
    item_values,
    rule_summary_rating,
    shift_precision,
    stability,
    top_values,
    value_counts,
)

GENRES = Vocabulary(
    ["Sci-Fi", "Fi", "War", "Children's", "Drama", "Comedy", "Film-Noir", "3M", "Sci-Fi Horror", "Ça & là"]
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Mostly chooses Sci-Fi and Children's; also Drama.", ("Sci-Fi", "Children's", "Drama")),
        ("Wi-Fi in Warsaw, a war, Dramatic", ()),
        ("Sci-Fi Horror, then Sci-Fi", ("Sci-Fi Horror", "Sci-Fi")),
        ("War, War and War", ("War",)),
        ("Fi. (3M)", ("Fi", "3M")),
        ("Post-War Drama-like Fi's", ()),
        ("likes Ça & là!", ("Ça & là",)),
        ("", ()),
    ],
)
def test_values_are_named_as_whole_phrases_in_their_own_spelling(text: str, named: tuple[str, ...]):
    assert GENRES.named(text) == named


def test_an_empty_vocabulary_names_nothing():
    assert Vocabulary([]).named("Drama") == ()
    assert Vocabulary(["", " "]).named(" Drama ") == ()


def test_top_values_include_all_that_tie_with_the_last():
    assert top_values({"a": 5, "b": 4, "c": 2, "d": 2, "e": 1}) == {"a", "b", "c", "d"}
    assert top_values({"a": 1, "b": 0}) == {"a"}
    assert top_values({}) == frozenset()


def test_value_counts_count_items_not_mentions():
    items = [{"genre": ["Drama", "Drama"], "mood": ["Drama"]}, {"genre": ["Drama", "War"]}]
    assert value_counts(map(item_values, items)) == {"Drama": 2, "War": 1}


def test_precision_and_coverage_are_shares_of_the_named_and_of_the_top():
    top = frozenset({"Drama", "War", "Comedy"})
    named = GENRES.named("Mostly chooses Drama and Sci-Fi.")
    assert attribute_precision(named, top) == 1 / 2
    assert attribute_coverage(named, top) == 1 / 3


def test_silence_is_not_precision_and_no_history_is_no_score():
    assert attribute_precision((), frozenset({"Drama"})) == 0.0
    assert attribute_coverage((), frozenset({"Drama"})) == 0.0
    assert attribute_precision(("Drama",), frozenset()) is None
    assert attribute_coverage(("Drama",), frozenset()) is None


def test_a_shift_is_right_when_the_value_grew_per_item():
    def shift(summary: str) -> float | None:
        return shift_precision(GENRES.named_lately(summary), {"Drama": 8, "War": 2}, {"Drama": 3, "War": 3}, 20, 5)

    assert shift("Mostly Drama. Lately more War.") == 1.0
    assert shift("Mostly War. Lately more Drama and Comedy.") == 1 / 2  # .6 a recent item against .4; Comedy never
    assert shift("Mostly Drama.") is None
    assert shift_precision(("War",), {}, {"War": 1}, 0, 5) is None


def test_shuffled_and_constant_summaries_score_at_chance():
    rng = random.Random(1)
    values = [f"v{n}" for n in range(12)]
    vocabulary = Vocabulary(values)
    tops = [frozenset(rng.sample(values, 3)) for _ in range(3000)]
    honest = [f"Mostly chooses {' and '.join(sorted(top))}." for top in tops]
    shuffled = honest.copy()
    rng.shuffle(shuffled)

    def mean_precision(summaries: list[str]) -> float:
        scores = [attribute_precision(vocabulary.named(s), top) for s, top in zip(summaries, tops, strict=True)]
        return sum(score for score in scores if score is not None) / len(scores)

    assert mean_precision(honest) == 1.0
    assert mean_precision(shuffled) == pytest.approx(3 / 12, abs=0.02)
    assert mean_precision(["Mostly v1, v5 and v7."] * len(tops)) == pytest.approx(3 / 12, abs=0.02)
    assert mean_precision([" ".join(values)] * len(tops)) == pytest.approx(3 / 12, abs=1e-9)


def test_a_summary_is_read_in_microseconds_whatever_the_vocabulary():
    vocabulary = Vocabulary(f"Brand {n} & Sons" for n in range(20_000))
    summary = "Often Brand 17 & Sons, Brand 170 & Sons; once Brand 99"
    started = time.perf_counter()
    for _ in range(1000):
        assert vocabulary.named(summary) == ("Brand 17 & Sons", "Brand 170 & Sons")
    assert time.perf_counter() - started < 1.0  # about 10 ms; comparing every value would take 20 s


def test_stability_is_what_two_summaries_share() -> None:
    assert stability(("Drama", "War"), ("War", "Drama")) == 1
    assert stability(("Drama", "War"), ("War", "Comedy")) == pytest.approx(1 / 3)
    assert stability(("Drama",), ()) == 0
    assert stability((), ()) is None


def test_distinctness_is_the_chance_that_two_users_differ() -> None:
    summaries = ["a", "a", "b", "c"]
    pairs = [(one, other) for i, one in enumerate(summaries) for other in summaries[i + 1 :]]
    assert distinctness(summaries) == pytest.approx(sum(one != other for one, other in pairs) / len(pairs))
    assert distinctness(["same"] * 9) == 0
    assert distinctness(["alone"]) is None


@pytest.mark.parametrize(
    ("named", "rating"),
    [
        (("Drama", "War", "Comedy"), 3),
        (("Drama", "War"), 3),
        (("Drama",), 2),
        (("Drama", "Horror"), 2),
        (("Drama", "Horror", "Musical"), 1),
        (("Horror",), 0),
        ((), 0),
    ],
)
def test_a_rule_rates_what_a_summary_names_against_the_top_values(named: tuple[str, ...], rating: int) -> None:
    assert rule_summary_rating(named, {"Drama": 5, "War": 4, "Comedy": 3, "Horror": 1, "Musical": 1}) == rating
    assert rule_summary_rating(named, {}) is None
