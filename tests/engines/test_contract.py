"""What every engine promises, each on a real thing: the echo, a model of transformers, vLLM where it is, an HTTP server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from raypipe.engines.engine import Capabilities, Choices, Decoding, Engine, EngineConfig, Outcome
from raypipe.errors import UsageError
from raypipe.language.prompt import Prompt, Vectors
from tests.engines.chat_server import ChatServer

SHORT = Decoding(max_new_tokens=5)


@pytest.fixture(params=["echo", "transformers", "vllm", "openai"], scope="module")
def engine(
    request: pytest.FixtureRequest, random_checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    if request.param == "openai":
        with ChatServer() as server:
            http = {"url": server.url, "model": "echo"}
            yield EngineConfig.model_validate({"engine": "openai", "context": 200, "http": http}).build()
    elif request.param == "vllm":
        pytest.importorskip("vllm", reason="raypipe[gpu] is not installed")
        if not torch.cuda.is_available():
            pytest.skip("vLLM needs a GPU")
        checkpoint = random_checkpoint(tmp_path_factory.mktemp("lm"))
        config = {"engine": "vllm", "lm": checkpoint, "context": 200, "vllm": {"memory_share": 0.2}}
        yield EngineConfig.model_validate(config).build()
    elif request.param == "transformers":
        checkpoint = random_checkpoint(tmp_path_factory.mktemp("lm"))
        yield EngineConfig(lm=checkpoint, context=200, device="cpu").build()
    else:
        yield EngineConfig(engine="echo", context=200).build()


def answers(engine: Engine, *prompts: Prompt, decoding: Decoding = SHORT) -> list[Outcome]:
    found = list(engine.generate(prompts, decoding))
    assert sorted(outcome.index for outcome in found) == list(range(len(prompts))), "one outcome a prompt"
    return sorted(found, key=lambda outcome: outcome.index)


def test_no_prompts_no_outcomes(engine: Engine) -> None:
    assert answers(engine) == []


def test_the_same_prompt_gets_the_same_answer_in_any_company(engine: Engine) -> None:
    prompt = Prompt.of("Once upon a time there was a little girl")
    others = [Prompt.of("a b " * n) for n in range(1, 9)]
    (alone,) = answers(engine, prompt)
    assert alone.text
    assert alone.error is None
    assert answers(engine, *others, prompt, *others)[8].text == alone.text


def test_an_answer_ends_by_itself_or_at_the_limit_and_says_which(engine: Engine) -> None:
    prompt = Prompt.of("one two three four five six seven eight nine ten")
    (cut,) = answers(engine, prompt)
    assert (cut.tokens_out, cut.finish_reason) == (5, "length")
    assert cut.tokens_in >= 10
    (longer,) = answers(engine, prompt, decoding=Decoding(max_new_tokens=60))
    assert longer.tokens_out > 5


def test_a_prompt_that_does_not_fit_or_holds_vectors_is_an_error_in_its_row_only(engine: Engine) -> None:
    vectors = Prompt.of("state: ", Vectors(np.zeros((1, 4), np.float32), "sasrec"))
    first, long, refused, last = answers(
        engine, Prompt.of("fits"), Prompt.of("word " * 300), vectors, Prompt.of("fits")
    )
    assert (first.error, last.error) == (None, None)
    assert first.text == last.text
    assert long.error is not None
    assert (long.error.kind, long.text) == ("prompt_too_long", "")
    assert refused.error is not None
    assert (refused.error.kind, refused.text) == ("unsupported_prompt", "")


def test_tokens_are_counted_text_by_text(engine: Engine) -> None:
    counts = engine.count_tokens(["", "one two three", "one two three four five six"])
    assert counts[0] == 0
    assert 3 <= counts[1] < counts[2]


def test_an_engine_does_what_it_says_it_can_and_refuses_the_rest(engine: Engine) -> None:
    can, prompts = engine.capabilities, [Prompt.of("one two three")]

    def searched() -> None:
        (outcome,) = engine.generate(prompts, Decoding(max_new_tokens=5, beams=2))
        assert outcome.text == outcome.beams[0].text
        assert outcome.beams[0].logprob >= outcome.beams[1].logprob

    def held() -> None:
        (outcome,) = engine.generate(prompts, Decoding(), Choices(("yes", "no")))
        assert (outcome.text, outcome.finish_reason) in {("yes", "stop"), ("no", "stop")}

    def scored() -> None:
        (scores,) = engine.score(prompts, [("yes", "no")])
        assert len(scores.logprobs) == 2
        assert max(scores.logprobs) < 0

    for there, ask in ((can.beams, searched), (can.trie, held), (can.logprobs, scored)):
        if there:
            ask()
        else:
            with pytest.raises(UsageError, match="This engine has no") as told:
                ask()
            assert "transformers" in told.value.remedy


@pytest.mark.parametrize("name", ["echo", "transformers", "openai"])
def test_a_plan_knows_an_engines_capabilities_before_it_is_built(
    name: str, random_checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lm = random_checkpoint(tmp_path_factory.mktemp("lm")) if name == "transformers" else ""
    http = {"url": "http://localhost:1/v1", "model": "m"}
    config = EngineConfig.model_validate({"engine": name, "lm": lm, "http": http})
    assert config.capabilities == config.build().capabilities
    all_but_vectors = Capabilities(beams=True, trie=True, logprobs=True)
    assert config.capabilities == (all_but_vectors if name == "transformers" else Capabilities())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_says_what_to_install(
    random_checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = EngineConfig(engine="vllm", lm=random_checkpoint(tmp_path_factory.mktemp("lm")))
    assert config.identity()["model"]  # a plan needs no vLLM
    with pytest.raises(UsageError, match="vllm cannot be imported") as told:
        config.build()
    assert "raypipe[gpu]" in told.value.remedy
