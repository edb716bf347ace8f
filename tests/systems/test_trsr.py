"""LLM-TRSR's prompts tell of nothing but the past, of which they show what fits, and candidates are scored by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.data.candidates import CandidateSets
from raypipe.engines.engine import EngineConfig, OutcomeError, Scores
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.catalogue import Catalogue
from raypipe.language.prompt import Prompt
from raypipe.metrics.ranking import candidate_metrics
from raypipe.recommenders.windows import Histories
from raypipe.systems.trsr import NOTHING, TrsrConfig, likelihoods
from raypipe.systems.trsr_past import Past, PastSummaries
from tests.systems.ranker_world import (
    EVENTS,
    ITEMS,
    KINDS,
    PLAIN,
    USERS,
    asked,
    histories,
    learnt,
    past,
    save_lm,
    summaries,
    titles,
    trsr,
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def backbone(lm: str) -> Backbone:
    return load_backbone(lm, device="cpu")


def test_a_prompt_shows_summary_and_last_items_and_ends_with_the_candidate(backbone: Backbone) -> None:
    system = trsr(backbone, past(summaries(7)), recent=2)
    ((prompt,),) = system.prompts(np.array([0]), 1, np.array([[3]]), ["likes\ndark"])
    recent = [f"title: plain {item - 1}" for item in histories().items[5:7]]
    assert prompt.text == f"likes likes dark now {recent[0]}\n{recent[1]} next title: plain 2 ?"
    bare = trsr(backbone, past(PastSummaries()), recent=0)
    ((prompt,),) = bare.prompts(np.array([0]), 1, np.array([[3]]), [None])
    assert prompt.text == f"likes {NOTHING} now {NOTHING} next title: plain 2 ?"


def test_the_whole_history_is_its_last_events_as_many_as_the_context_holds(backbone: Backbone) -> None:
    def shown(context: int, **options: object) -> int:
        system = trsr(backbone, past(PastSummaries()), context, recent=None, **options)
        ((prompt,),) = system.prompts(np.array([0]), 0, np.array([[3]]), [None])
        (ids,) = backbone.encode([prompt.text])
        assert len(ids) < context
        count, wanted = system.shown(np.array([0]), 0, np.array([[3]]), [None])
        assert count.tolist() == [prompt.text.count("title:") - 1]
        assert wanted.tolist() == [options.get("history", 8)]
        return int(count[0])

    assert shown(512) == 8
    assert shown(512, history=3) == 3
    counts = [shown(context) for context in range(24, 80, 4)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1


def test_every_item_learnt_has_a_yes_and_items_never_chosen_have_a_no(backbone: Backbone) -> None:
    examples = learnt(trsr(backbone, past(PastSummaries()), negatives=2), positions=3)
    users = 3 * USERS // 4
    assert [example.answer for example in examples] == ["yes", "no", "no"] * 3 * users
    whole = histories()
    chosen = {frozenset(whole.items[end - EVENTS : end].tolist()) for end in whole.ends}
    lines = {f"title: {title}": number for number, title in enumerate(titles(), 1)}
    for start in range(0, len(examples), 3):
        items = [
            lines[example.prompt.text.split(" next ")[1].removesuffix(" ?")] for example in examples[start : start + 3]
        ]
        mine = [history for history in chosen if items[0] in history and not {*items[1:]} & history]
        assert mine
        assert len(set(items)) == 3
    assert {example.whole for example in examples} == {False}
    assert {example.whole for example in learnt(trsr(backbone, past(PastSummaries()), loss="text"))} == {True}


@pytest.mark.parametrize("facts", [False, True])
def test_no_text_of_what_comes_after_an_event_is_in_its_prompt(backbone: Backbone, facts: bool) -> None:
    """A changed future, with its summaries, changes no prompt before it, nor which items are drawn beside."""
    known = {row: [(2, "one two"), (6, "one to six"), (7, "all")] for row in range(USERS)}
    changed = {row: [(2, "one two"), (6, "changed"), (7, "changed too")] for row in range(USERS)}
    other = histories()
    other.items[5::EVENTS] = 1 + PLAIN  # the sixth event of everybody
    one = Past(histories(), np.zeros(USERS, bool), Catalogue(titles(), [{}] * ITEMS), PastSummaries(known))
    two = Past(other, np.zeros(USERS, bool), Catalogue(titles(), [{}] * ITEMS), PastSummaries(changed))
    rows, back = np.arange(USERS), EVENTS - 5
    candidates = np.full((USERS, 2), 3)
    prompts = [
        list(system.prompts(rows, back, candidates, system.summaries(rows, back)))
        for system in (trsr(backbone, mine, facts=facts) for mine in (one, two))
    ]
    assert prompts[0] == prompts[1]
    assert "one two" in prompts[0][0][0].text
    later = [trsr(backbone, mine).summaries(rows, back - 1)[0] for mine in (one, two)]
    assert later == ["one to six", "changed"]


def test_what_is_held_out_is_in_no_text_that_training_reads(backbone: Backbone) -> None:
    """The last item of everybody has a title of its own."""
    whole = histories()
    unique = np.concatenate([whole.items, np.zeros(0, np.int32)])
    unique[EVENTS - 1 :: EVENTS] = ITEMS + 1
    catalogue = Catalogue([*titles(), "Unmistakable"], [{}] * (ITEMS + 1))
    known = Past(
        Histories(unique, whole.ends, whole.users).without_last(1), np.zeros(USERS, bool), catalogue, summaries(7)
    )
    system = trsr(backbone, known, recent=None)
    positives = [example for example in learnt(system, positions=10) if example.answer == "yes"]
    assert len(positives) == 6 * USERS
    assert not [example for example in positives if "Unmistakable" in example.prompt.text]
    # What validation asks for, the last event before the cut, is learnt no more than what comes after it.
    kept = [example for example in learnt(system, positions=10, left=1) if example.answer == "yes"]
    assert len(kept) == 5 * USERS
    asked_first = [
        prompts[0].text
        for prompts in system.prompts(
            np.arange(USERS), 1, unique[EVENTS - 2 :: EVENTS, None], system.summaries(np.arange(USERS), 1)
        )
    ]
    assert not {example.prompt.text for example in kept} & {*asked_first}
    assert {example.prompt.text for example in positives} >= {*asked_first}


def test_summaries_go_missing_and_astray_for_as_many_users_as_asked(backbone: Backbone) -> None:
    rows, back = np.arange(USERS), EVENTS - 7
    own = [KINDS[row % len(KINDS)] for row in range(USERS)]
    disturbed = trsr(backbone, past(summaries(7)), missing=0.3, noise=0.3).summaries(rows, back)
    missing = sum(text is None for text in disturbed)
    astray = sum(text not in (None, mine) for text, mine in zip(disturbed, own, strict=True))
    assert 30 < missing < 66
    assert 20 < astray < 55  # a quarter of those who go astray find their own kind
    system = trsr(backbone, past(summaries(7)))
    assert system.summaries(rows, back) == own
    assert system.summaries(rows, back, "no summaries") == [None] * USERS
    assert system.summaries(rows, back, "shuffled summaries") == [*own[1:], own[0]]


def test_whose_summary_goes_astray_is_never_shown_her_own(backbone: Backbone) -> None:
    rows, back = np.arange(USERS), EVENTS - 7
    named = PastSummaries({row: [(7, f"of {row}")] for row in range(USERS)})
    astray = trsr(backbone, past(named), noise=1.0).summaries(rows, back)
    assert not any(text in (None, f"of {row}") for row, text in enumerate(astray))
    (shuffled,) = trsr(backbone, past(named)).summaries(rows[3:4], back, "shuffled summaries")
    assert shuffled is not None
    assert shuffled != "of 3"
    alone = trsr(backbone, past(PastSummaries({3: [(7, "of 3")]})), noise=1.0)
    assert alone.summaries(rows[3:4], back) == alone.summaries(rows[3:4], back, "shuffled summaries") == [None]


def test_who_is_held_out_is_in_no_count_and_lends_no_summary(backbone: Backbone) -> None:
    """Their items and what was written of them are nobody else's."""
    whole, mine = histories(), np.arange(USERS) % 4 == 3
    items = np.where(np.repeat(mine, EVENTS), ITEMS + 1, whole.items).astype(np.int32)
    known = Past(
        Histories(items, whole.ends, whole.users),
        mine,
        Catalogue([*titles(), "Unmistakable"], [{}] * (ITEMS + 1)),
        PastSummaries({row: [(7, "theirs" if mine[row] else "ours")] for row in range(USERS)}),
    )
    assert known.learnable.counts(ITEMS + 1)[-1] == 0
    assert len(known.learnable) == (~mine).sum()
    system = trsr(backbone, known, facts=True, noise=1.0)
    assert system.facts().popularity[ITEMS + 1] == 0
    assert set(system.summaries(np.flatnonzero(~mine), EVENTS - 7)) == {"ours"}


