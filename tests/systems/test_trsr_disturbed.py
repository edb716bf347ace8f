"""Events go missing or astray in what LLM-TRSR tells of a user's past, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.language.backbone import Backbone, load_backbone
from raypipe.pipeline.asked_anew import asked_anew
from raypipe.systems.trsr import NOTHING, TrsrConfig
from raypipe.systems.trsr_disturbed import Disturbed
from raypipe.systems.trsr_past import PastSummaries
from tests.systems.ranker_world import EVENTS, ITEMS, USERS, asked, histories, learnt, past, save_lm, summaries, trsr

ROWS = np.arange(USERS)
OPTIONS = ({"history_missing": 0.5}, {"history_noise": 0.5}, {"history_missing": 0.3, "history_noise": 0.3})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(save_lm(tmp_path_factory.mktemp("lm")), device="cpu")


def shown(backbone: Backbone, rows: np.ndarray = ROWS, **options: object) -> list[list[str]]:
    """The lines of last items that prompts show after whole histories."""
    system = trsr(backbone, past(PastSummaries()), recent=None, **options)
    candidates = np.full((len(rows), 1), 3)
    texts = [prompt.text for (prompt,) in system.prompts(rows, 0, candidates, [None] * len(rows))]
    return [text.split(" now ")[1].split(" next ")[0].split("\n") for text in texts]


def test_without_a_share_every_event_is_as_it_was(backbone: Backbone) -> None:
    whole = histories()
    same = Disturbed.of(whole, whole.users, 0, 0, ITEMS)
    assert same.left is whole
    some = Disturbed.of(whole, whole.users, 1e-12, 1e-12, ITEMS)
    assert np.array_equal(some.left.items, whole.items)
    assert np.array_equal(some.left.ends, whole.ends)
    events = np.arange(USERS) % EVENTS
    for one in (same, some):
        prefixes = one.prefixes(ROWS, events)
        assert np.array_equal(prefixes.items, whole.take(whole.starts, events).items)
        assert np.array_equal(prefixes.lengths, events)
    assert shown(backbone, history_missing=0.0) == shown(backbone)


def test_all_events_are_missing_or_of_items_that_were_drawn(backbone: Backbone) -> None:
    assert shown(backbone, history_missing=1.0) == [[NOTHING]] * USERS
    whole = histories()
    astray = Disturbed.of(whole, whole.users, 0, 1, ITEMS).left
    assert np.array_equal(astray.ends, whole.ends)
    assert set(astray.items.tolist()) == set(range(1, ITEMS + 1))
    # An event is of its own item by chance alone, and every item is as likely: 16 events an item.
    assert (astray.items == whole.items).mean() < 3 / ITEMS
    counts = np.bincount(astray.items, minlength=ITEMS + 1)[1:]
    assert ((counts - 1280 / ITEMS) ** 2 / (1280 / ITEMS)).sum() < 140  # chi-squared of 99: above 140 once in 250


@pytest.mark.parametrize(("missing", "noise"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
def test_shares_are_of_the_events(missing: float, noise: float) -> None:
    whole = histories()
    found = Disturbed.of(whole, whole.users, missing, noise, ITEMS)
    there = np.diff(found.kept) == 1
    assert 1 - there.mean() == pytest.approx(missing, abs=0.05)
    assert len(found.left.items) == there.sum()
    changed = found.left.items != whole.items[there]
    assert changed.sum() / len(whole.items) == pytest.approx(noise, abs=0.05)


@pytest.mark.parametrize("options", OPTIONS)
def test_what_becomes_of_an_event_is_the_same_in_every_batch_and_before_every_cut(
    backbone: Backbone, options: dict[str, float]
) -> None:
    together = shown(backbone, **options)
    assert together != shown(backbone)
    alone = [shown(backbone, np.array([row]), **options)[0] for row in (5, 0, 77)]
    assert alone == [together[row] for row in (5, 0, 77)]
    whole = histories()
    shares = options.get("history_missing", 0), options.get("history_noise", 0)
    late, shorter = Disturbed.of(whole, whole.users, *shares, ITEMS), whole.without_last(3)
    early = Disturbed.of(shorter, whole.users, *shares, ITEMS)
    assert np.array_equal(late.prefixes(ROWS, shorter.lengths).items, early.left.items)
    some = whole.of(ROWS % 3 == 1)
    part = Disturbed.of(some, some.users, *shares, ITEMS).left
    assert np.array_equal(part.items, late.left.of(ROWS % 3 == 1).items)


@pytest.mark.parametrize("options", OPTIONS)
def test_who_is_asked_about_what_and_what_is_learnt_stay_as_they_are(
    backbone: Backbone, options: dict[str, float]
) -> None:
    plain, other = (trsr(backbone, past(summaries(7)), facts=True, **mine) for mine in ({}, options))
    examples = [learnt(system) for system in (plain, other)]
    named = [[(one.prompt.text.split(" next ")[1].split("; ")[0], one.answer) for one in mine] for mine in examples]
    assert named[0] == named[1]
    assert examples[0] != examples[1]
    sets = asked(plain, [0, 1, 2])
    told = [list(system.prompts(ROWS[:3], 0, sets.items, system.summaries(ROWS[:3], 0))) for system in (plain, other)]
    candidates = [[[prompt.text.split(" next ")[1].split("; ")[0] for prompt in mine] for mine in one] for one in told]
    assert candidates[0] == candidates[1]
    assert np.array_equal(plain.facts().popularity, other.facts().popularity)
    assert (plain.facts().together != other.facts().together).nnz == 0
    assert plain.summaries(ROWS, 1) == other.summaries(ROWS, 1)


def test_facts_of_a_user_without_events_are_those_of_nobody(backbone: Backbone) -> None:
    system = trsr(backbone, past(PastSummaries()), facts=True, recent=0, history_missing=1.0)
    (mine, others) = system.prompts(ROWS[:2], 0, np.array([[3, 4], [3, 4]]), [None, None])
    assert mine == others
    plain = trsr(backbone, past(PastSummaries()), facts=True, recent=0)
    told = list(plain.prompts(ROWS[:2], 0, np.array([[3, 4], [3, 4]]), [None, None]))
    assert told[0] != mine


def test_who_is_served_is_told_all_of_it() -> None:
    config = TrsrConfig(history_missing=0.4, history_noise=0.4, missing=0.4, noise=0.4)
    assert config.undisturbed() == TrsrConfig()


def test_a_stored_ranker_can_be_asked_with_disturbed_histories() -> None:
    stored = TrsrConfig().model_dump(mode="json")
    given = TrsrConfig(history_missing=0.5, history_noise=0.25)
    assert asked_anew("trsr", given, stored) == {**stored, "history_missing": 0.5, "history_noise": 0.25}
