"""RecInterpreter's exercises: which states, which titles, and templates that tests never share with training."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.language.prompt import Text, Vectors
from raypipe.systems.recinterpreter import (
    InterpreterConfig,
    InterpreterPrompts,
    examples,
    oracle_prompt,
    recovery_answer,
    recovery_figures,
    residual_figures,
    without_states,
)

TITLES = [f"Film {n}" for n in range(1, 31)]
ITEMS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
STATES = np.arange(12 * 4, dtype=np.float32).reshape(12, 4)


def made(config: InterpreterConfig, positions: list[int]) -> list:
    return list(examples(ITEMS, STATES, TITLES, config, positions, np.random.default_rng(0)))


def vectors_of(example) -> list[np.ndarray]:
    return [segment.values for segment in example.prompt.segments if isinstance(segment, Vectors)]


def test_recovery_names_the_last_titles_and_residual_the_one_between_two_states() -> None:
    recovery, residual = made(InterpreterConfig(titles=3), [12])
    assert recovery.answer == "Film 3; Film 5; Film 8"
    assert residual.answer == "Film 8"
    assert [v.tolist() for v in vectors_of(recovery)] == [STATES[11:12].tolist()]
    assert [v.tolist() for v in vectors_of(residual)] == [STATES[10:11].tolist(), STATES[11:12].tolist()]


def test_learned_positions_see_the_states_of_the_titles_and_never_a_later_one() -> None:
    config = InterpreterConfig(titles=3, pool="learned_positions")
    recovery, residual = made(config, [7])
    assert recovery.answer == "Film 5; Film 9; Film 2"
    assert vectors_of(recovery)[0].tolist() == STATES[4:7].tolist()
    before, after = vectors_of(residual)
    assert (before.tolist(), after.tolist()) == (STATES[3:6].tolist(), STATES[4:7].tolist())
    assert vectors_of(made(config, [2])[0])[0].tolist() == STATES[:2].tolist()
    assert config.projectors["state"].tokens_of(3) == 1


def test_the_first_event_has_a_recovery_and_no_residual() -> None:
    (only,) = made(InterpreterConfig(), [1])
    assert only.answer == "Film 3"


def test_training_uses_every_template_of_its_own_and_none_of_the_tests() -> None:
    prompts = InterpreterPrompts()
    texts = {
        "{state}".join(segment.text for segment in example.prompt.segments if isinstance(segment, Text))
        for example in made(InterpreterConfig(), list(range(2, 13)) * 5)
    }
    starts = {text.split("{state}")[0].strip() for text in texts}
    assert len(texts) == len(prompts.recovery) + len(prompts.residual)
    assert not starts & {
        template.split("{state}")[0].strip() for template in (*prompts.recovery_test, *prompts.residual_test)
    }


def test_an_oracle_stands_where_the_state_after_would() -> None:
    oracle = np.full(4, 7, np.float32)
    prompt = oracle_prompt("From {state} to {state}:", InterpreterConfig().vectors(STATES, 5), oracle)
    assert [type(segment).__name__ for segment in prompt.segments] == ["Text", "Vectors", "Text", "Vectors", "Text"]
    assert prompt.segments[3].values.tolist() == [[7, 7, 7, 7]]


def test_the_answer_of_a_short_history_is_all_of_it() -> None:
    assert recovery_answer([2, 2], TITLES, InterpreterConfig()) == "Film 2; Film 2"


@pytest.mark.parametrize(
    ("field", "templates", "problem"),
    [
        ("recovery", ("no mark",), "needs {state} 1 times"),
        ("residual_test", ("{state} alone",), "needs {state} 2 times"),
        ("recovery_test", (InterpreterPrompts().recovery[0],), "one of the training's"),
    ],
)
def test_templates_that_cannot_be_filled_or_leak_are_refused(
    field: str, templates: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ValidationError) as told:
        InterpreterPrompts.model_validate({field: templates})
    assert problem in str(told.value)


def test_the_states_an_exercise_needs_are_those_it_takes() -> None:
    assert list(InterpreterConfig().states_needed(7)) == [6, 7]
    assert list(InterpreterConfig().states_needed(1)) == [1]
    pooled = InterpreterConfig(titles=3, pool="learned_positions")
    assert list(pooled.states_needed(7)) == [4, 5, 6, 7]
    assert list(pooled.states_needed(2)) == [1, 2]


def test_figures_of_answers_are_means_of_exact_titles() -> None:
    known = set(TITLES)
    histories = [["Film 1", "Film 2"], ["Film 10"]]
    figures = recovery_figures(["Film 1; Film 2", "Film 1; Filmchen"], histories, known)
    assert figures["recovery"] == 0.5
    assert figures["order"] == 0.5
    assert figures["valid"] == 0.75
    assert figures["recovery by place 1"] == 0.5
    assert figures["recovery by place 2"] == 1.0
    residual = residual_figures(["Film 2.", "Film 1", "Nothing"], ["Film 2", "Film 10", "Film 3"], known)
    assert residual == {"residual": pytest.approx(1 / 3), "residual valid": pytest.approx(2 / 3)}


def test_a_control_has_the_words_and_no_vector() -> None:
    (recovery, _) = made(InterpreterConfig(), [5])
    control = without_states(recovery.prompt)
    assert not control.has_vectors
    assert control.text == "".join(s.text for s in recovery.prompt.segments if isinstance(s, Text))