class Unsure:
    """Finds yes as likely as no."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        return [Scores(index, (-1.0, -1.0), 5) for index in range(len(prompts))]


def test_a_scorer_without_an_opinion_is_at_chance(backbone: Backbone) -> None:
    system = trsr(backbone, past(PastSummaries()))
    rows = np.arange(USERS)
    sets = asked(system, rows)
    scores = np.concatenate([part.yes for part in system.scores(Unsure(), rows, sets)])  # type: ignore[arg-type]
    figures = {name: values.mean() for name, values in candidate_metrics(*sets.ranks(scores)).items()}
    assert figures["Recall@3"] == pytest.approx(0.143, abs=1e-3)
    assert figures["MRR@3"] == pytest.approx(0.087, abs=1e-3)


def test_whose_prompts_are_too_long_is_at_chance_and_counted(lm: str, backbone: Backbone) -> None:
    long = PastSummaries({0: [(7, "dark " * 600)], 1: [(7, "dark")]})
    system = trsr(backbone, past(long, hold_out=1))
    engine = EngineConfig(lm=lm, device="cpu", threads=1).build()
    (told,) = system.scores(engine, np.array([0, 1]), asked(system, [0, 1]))
    assert {user: error.kind for user, error in told.errors.items()} == {0: "prompt_too_long"}
    assert (told.yes[0] == 0).all()
    assert len(set(told.yes[1].tolist())) > 1


class Damaged(Unsure):
    """Has no number for the fourth prompt."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        found = super().score(prompts, answers)
        return [*found[:3], Scores(3, tokens_in=5, error=OutcomeError("not_finite", "no number")), *found[4:]]


