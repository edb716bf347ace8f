"""RecInterpreter's tasks: which states, which titles, and templates that tests never share with training."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from raypipe.engines.engine import Beam, Outcome, OutcomeError
from raypipe.language.adapters import LoraOptions
from raypipe.language.prompt import Vectors
from raypipe.recommenders.sequences import Sequences
from raypipe.systems.interpreter_figures import recovery_figures, residual_figures
from raypipe.systems.interpreter_prompts import InterpreterPrompts
from raypipe.systems.oracles import oracles_of
from raypipe.systems.recexplainer import ExplainerConfig
from raypipe.systems.recinterpreter import InterpreterConfig, RecInterpreter
from raypipe.systems.source import Source
from tests.systems.sources import ITEMS, LENGTHS, source_of


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of("sasrec")


def made(source: Source, config: InterpreterConfig, seed: int = 0) -> list:
    return list(RecInterpreter(config).examples(source, 100, 100, np.random.default_rng(seed)))


def vectors_of(example) -> list[np.ndarray]:
    return [segment.values for segment in example.prompt.segments if isinstance(segment, Vectors)]


def state_after(source: Source, row: int, events: int) -> np.ndarray:
    return source.states(np.array([row]), np.array([events]))[0]


def test_every_place_of_users_who_are_not_held_out_has_a_recovery_and_from_the_second_event_on_a_residual(
    source: Source,
) -> None:
    trained = LENGTHS[~source.held_out]
    assert len(made(source, InterpreterConfig())) == (2 * trained - 1).sum()


def test_recovery_names_the_last_titles_and_residual_the_one_between_two_states(source: Source) -> None:
    (reading,) = RecInterpreter(InterpreterConfig(titles=3)).readings(source, np.array([2]), np.array([5]))
    titles = source.titles_of(source.items(2, 5))
    assert reading.history == titles[-3:]
    assert reading.title == titles[-1]
    np.testing.assert_allclose(reading.before.values, state_after(source, 2, 4)[None], atol=1e-6)
    np.testing.assert_allclose(reading.after.values, state_after(source, 2, 5)[None], atol=1e-6)
    assert reading.other_side == reading.after


def test_learned_positions_see_the_states_of_the_titles_and_never_a_later_one(source: Source) -> None:
    system = RecInterpreter(InterpreterConfig(titles=3, pool="learned_positions"))
    one, short, first = system.readings(source, np.array([2, 2, 2]), np.array([5, 2, 1]))
    states = np.stack([state_after(source, 2, events) for events in range(1, 6)])
    np.testing.assert_allclose(one.before.values, states[1:4], atol=1e-6)
    np.testing.assert_allclose(one.after.values, states[2:5], atol=1e-6)
    np.testing.assert_allclose(short.after.values, states[:2], atol=1e-6)
    np.testing.assert_allclose(short.before.values, states[:1], atol=1e-6)
    assert len(first.before.values) == 0
    assert system.adapter.projectors["state"].tokens_of(3) == 1


def test_a_qformer_reads_each_of_the_last_states_and_is_refused_one_sum_of_them(source: Source) -> None:
    config = InterpreterConfig(titles=3, pool="each", projector="qformer", tokens=2)
    system = RecInterpreter(config)
    one, short = system.readings(source, np.array([2, 2]), np.array([5, 2]))
    assert [len(mine.after.values) for mine in (one, short)] == [3, 2]
    projector = system.adapter.projectors["state"]
    assert (projector.pool, projector.positions, projector.tokens_of(3)) == ("each", 3, 2)
    assert RecInterpreter(InterpreterConfig(titles=3, pool="each")).adapter.projectors["state"].tokens_of(3) == 3
    with pytest.raises(ValidationError, match="set pool to each"):
        InterpreterConfig(pool="learned_positions", projector="qformer")


@pytest.mark.parametrize("listed", [True, False])
def test_training_uses_every_template_of_its_own_and_none_of_the_tests(source: Source, listed: bool) -> None:
    prompts = InterpreterPrompts()
    recovery = prompts.recovery if listed else prompts.recovery_of_one
    training = {words(template) for template in (*recovery.training, *prompts.residual.training)}
    test = {words(template) for template in (*recovery.test, *prompts.residual.test)}
    config = InterpreterConfig(listed=listed)
    found = {mine.prompt.words for seed in range(5) for mine in made(source, config, seed)}
    assert found == training
    assert not found & test
    asked = Silent()
    RecInterpreter(config).measured(source, asked, 100, 8)
    assert {prompt.words for prompt in asked.prompts} <= test


def test_titles_that_are_answers_of_their_own_are_four_of_each_history_all_alike_likely(source: Source) -> None:
    templates = InterpreterPrompts()
    drawn = np.zeros(6)
    for seed in range(30):
        listed, alone = (
            [
                example.answer
                for example in made(source, InterpreterConfig(titles=6, listed=together), seed)
                if example.prompt.words in {words(template) for template in asked.training}
            ]
            for together, asked in ((True, templates.recovery), (False, templates.recovery_of_one))
        )
        answers = iter(alone)
        for history in (answer.split("; ") for answer in listed):
            mine = [next(answers) for _ in history[:4]]
            assert not Counter(mine) - Counter(history)
            for title in mine if len(set(history)) == 6 else ():
                drawn[history.index(title)] += 1
        assert next(answers, None) is None
    np.testing.assert_allclose(drawn / drawn.sum(), 1 / 6, atol=0.02)
    assert drawn.sum() > 600


def test_the_likeliest_answers_of_a_search_are_the_titles_that_are_named(source: Source) -> None:
    """As many as histories show, none twice; residual is asked greedily as ever."""
    asked: list[tuple[int, int]] = []
    rows = source.rows(held_out=True, least=2, most=100, rng=np.random.default_rng(0))
    histories = [source.titles_of(source.before_cut(row)[-3:]) for row in rows.tolist()]

    class Searching:
        def generate(self, prompts, decoding, choices=None):
            asked.append((decoding.beams, len(prompts)))
            for index, history in zip(range(len(prompts)), histories, strict=False):
                # Three different ones stand before the oldest.
                texts = [history[2], f" {history[2]}", "", "Nothing of this name", history[1], history[0]]
                yield Outcome(index, texts[0], beams=tuple(Beam(text, -1.0) for text in texts))

    figures = RecInterpreter(InterpreterConfig(titles=3, listed=False)).measured(source, Searching(), 100, 8)
    assert asked == [(6, len(rows)), (1, len(rows))] * 3
    assert figures["recovery by place 1"] == figures["recovery by place 2"] == 1.0
    assert figures["recovery by place 3"] == np.mean(
        [history[0] in history[1:] for history in histories if len(history) == 3]
    )
    assert figures["valid"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["no states: recovery"] == figures["recovery"] > 0.6


def words(template: str) -> str:
    """What is left of a template without its marks."""
    return re.sub(r"\{\w+\}", "", template)


@pytest.mark.parametrize("after", ["state", "item"])
def test_each_item_s_title_is_learnt_as_often_as_is_said(source: Source, after: Literal["state", "item"]) -> None:
    """From what the other side of its own residual would be: the state after it alone, or its vector."""
    config = InterpreterConfig(catalogue_repeats=2, after=after)
    found = [
        mine for mine in made(source, config) if mine.prompt.words in {words(text) for text in config.prompts.item}
    ]
    assert [mine.answer for mine in found] == [*source.titles, *source.titles]
    vectors = np.concatenate([vectors_of(mine)[0] for mine in found])
    alone = Sequences.of([[item] for item in range(1, ITEMS + 1)])
    expected = source.item_states[1:] if after == "item" else source.recommender.encode(alone).detach().numpy()
    np.testing.assert_allclose(vectors, np.concatenate([expected, expected]), rtol=1e-5, atol=1e-5)
    assert len(made(source, config)) - len(found) == len(made(source, InterpreterConfig(after=after)))


def test_all_weights_and_updates_of_them_are_not_trained_at_once() -> None:
    assert RecInterpreter(InterpreterConfig(full=True)).adapter.full
    with pytest.raises(ValidationError, match="set lora to null"):
        InterpreterConfig(full=True, lora=LoraOptions())
    with pytest.raises(ValidationError, match="set lora to null"):
        ExplainerConfig(full=True)


def test_an_oracle_is_asked_for_after_learning_from_item_vectors(source: Source) -> None:
    system = RecInterpreter(InterpreterConfig(after="item"))
    (reading,) = system.readings(source, np.array([2]), np.array([5]))
    item = source.items(2, 5)[-1]
    np.testing.assert_array_equal(reading.other_side.values, source.item_states[item][None])
    found = Silent()
    figures = system.measured(source, found, 100, 8)
    count = int(figures["asked"])
    assert len(found.prompts) == 3 * (3 * count)  # three tasks, and two controls
    assert found.choices == {None}
    assert figures["oracle"] == 0.0


@pytest.mark.parametrize("listed", [True, False])
def test_decoding_among_titles_asks_for_one_or_for_as_many_as_a_history_shows(source: Source, listed: bool) -> None:
    found = Silent()
    RecInterpreter(InterpreterConfig(titles=3, constrained=True, listed=listed)).measured(source, found, 100, 8)
    assert {choices.texts for choices in found.choices} == {tuple(source.titles)}
    assert {choices.most for choices in found.choices} == ({3, 1} if listed else {1})


class Refusing:
    """An engine without an adapter."""

    def generate(self, prompts, decoding, choices=None):
        for index, prompt in enumerate(prompts):
            error = OutcomeError("unsupported_prompt", "It reads text only.") if prompt.has_vectors else None
            yield Outcome(index, error=error)


def test_questions_that_cannot_be_asked_are_counted_by_task(source: Source) -> None:
    figures = RecInterpreter(InterpreterConfig(after="item")).measured(source, Refusing(), 100, 8)
    for task in ("recovery", "residual", "oracle"):
        assert figures[f"refused {task}"] == figures[f"shuffled states: refused {task}"] == figures["asked"]
        assert figures[f"no states: refused {task}"] == 0


class Silent:
    """An engine that answers nothing and remembers what it was asked."""

    def __init__(self) -> None:
        self.prompts: list = []
        self.choices: set = set()

    def generate(self, prompts, decoding, choices=None):
        self.prompts += prompts
        self.choices.add(choices)
        return iter(())


@pytest.mark.parametrize("model", ["sasrec", "dreamrec"])
def test_the_oracle_is_what_the_recommender_would_have_next_and_its_title_the_nearest_item(model: str) -> None:
    source = source_of(model)
    # Vectors of one length, as an untrained recommender has them, would be nearest by any measure.
    with torch.no_grad():
        source.recommender.table *= torch.linspace(0.2, 3, len(source.recommender.table))[:, None]
    system = RecInterpreter(InterpreterConfig(after="item"))
    told: list[list[str]] = []

    class Naming:
        """Answers the oracle's questions with the title of the item nearest to the vector it is shown last."""

        def generate(self, prompts, decoding, choices=None):
            told.append([])
            for index, prompt in enumerate(prompts):
                vectors = [segment for segment in prompt.segments if isinstance(segment, Vectors)]
                if vectors:
                    lengths = np.linalg.norm(source.item_states[1:], axis=1)
                    nearest = (source.item_states[1:] @ vectors[-1].values[-1] / lengths).argmax()
                    yield Outcome(index, f" {source.titles[nearest]}")

    figures = system.measured(source, Naming(), 100, 8)
    assert figures["oracle"] == 1.0
    assert figures["no states: oracle"] == 0.0
    if model == "sasrec":  # which has no oracles of its own: what stands for one lies where training's item vectors do
        rows = np.arange(3)
        events = source.histories.lengths[rows]
        oracles = oracles_of(source, source.queries(source.states(rows, events), rows, events))
        lengths = [float(np.linalg.norm(oracle.vector.values)) for oracle in oracles]
        assert lengths == pytest.approx([np.linalg.norm(source.item_states[1:], axis=1).mean()] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("field", "templates", "problem"),
    [
        ("recovery", {"training": ["no mark"], "test": ["{state}"]}, "needs the marks {state}"),
        (
            "residual",
            {"training": ["{before} {after}"], "test": ["{before} alone"]},
            "needs the marks {after}, {before}",
        ),
        ("recovery", {"training": ["Say {state}"], "test": ["Say {state}"]}, "one of the training's"),
    ],
)
def test_templates_that_cannot_be_filled_or_leak_are_refused(field: str, templates: dict, problem: str) -> None:
    with pytest.raises(ValidationError) as told:
        InterpreterPrompts.model_validate({field: templates})
    assert problem in str(told.value)


def test_figures_of_answers_are_means_of_exact_titles() -> None:
    known = {f"Film {n}" for n in range(1, 31)}
    histories = [["Film 1", "Film 2"], ["Film 10"]]
    figures = recovery_figures(["Film 1; Film 2", "Film 1; Filmchen"], histories, known, searched=False)
    assert "order" not in recovery_figures(["", ""], histories, known, searched=True)
    assert figures["recovery"] == 0.5
    assert figures["order"] == 0.5
    assert figures["valid"] == 0.75
    assert figures["recovery by place 1"] == 0.5
    assert figures["recovery by place 2"] == 1.0
    residual = residual_figures(["Film 2.", "Film 1", "Nothing"], ["Film 2", "Film 10", "Film 3"], known)
    assert residual == {"residual": pytest.approx(1 / 3), "residual valid": pytest.approx(2 / 3)}


def test_a_control_has_the_words_and_no_vector(source: Source) -> None:
    system = RecInterpreter(InterpreterConfig())
    readings = list(system.readings(source, np.array([2]), np.array([5])))
    asked, control = system.questions(readings, []), system.questions(readings, [], "no states")
    assert [prompt.text for prompt in control] == [prompt.words for prompt in asked]
    assert all(prompt.has_vectors for prompt in asked)
