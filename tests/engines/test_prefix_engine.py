"""An engine whose model reads behind a prefix: greedy answers, beams and scores, alone and in any company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.engines.engine import Choices, Decoding, Engine, EngineConfig
from raypipe.language.adapters import AdapterCard, AdapterConfig, build_adapter, load_adapter, save_adapter
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.language.prefixes import PREFIX, PrefixConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import Encoded, SoftPromptLm, collate
from raypipe.language.trie import answer_tokens

WIDTH = 64
WORDS = [
    "the",
    "user",
    "chose",
    "Alien",
    "and",
    "Brazil",
    "and",
    "Casablanca",
    "but",
    "neither",
    "Dune",
    "nor",
    "Evita",
]
ANSWERS = ["Alien", "Brazil and Dune", "Casablanca but Evita"]
KINDS = {"vectors": PrefixConfig(knowledge=4, vectors=3), "knowledge": PrefixConfig(knowledge=4, vectors=0)}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    save_untrained(
        folder, BuiltinLmConfig(size="tiny", context=96), train_tokenizer([" ".join(WORDS)] * 9, [], [], 400)
    )
    return str(folder)


@pytest.fixture(scope="module", params=KINDS)
def adapter(request: pytest.FixtureRequest, lm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("adapter")
    config = AdapterConfig(prefix=KINDS[request.param], full=True)
    card = AdapterCard(config, {PREFIX: WIDTH} if config.prefix.vectors else {}, checkpoint_hash(Path(lm)), "")
    model = build_adapter(load_backbone(lm, device="cpu"), card, seed=3)
    torch.manual_seed(0)
    weights = {
        name: w.detach() + (0.1 if name.startswith("lm.") else 0.5) * torch.randn_like(w)
        for name, w in model.named_parameters()
    }
    save_adapter(folder, card, weights)
    return str(folder)


@pytest.fixture
def plain(lm: str, adapter: str) -> SoftPromptLm:
    """The same model in float64, which reads every prompt by itself and without a cache of what it read."""
    return load_adapter(Path(adapter), load_backbone(lm, device="cpu"), checkpoint_hash(Path(lm))).double()


def engine(lm: str, adapter: str, **settings: object) -> Engine:
    return EngineConfig.model_validate({"lm": lm, "adapter": adapter, "device": "cpu", **settings}).build()


def prompts(plain: SoftPromptLm, count: int = 14) -> list[Prompt]:
    """Behind one, two or three vectors, in families that begin alike."""
    assert plain.prefix is not None
    rng = np.random.default_rng(0)
    found = []
    for place in range(count):
        if place % 3 == 0:
            vectors = Vectors(rng.normal(size=(1 + place % 4 % 3, WIDTH)).astype(np.float32), PREFIX)
            start = " ".join(rng.choice(WORDS, 10))
        words = [start, *(f" {word}" for word in rng.choice(WORDS, rng.integers(1, 5)))]
        found.append(Prompt.of(*([vectors] if plain.prefix.config.vectors else []), *words))
    return found


@pytest.fixture(scope="module")
def tokenizer(lm: str) -> Backbone:
    return load_backbone(lm, device="cpu")


def encoded(tokenizer: Backbone, prompt: Prompt) -> Encoded:
    first, *rest = prompt.segments
    prefix = first if isinstance(first, Vectors) else None
    pieces = [segment.text for segment in (rest if prefix else prompt.segments)]  # type: ignore[union-attr]
    ((ids, _),) = tokenizer.encode_pieces([pieces])
    return Encoded(ids, [], prefix)


@torch.inference_mode()
def logprobs(plain: SoftPromptLm, prompt: Encoded, answer: list[int]) -> torch.Tensor:
    """[answer + 1, vocabulary], after the prompt and after each token of the answer."""
    batch = collate([Encoded([*prompt.ids, *answer], [], prompt.prefix)])
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    states = plain.states(batch)[0, len(prompt.ids) - 1 :]
    return torch.log_softmax(plain.lm.get_output_embeddings()(states), -1)


def test_greedy_answers_are_those_of_a_plain_loop_whatever_is_in_the_batch(
    lm: str, adapter: str, plain: SoftPromptLm, tokenizer: Backbone
) -> None:
    asked = prompts(plain)
    wanted = []
    for prompt in asked:
        row, answer = encoded(tokenizer, prompt), []
        while len(answer) < 6 and (token := int(logprobs(plain, row, answer)[-1].argmax())) != 0:
            answer.append(token)
        wanted.append(tokenizer.decode([answer])[0])
    for batch_tokens in (32_768, 120):
        found = {
            outcome.index: outcome
            for outcome in engine(lm, adapter, batch_tokens=batch_tokens).generate(asked, Decoding(max_new_tokens=6))
        }
        assert [found[number].text for number in range(len(asked))] == wanted


def test_scores_and_beams_are_those_of_a_plain_loop(
    lm: str, adapter: str, plain: SoftPromptLm, tokenizer: Backbone
) -> None:
    asked, built = prompts(plain), engine(lm, adapter)
    tokens = answer_tokens(tokenizer, ANSWERS)
    scored = {scores.index: scores.logprobs for scores in built.score(asked, [ANSWERS] * len(asked))}
    held = {
        outcome.index: {beam.text: beam.logprob for beam in outcome.beams}
        for outcome in built.generate(asked, Decoding(max_new_tokens=12, beams=3), Choices(tuple(ANSWERS)))
    }
    for number, prompt in enumerate(asked):
        row = encoded(tokenizer, prompt)
        for answer, ids, told in zip(ANSWERS, tokens, scored[number], strict=True):
            wanted = logprobs(plain, row, ids)
            whole = sum(float(wanted[place, token]) for place, token in enumerate(ids))
            assert told == pytest.approx(whole, abs=2e-3)
            assert held[number][answer] == pytest.approx(whole + float(wanted[-1, 0]), abs=2e-3)


def test_a_prefix_takes_room_and_one_that_nobody_reads_is_an_outcome(
    lm: str, adapter: str, plain: SoftPromptLm, tokenizer: Backbone
) -> None:
    assert plain.prefix is not None
    config = plain.prefix.config
    vectors = Vectors(np.zeros((5, WIDTH), np.float32), PREFIX)
    words = " chose Alien" * 84
    long = Prompt.of(*([vectors] if config.vectors else []), words)
    (outcome,) = engine(lm, adapter).generate([long], Decoding(max_new_tokens=10))
    # The last three of the vectors, or all four tokens of the knowledge prompt.
    standing = 3 if config.vectors else 4
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.tokens_in) == ("prompt_too_long", len(encoded(tokenizer, long).ids) + standing)
    wrong = Prompt.of(Vectors(np.zeros((1, 3), np.float32), PREFIX), "the")
    (refused,) = engine(lm, adapter).generate([wrong], Decoding(max_new_tokens=2))
    assert refused.error is not None
    told = f"A prefix's vectors are {WIDTH} wide" if config.vectors else "There is no prefix of vectors"
    assert told in refused.error.message
    # Among others too, whether it is in one piece or in more.
    company = [prompts(plain)[0], Prompt.of("the Alien"), Prompt.of("the", " Alien")]
    outcomes = {outcome.index: outcome for outcome in engine(lm, adapter).generate(company, Decoding(max_new_tokens=2))}
    kinds = [None if outcomes[index].error is None else outcomes[index].error.kind for index in range(3)]
    assert kinds == [None, *["unsupported_prompt" if config.vectors else None] * 2]


def test_a_model_in_bfloat16_reads_the_same_prefix_less_exactly(lm: str, adapter: str, plain: SoftPromptLm) -> None:
    asked = prompts(plain)
    told = []
    for dtype in ("float32", "bfloat16"):
        scores = engine(lm, adapter, dtype=dtype).score(asked, [ANSWERS] * len(asked))
        told.append(np.array([mine.logprobs for mine in sorted(scores, key=lambda one: one.index)]))
    np.testing.assert_allclose(told[1], told[0], rtol=0.05)
    assert not np.array_equal(told[1], told[0])