def test_who_has_no_answer_about_one_candidate_is_told_why(backbone: Backbone) -> None:
    system, rows = trsr(backbone, past(PastSummaries())), np.array([0, 1, 2])
    (told,) = system.scores(Damaged(), rows, asked(system, [0, 1, 2]))  # type: ignore[arg-type]
    assert {user: error.message for user, error in told.errors.items()} == {0: "no number"}
    assert [set(yes) for yes in told.yes.tolist()] == [{0.0}, {0.5}, {0.5}]


def test_many_candidates_are_asked_about_in_few_users_at_a_time(
    lm: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three users with 300 candidates each, as each prompt by itself."""
    monkeypatch.setattr("raypipe.systems.trsr._PROMPTS_AT_ONCE", 700)
    system = trsr(backbone, past(summaries(7)), recent=1)
    rows, draw = np.arange(3), np.random.default_rng(0)
    sets = CandidateSets(rows, draw.integers(1, ITEMS + 1, (3, 300)).astype(np.int32), np.zeros(3, np.int64))
    engine = EngineConfig(lm=lm, device="cpu", threads=1).build()
    asked_at_once: list[int] = []

    class Counted:
        def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Iterator[Scores]:
            asked_at_once.append(len(prompts))
            return engine.score(prompts, answers)

    found = list(system.scores(Counted(), rows, sets))  # type: ignore[arg-type]
    assert asked_at_once == [600, 300]
    assert [(scored.part.start, scored.part.stop) for scored in found] == [(0, 2), (2, 3)]
    yes = np.concatenate([scored.yes for scored in found])
    prompts = list(system.prompts(rows, 0, sets.items, system.summaries(rows, 0)))
    for user, place in zip(draw.integers(0, 3, 30), draw.integers(0, 300, 30), strict=True):
        alone = likelihoods(engine, [prompts[user][place]], [system.answers])
        assert yes[user, place] == pytest.approx(alone.yes[0], abs=1e-5)
    monkeypatch.setattr("raypipe.systems.trsr._PROMPTS_AT_ONCE", 100)
    asked_at_once.clear()
    single = np.concatenate([scored.yes for scored in system.scores(Counted(), rows, sets)])  # type: ignore[arg-type]
    assert asked_at_once == [300, 300, 300]
    np.testing.assert_allclose(single, yes, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora": None}, "nothing would be trained"),
        ({"full": True}, "set lora to null"),
        ({"prompt": "{candidate} {summary} {recent}"}, "behind the other marks"),
        ({"prompt": "{summary} {recent}"}, "each once"),
        ({"prompt": "For {user}: {summary} {recent} {candidate}"}, "no other"),
        ({"missing": 0.6, "noise": 0.6}, "shares of the same users"),
        ({"history_missing": 0.6, "history_noise": 0.6}, "shares of the same events"),
    ],
)
def test_what_makes_no_recommender_is_refused(options: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrsrConfig.model_validate(options)
