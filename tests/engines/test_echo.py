"""The echo engine: answers are a function of the prompt alone, and importing the seam costs no torch."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from raypipe.config import is_shaping
from raypipe.engines.engine import Capabilities, Decoding, EngineConfig, Outcome
from raypipe.language.prompt import Prompt, Text, Vectors

ECHO = EngineConfig(engine="echo")


def answers(prompts: list[Prompt], decoding: Decoding | None = None) -> list[Outcome]:
    return list(ECHO.build().generate(prompts, decoding or Decoding()))


def test_an_answer_holds_the_last_words_and_a_hash_of_the_whole_prompt():
    first, second = answers([Prompt.of("x a b c d e f g h"), Prompt.of("y a b c d e f g h")])
    assert first == Outcome(0, "a b c d e f g h #91ce43ce", 9, 9, "stop")
    assert second.text.startswith("a b c d e f g h #")
    assert second.text != first.text


def test_the_same_prompt_gets_the_same_answer_in_any_company():
    prompt = Prompt.of("What does she like?")
    (alone,) = answers([prompt])
    assert answers([Prompt.of("noise"), prompt])[1].text == alone.text


def test_segments_of_text_read_as_one_text():
    assert Prompt.of("a ", "b").text == Prompt((Text("a b"),)).text
    assert answers([Prompt.of("a ", "b")]) == answers([Prompt.of("a b")])


def test_an_answer_beyond_the_limit_is_cut_and_says_so():
    (outcome,) = answers([Prompt.of("a b c d e f g h i")], Decoding(max_new_tokens=3))
    assert (outcome.text, outcome.tokens_out, outcome.finish_reason) == ("b c d", 3, "length")


def test_a_prompt_that_does_not_fit_is_an_error_in_its_row_only():
    engine = EngineConfig(engine="echo", context=10).build()
    long, short = engine.generate([Prompt.of("w " * 9), Prompt.of("fits")], Decoding(max_new_tokens=5))
    assert long.error is not None
    assert (long.error.kind, long.text, long.tokens_in) == ("prompt_too_long", "", 9)
    assert short.error is None


def test_vectors_are_refused_in_their_row_only():
    vectors = Prompt.of("state: ", Vectors(np.zeros((1, 4), np.float32), "sasrec"))
    refused, answered = answers([vectors, Prompt.of("plain")])
    assert refused.error is not None
    assert refused.error.kind == "unsupported_prompt"
    assert answered.error is None
    with pytest.raises(ValueError, match="holds vectors"):
        _ = vectors.text


def test_prompts_are_values_vectors_included():
    def prompt(value: float) -> Prompt:
        return Prompt.of("state: ", Vectors(np.full((1, 4), value, np.float32), "sasrec"))

    assert prompt(1.0) == prompt(1.0)
    assert hash(prompt(1.0)) == hash(prompt(1.0))
    assert prompt(1.0) != prompt(2.0)


def test_importing_and_running_echo_loads_neither_torch_nor_transformers():
    script = (
        "import sys; from raypipe.engines.engine import EngineConfig; EngineConfig(engine='echo').build();"
        "EngineConfig(engine='echo').identity(); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_identity_names_the_engine_and_ignores_speed_and_place():
    assert ECHO.identity() == {"engine": "echo", "context": None, "version": 1}
    assert EngineConfig(engine="echo", threads=4, batch_tokens=7, device="cpu").identity() == ECHO.identity()


def test_every_field_is_marked_as_shaping_or_free():
    for config in (Decoding, EngineConfig):
        for field in config.model_fields.values():
            assert is_shaping(field) in (True, False)


def test_an_engine_that_needs_a_model_refuses_to_be_without():
    with pytest.raises(ValidationError, match="needs `lm`"):
        EngineConfig(engine="transformers")


def test_echo_counts_words_and_has_no_special_capability():
    engine = ECHO.build()
    assert engine.count_tokens(["a b", "", "c"]) == [2, 0, 1]
    assert engine.capabilities == Capabilities()
