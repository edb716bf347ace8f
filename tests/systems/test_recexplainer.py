"""What RecExplainer's figures say of a real language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from raypipe.engines.engine import Choices, Decoding, EngineConfig, Outcome, OutcomeError, Scores
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prompt import Prompt
from raypipe.metrics.alignment import order_ndcg
from raypipe.systems.recexplainer import CONTROL, ExplainerConfig
from raypipe.systems.source import Source
from raypipe.systems.teacher import teach
from tests.systems.sources import HELD_OUT, LENGTHS, source_of

TITLES = 3


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    source = source_of()
    save_untrained(
        folder, BuiltinLmConfig(size="tiny", context=512), train_tokenizer([*source.titles, "Yes No"] * 5, [], [], 400)
    )
    return folder


def test_questions_that_cannot_be_asked_are_counted_by_task(lm: Path) -> None:
    source = source_of()
    config = ExplainerConfig(variant="B", titles=TITLES)
    engine = EngineConfig(lm=str(lm), device="cpu").build()
    plain = config.build().measured(source, engine, 100, 8)
    assert {plain[f"refused {task}"] for task in ("T1", "T2", "T3")} == {0}

    (held, *_) = HELD_OUT.nonzero()[0].tolist()
    last = source.items(held, int(LENGTHS[held]))[-1]
    long = [title if item != last else "endless " * 600 for item, title in enumerate(source.titles, 1)]
    shown = sum(last in source.items(row, int(LENGTHS[row]))[-TITLES:] for row in HELD_OUT.nonzero()[0].tolist())
    told = config.build().measured(replace(source, catalogue=replace(source.catalogue, titles=long)), engine, 100, 8)
    assert told["refused T1"] == shown > 0
    assert told["refused T2"] >= shown
    assert told["refused T3"] >= 2 * shown
    # Everybody is asked about once in the control too, as somebody else.
    assert told[f"{CONTROL}: refused T1"] == shown


def scored(source: Source, opinion: float) -> Callable[..., list[Scores]]:
    """As `Engine.score`: yes about an item is as likely as the recommender scores it for that history, times `opinion`."""
    rows = np.arange(len(LENGTHS))
    scores = opinion * source.recommender.score(torch.from_numpy(source.states(rows, LENGTHS))).detach().numpy()
    histories = ["; ".join(source.titles_of(source.items(row, int(LENGTHS[row]))[-TITLES:])) for row in rows]

    def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        found = []
        for index, prompt in enumerate(prompts):
            (user,) = (row for row, history in enumerate(histories) if prompt.text.endswith(history))
            asked = re.search(r"Film (\d+)", prompt.text.removesuffix(histories[user]))
            assert asked
            found.append(Scores(index, (float(scores[user, int(asked[1])]), 0.0), 5))
        return found

    return score


@pytest.mark.parametrize(
    ("opinion", "ndcg"),
    [(1, 1), (0, 0.6131), (-1, order_ndcg(np.arange(5.0)[None])[0])],
    ids=["the recommender's", "none", "the opposite"],
)
def test_candidates_are_ordered_by_how_likely_yes_is_about_each(
    lm: Path, monkeypatch: pytest.MonkeyPatch, opinion: float, ndcg: float
) -> None:
    source, engine = source_of(), EngineConfig(lm=str(lm), device="cpu").build()
    monkeypatch.setattr(engine, "score", scored(source, opinion))
    figures = ExplainerConfig(variant="B", titles=TITLES).build().measured(source, engine, 100, 8)
    assert figures["T2 NDCG@5 by interest"] == pytest.approx(ndcg, abs=1e-4)
    if opinion == 1:
        assert figures[f"{CONTROL}: T2 NDCG@5 by interest"] < 1


@pytest.mark.parametrize("lost", range(5))
def test_who_cannot_be_asked_about_one_candidate_is_at_chance(
    lm: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    source, engine = source_of(), EngineConfig(lm=str(lm), device="cpu").build()
    score = scored(source, 1)

    def refusing(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        error = OutcomeError("prompt_too_long", "It is too long.")
        found = score(prompts, answers)
        return [Scores(one.index, error=error) if one.index % 5 == lost else one for one in found]

    monkeypatch.setattr(engine, "score", refusing)
    figures = ExplainerConfig(variant="B", titles=TITLES).build().measured(source, engine, 100, 8)
    assert figures["T2 NDCG@5 by interest"] == pytest.approx(0.6131, abs=1e-4)
    assert figures["refused T2 by interest"] == HELD_OUT.sum()


class Holding:
    """An engine that knows nothing and remembers to what it was held, by question."""

    def __init__(self) -> None:
        self.held: list[tuple[str, Choices | None]] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None) -> list[Outcome]:
        self.held += [(prompt.words, choices) for prompt in prompts]
        return []

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        return []


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(("variant", "listed"), [("H", True), ("H", False), ("I", True), ("B", True)])
def test_every_task_that_names_titles_is_held_to_the_catalogue_by_one_switch(
    variant: Literal["B", "I", "H"], listed: bool, constrained: bool
) -> None:
    source, engine = source_of(), Holding()
    config = ExplainerConfig(variant=variant, titles=TITLES, listed=listed, constrained=constrained)
    config.build().measured(source, engine, 100, 8)  # type: ignore[arg-type]
    marks = {
        "T1": ("Recommend the next", "The item that fits best", "What should be chosen next"),
        "T2": ("Order", "Sort", "Rank"),
        "T6": ("The titles of this history", "Name what was chosen", "What was chosen, oldest")
        if listed
        else ("A title of this history", "Name one thing", "What was one of the choices"),
    }
    tasks = {words: task for words, _ in engine.held for task, begins in marks.items() if words.startswith(begins)}
    assert set(tasks) == {words for words, _ in engine.held}
    assert set(tasks.values()) == ({"T1", "T2"} if variant == "B" else set(marks))
    expected = {"T1": 1, "T2": 5, "T6": TITLES if listed else 1}
    for words, choices in engine.held:
        if constrained:
            assert choices is not None
            assert (choices.texts, choices.most) == (tuple(source.titles), expected[tasks[words]])
        else:
            assert choices is None


class Knowing:
    """An engine that says of everybody, in the order of the questions, what the recommender does, or the opposite."""

    def __init__(self, source: Source, *, right: bool) -> None:
        rows = source.rows(held_out=True, least=1, most=100, rng=np.random.default_rng(0))
        self.source, self.right, self.lengths = source, right, LENGTHS[rows]
        self.histories = [source.items(row, int(LENGTHS[row]))[-TITLES:] for row in rows.tolist()]
        self.taught = teach(source, rows, LENGTHS[rows], np.random.default_rng(0))
        self.asked: list[int] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None) -> list[Outcome]:
        titles, taught = self.source.titles_of, self.taught
        step = 1 if self.right else -1
        if prompts[0].words.startswith(("Recommend the next", "The item that fits best", "What should be chosen")):
            answers = [titles([item])[0] for item in taught.favourites.tolist()]
            answers = answers if self.right else ["Film 0"] * len(answers)
        elif prompts[0].words.startswith(("Order", "Sort", "Rank")):
            ordered = np.take_along_axis(taught.candidates, taught.orders, 1)[:, ::step]
            answers = ["; ".join(titles(mine)) for mine in ordered.tolist()]
        else:
            answers = ["; ".join(titles(mine)) if self.right else "Film 0" for mine in self.histories]
        return [Outcome(index, answer) for index, answer in enumerate(answers)]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Scores]:
        count = len(self.taught.liked)
        yes = self.taught.scores.ravel() if len(prompts) > 2 * count else np.repeat([1.0, -1.0], count)
        return [Scores(at, (float(yes[at]) * (1 if self.right else -1), 0.0), 5) for at in range(len(prompts))]


def test_an_engine_that_says_what_the_recommender_does_is_right_everywhere_and_its_opposite_nowhere() -> None:
    source = source_of()
    system = ExplainerConfig(variant="I", titles=TITLES).build()
    figures = system.measured(source, Knowing(source, right=True), 100, 8)  # type: ignore[arg-type]
    ones = ("T1 HR@5", "T1 NDCG@5", "T1 HR@5 unseen", "T1 valid", "T2 NDCG@5", "T3 accuracy", "T6 HCR", "T6 valid")
    assert {name: figures[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert figures["T2 NDCG@5 by interest"] == 1
    assert figures["asked"] == HELD_OUT.sum()
    worst = order_ndcg(np.arange(5.0)[None])[0]
    figures = system.measured(source, Knowing(source, right=False), 100, 8)  # type: ignore[arg-type]
    wrong = dict.fromkeys(ones, 0.0) | {"T2 NDCG@5": pytest.approx(worst, abs=1e-4)}
    assert {name: figures[name] for name in ones} == wrong
