"""Which of two titles fits a history better: the rule against a count by hand, engines, and orders that do not matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.engines.engine import EngineConfig, Outcome
from raypipe.errors import UsageError
from raypipe.storage.ledger import Usage
from raypipe.systems.judges import Rubric
from raypipe.systems.preference import (
    PREFERENCE,
    RULE,
    EnginePreference,
    OverlapRule,
    Pair,
    PreferenceJudges,
    preferences,
    preferred,
)
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter
from tests.systems.sources import ITEMS, source_of

KNOWN = frozenset(f"Film {n}" for n in range(1, 41))


class Fixed:
    """Answers each pair with what it is made with, and remembers what it was asked."""

    def __init__(self, answer: float | None) -> None:
        self.answer, self.asked = answer, []

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        self.asked += pairs
        return [self.answer] * len(pairs)


def pairs(count: int) -> list[Pair]:
    return [Pair(["Film 1"], f"Film {n % 20 + 1}", f"Film {n % 20 + 21}") for n in range(count)]


def test_the_rule_prefers_the_item_whose_values_more_of_the_history_has() -> None:
    # Of three genres in turn: films 1, 4, 7 … are of War, 2, 5, 8 … of Noir, 3, 6, 9 … of Drama.
    rule = OverlapRule(source_of())
    history = ["Film 3", "Film 6", "Film 2"]
    asked = [Pair(history, "Film 9", "Film 5"), Pair(history, "Film 1", "Film 2"), Pair(history, "Film 12", "Film 15")]
    assert rule.prefer(asked) == [1.0, 0.0, 0.5]
    assert rule.prefer([pair.turned for pair in asked]) == [0.0, 1.0, 0.5]


def test_a_judge_who_always_takes_the_first_is_at_chance_and_the_order_does_not_move_another() -> None:
    always = Fixed(1.0)
    found = preferred(always, pairs(4_000), KNOWN)
    assert found.share == pytest.approx(0.5, abs=0.03)  # four standard deviations
    assert found.judged == 1
    turned = [pair for pair in always.asked if int(pair.one.split()[1]) > 20]
    assert 1_800 < len(turned) < 2_200

    class SmallNumbers:
        def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
            return [float(int(pair.one.split()[1]) < int(pair.other.split()[1])) for pair in pairs]

    assert preferred(SmallNumbers(), pairs(200), KNOWN).share == 1.0
    assert preferred(SmallNumbers(), [pair.turned for pair in pairs(200)], KNOWN).share == 0.0


def test_a_made_up_title_loses_and_equal_ones_are_alike_without_a_question() -> None:
    judge = Fixed(1.0)
    asked = [Pair([], "Film 99", "Film 1"), Pair([], "Film 2", "Film 2")]
    found = preferred(judge, asked, KNOWN)
    assert (found.share, found.judged, judge.asked) == (0.25, 1.0, [])
    silent = preferred(Fixed(None), pairs(3), KNOWN)
    assert (silent.share, silent.judged) == (None, 0.0)
    half = preferred(Fixed(None), [*pairs(3), *asked[1:]], KNOWN)
    assert (half.share, half.judged) == (0.5, 0.25)


class Letters:
    """An engine that takes the title it finds among its favourites; of a pair without any it says nothing."""

    def __init__(self, favourites: set[str]) -> None:
        self.favourites = favourites
        self.prompts: list[str] = []

    def generate(self, prompts, decoding, choices=None):
        for index, prompt in enumerate(prompts):
            self.prompts.append(prompt.text)
            lines = prompt.text.splitlines()
            liked = [line[0] for line in lines if line[:3] in ("A: ", "B: ") and line[3:] in self.favourites]
            yield Outcome(index, f" {liked[0]}." if liked else "Neither")


def test_an_engine_is_shown_the_history_and_both_titles_and_answers_with_a_letter() -> None:
    engine = Letters({"Film 1", "Film 22"})
    judge = EnginePreference(engine, Rubric(prompt=PREFERENCE))
    history = ["Film 7", "Film 8"]
    asked = [Pair(history, "Film 1", "Film 21"), Pair(history, "Film 2", "Film 22"), Pair(history, "Film 3", "Film 23")]
    assert judge.prefer(asked) == [1.0, 0.0, None]
    assert "Film 7\nFilm 8\nA: Film 1\nB: Film 21\n" in engine.prompts[0]
    found = preferred(judge, asked, KNOWN)
    assert (found.share, found.judged) == (0.5, pytest.approx(2 / 3))


def test_what_every_judge_takes_is_summed_up_over_all_that_it_is_asked() -> None:
    class Costly:
        def generate(self, prompts, decoding, choices=None):
            for index in range(len(prompts)):
                yield Outcome(index, "A", tokens_in=10, tokens_out=2, calls=3)

    engines = [EnginePreference(Costly(), Rubric(prompt=PREFERENCE)) for _ in range(2)]  # type: ignore[arg-type]
    for count, engine in enumerate(engines, 1):
        engine.prefer(pairs(4))
        engine.prefer(pairs(count))
    assert [(one.calls, one.tokens_in, one.tokens_out) for one in engines] == [(15, 50, 10), (18, 60, 12)]

    judges = PreferenceJudges(
        {name: EngineConfig(engine="echo") for name in ("one", "other")}, Rubric(prompt="{history}")
    )
    assert judges.spent == Usage()
    asked = judges.build(source_of())
    assert list(asked) == [RULE, "one", "other"]
    for judge in asked.values():
        judge.prefer(pairs(4))
    assert (judges.spent.calls, judges.spent.tokens_in) == (8, 2 * 4 * 2)  # a history is two words
    assert judges.spent.tokens_out > 0
    assert {name: identity["engine"] for name, identity in judges.identities.items()} == {
        "one": "echo",
        "other": "echo",
    }


def test_the_seed_draws_which_title_comes_first() -> None:
    def asked(seed: int) -> list[bool]:
        judge = Fixed(1.0)
        one, other, history = zip(*((pair.one, pair.other, pair.history) for pair in pairs(40)), strict=True)
        preferences({"judge": judge}, one, {"random": other}, history, KNOWN, seed)
        return [int(pair.one.split()[1]) > 20 for pair in judge.asked]

    assert asked(0) == asked(0) != asked(1)


@pytest.mark.parametrize(
    ("text", "preferred"),
    [
        ("A", 1.0),
        (" B.", 0.0),
        ("B: a person who likes A would", 0.0),
        ("The letter is B", 0.0),
        ("A fits better", 1.0),
        ("A person with this history would prefer B.", None),
        ("both A and B", None),
        ("", None),
    ],
)
def test_an_answer_that_may_be_an_article_or_names_both_is_none(text: str, preferred: float | None) -> None:
    class Saying:
        def generate(self, prompts, decoding, choices=None):
            yield from (Outcome(index, text) for index in range(len(prompts)))

    assert EnginePreference(Saying(), Rubric(prompt=PREFERENCE)).prefer(pairs(1)) == [preferred]  # type: ignore[arg-type]


def test_what_an_oracle_names_is_judged_beside_its_nearest_item_and_a_drawn_one() -> None:
    source = source_of("sasrec")
    rows = source.rows(held_out=True, least=2, most=100, rng=np.random.default_rng(0))
    histories = [source.titles_of(source.before_cut(row)[-10:]) for row in rows.tolist()]
    genre = dict(zip(source.titles, (item["genre"][0] for item in source.catalogue.attributes), strict=True))
    counts = [Counter(genre[title] for title in history) for history in histories]
    # Of each history a film of the genre that most of it is of.
    best = [next(title for title in source.titles if count[genre[title]] == max(count.values())) for count in counts]

    class Naming:
        """Names them for readings that it sees, and without states what nobody knows."""

        def generate(self, prompts, decoding, choices=None):
            for index, prompt in enumerate(prompts):
                yield Outcome(index, best[index % len(best)] if prompt.has_vectors else "No Film")

    figures = RecInterpreter(InterpreterConfig(after="item")).measured(source, Naming(), 100, 8)
    drawn = source.titles_of((np.random.default_rng(0).integers(ITEMS, size=len(best)) + 1).tolist())
    # Nothing fits better: a drawn film of the same genre, or of one as frequent, fits alike.
    alike = np.mean(
        [count[genre[one]] == count[genre[other]] for count, one, other in zip(counts, best, drawn, strict=True)]
    )
    assert alike < 1
    assert figures["oracle preferred to random"] == pytest.approx(1 - alike / 2, abs=1e-4)
    assert 0.5 <= figures["oracle preferred to nearest"] <= 1
    assert figures["no states: oracle preferred to random"] == 0.0
    assert 0 <= figures["nearest item: oracle preferred to random"] <= 1
    assert "nearest item: oracle preferred to nearest" not in figures


def test_judges_who_cannot_be_asked_are_refused_before_training() -> None:
    judges = {"other": {"engine": "echo"}}
    for options, problem in (
        ({"judges": {"rule": {"engine": "echo"}}}, "give the engine another name"),
        ({"rubric": {"prompt": "{history} {third}"}}, "{third}, which there is not"),
    ):
        with pytest.raises(ValidationError) as told:
            InterpreterConfig.model_validate({"after": "item", **options})
        assert problem in str(told.value)
    source, rng = source_of(), np.random.default_rng(0)
    assert next(
        RecInterpreter(InterpreterConfig.model_validate({"after": "item", "judges": judges})).examples(
            source, 1, 1, rng
        )
    )
    for options, problem in (
        ({"judges": judges}, "this adapter reads none"),
        ({"after": "item", "judges": {"own": {"lm": "/nowhere"}}}, "There is no checkpoint folder '/nowhere'"),
    ):
        system = RecInterpreter(InterpreterConfig.model_validate(options))
        with pytest.raises(UsageError, match=problem):
            next(system.examples(source, 1, 1, rng))
        with pytest.raises(UsageError, match=problem):
            system.measured(source, Letters(set()), 1, 1)
