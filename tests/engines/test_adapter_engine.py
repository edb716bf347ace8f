"""An engine with an adapter: prompts that hold vectors, alone and in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.engines.engine import Choices, Decoding, Engine, EngineConfig, Outcome, Piece
from raypipe.engines.transformers import TransformersEngine
from raypipe.errors import UsageError
from raypipe.language.adapters import (
    AdapterCard,
    AdapterConfig,
    LoraOptions,
    build_adapter,
    load_adapter,
    read_card,
    save_adapter,
)
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import collate, encode
from raypipe.language.trie import answer_tokens

WIDTH = 5
CONFIG = AdapterConfig(
    projectors={"user": ProjectorConfig(), "item": ProjectorConfig(kind="mlp")}, lora=LoraOptions(rank=2)
)
GREEDY = Decoding(max_new_tokens=12)
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


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    save_untrained(
        folder, BuiltinLmConfig(size="tiny", context=128), train_tokenizer([" ".join(WORDS)] * 9, [], [], 400)
    )
    return str(folder)


@pytest.fixture(scope="module")
def adapter(lm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("adapter")
    card = AdapterCard(CONFIG, {"user": WIDTH, "item": WIDTH}, checkpoint_hash(Path(lm)), "sasrec/1")
    model = build_adapter(load_backbone(lm, device="cpu"), card, seed=3)
    torch.manual_seed(0)
    weights = {name: 0.5 * torch.randn_like(w) for name, w in model.named_parameters() if w.requires_grad}
    save_adapter(folder, card, weights)
    return str(folder)


def engine(lm: str, adapter: str = "", **settings: object) -> Engine:
    return EngineConfig.model_validate({"lm": lm, "adapter": adapter, "device": "cpu", **settings}).build()


def prompts(count: int) -> list[Prompt]:
    """Of one or two kinds of vectors, of several lengths; every fourth of words alone."""
    rng = np.random.default_rng(0)
    start = " ".join(WORDS[:10])
    found = []
    for place in range(count):
        words = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
        user = Vectors(rng.normal(size=(1 + place % 3, WIDTH)).astype(np.float32), "user")
        item = Vectors(rng.normal(size=(1, WIDTH)).astype(np.float32), "item")
        pieces = [start, user, words] if place % 2 else [start, words, user, "likes", item]
        found.append(Prompt.of(start, words) if place % 4 == 0 else Prompt.of(*pieces))
    return found


def answers(
    engine: Engine, asked: list[Prompt], decoding: Decoding = GREEDY, choices: Choices | None = None
) -> list[Outcome]:
    return sorted(engine.generate(asked, decoding, choices), key=lambda outcome: outcome.index)


def test_an_answer_is_that_of_the_adapted_model_alone_whatever_is_in_the_batch(lm: str, adapter: str) -> None:
    asked = prompts(24)
    together = answers(engine(lm, adapter), asked)
    backbone = load_backbone(lm, device="cpu")
    model, card = load_adapter(Path(adapter), backbone, checkpoint_hash(Path(lm))), read_card(Path(adapter))
    for prompt, outcome in zip(asked, together, strict=True):
        if not prompt.has_vectors:
            continue
        batch = collate([encode(backbone, prompt, card.config.projectors, card.widths)])
        with torch.inference_mode():
            ids = backbone.model.generate(
                inputs_embeds=model.embed(batch), attention_mask=batch["mask"], max_new_tokens=12, do_sample=False
            )
        assert outcome.text == backbone.decode(ids.tolist())[0]
        assert outcome.tokens_in == batch["tokens"].shape[1]
    small = answers(engine(lm, adapter, batch_tokens=120), asked)
    assert [outcome.text for outcome in small] == [outcome.text for outcome in together]
    assert len({outcome.text for outcome in together}) > 12


def exact_logprob(lm: str, adapter: str) -> Callable[[Prompt, Sequence[int]], float]:
    """Of an answer's tokens to a prompt, both read at once, in float64 and without a cache."""
    backbone = load_backbone(lm, device="cpu")
    model, card = load_adapter(Path(adapter), backbone, checkpoint_hash(Path(lm))).double(), read_card(Path(adapter))

    def logprob(prompt: Prompt, answer: Sequence[int]) -> float:
        batch = collate([encode(backbone, prompt, card.config.projectors, card.widths)], [answer])
        with torch.inference_mode():
            logits = backbone.model(inputs_embeds=model.embed(batch)).logits[0]
        told = torch.log_softmax(logits[-len(answer) - 1 : -1], -1)
        return float(sum(told[place, token] for place, token in enumerate(answer)))

    return logprob


@pytest.mark.parametrize("batch_tokens", [500, 20_000])
def test_choices_are_searched_and_scored_after_vectors_as_by_a_plain_forward(
    lm: str, adapter: str, batch_tokens: int
) -> None:
    titles = ("Alien", "Alien and Brazil", "Casablanca", "Dune; Evita")
    built, asked, exact = (
        engine(lm, adapter, batch_tokens=batch_tokens, threads=1),
        prompts(8),
        exact_logprob(lm, adapter),
    )
    tokens = answer_tokens(load_backbone(lm, device="cpu"), titles)
    found = sorted(built.generate(asked, Decoding(beams=4), Choices(titles)), key=lambda outcome: outcome.index)
    scores = sorted(built.score(asked, [titles] * len(asked)), key=lambda scores: scores.index)
    for prompt, outcome, scored in zip(asked, found, scores, strict=True):
        ended = [exact(prompt, [*answer, 0]) for answer in tokens]
        assert [beam.chosen[0] for beam in outcome.beams] == sorted(range(4), key=lambda number: -ended[number])
        assert [beam.logprob for beam in outcome.beams] == pytest.approx(sorted(ended, reverse=True), abs=1e-4)
        assert scored.logprobs == pytest.approx([exact(prompt, answer) for answer in tokens], abs=1e-4)
        assert scored.tokens_in == outcome.tokens_in
    assert len({outcome.text for outcome in found}) > 1
    greedy = answers(built, asked, Decoding(), Choices(titles))
    assert {outcome.text for outcome in greedy} <= set(titles)
    alone = [answers(built, [prompt], Decoding(), Choices(titles))[0].text for prompt in asked]
    assert [outcome.text for outcome in greedy] == alone


def test_questions_about_one_user_share_the_vectors_of_that_user_and_of_nobody_else(lm: str, adapter: str) -> None:
    rng = np.random.default_rng(0)
    history = " ".join(WORDS)
    users = [Vectors(rng.normal(size=(2, WIDTH)).astype(np.float32), "user") for _ in range(3)]
    items = [Vectors(rng.normal(size=(1, WIDTH)).astype(np.float32), "item") for _ in range(4)]
    asked = [
        Prompt.of("the user", user, history, item, "and" * place) for user in users for place, item in enumerate(items)
    ]
    exact = exact_logprob(lm, adapter)
    (answer,) = answer_tokens(load_backbone(lm, device="cpu"), ["Dune"])
    found = sorted(engine(lm, adapter).score(asked, [["Dune"]] * len(asked)), key=lambda scores: scores.index)
    for prompt, scored in zip(asked, found, strict=True):
        # These weights, drawn at random, make some prompts' rounding errors a hundred times as large as others'.
        assert scored.logprobs == pytest.approx([exact(prompt, answer)], abs=5e-3)


def test_other_vectors_give_another_answer_and_another_draw(lm: str, adapter: str) -> None:
    built = engine(lm, adapter)
    one, other = (Prompt.of("the user", Vectors(np.full((1, WIDTH), n, np.float32), "user")) for n in (1, -3))
    assert one.key != other.key
    sampled = Decoding(max_new_tokens=12, temperature=1.0)
    first, second, again = answers(built, [one, other, one], sampled)
    assert first.text == again.text != second.text


def test_vectors_the_adapter_does_not_read_are_an_error_in_their_row_only(lm: str, adapter: str) -> None:
    built = engine(lm, adapter)
    assert built.capabilities.vectors
    strange = Prompt.of("x", Vectors(np.zeros((1, WIDTH), np.float32), "image"))
    wide = Prompt.of("x", Vectors(np.zeros((1, 9), np.float32), "user"))
    first, second, last = answers(built, [strange, wide, Prompt.of("the user")])
    assert [outcome.error.kind for outcome in (first, second) if outcome.error] == ["unsupported_prompt"] * 2
    assert "'image'" in str(first.error)
    assert last.error is None
    assert not engine(lm).capabilities.vectors


def test_an_adapter_shapes_the_identity_and_belongs_to_its_model(lm: str, adapter: str, stories: str) -> None:
    plain, adapted = (EngineConfig(lm=lm, adapter=folder).identity() for folder in ("", adapter))
    assert plain != adapted
    assert "adapter" not in plain
    with pytest.raises(UsageError, match="was trained beside the language model"):
        engine(stories, adapter)
    with pytest.raises(UsageError, match="holds no adapter"):
        EngineConfig(lm=lm, adapter=lm).identity()
    with pytest.raises(ValueError, match="reads no adapter"):
        EngineConfig(engine="echo", adapter=adapter)


def stored(folder: Path, lm: str, config: AdapterConfig, seed: int) -> Path:
    """An adapter of random weights."""
    card = AdapterCard(config, {"user": WIDTH, "item": WIDTH}, checkpoint_hash(Path(lm)), "sasrec/1")
    model = build_adapter(load_backbone(lm, device="cpu"), card)
    noise = torch.Generator().manual_seed(seed)
    weights = {
        name: weight.detach() + 0.3 * torch.randn(weight.shape, generator=noise)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    save_adapter(folder, card, weights)
    return folder


def test_adapters_over_one_model_answer_as_each_alone_and_hold_its_weights_once(
    lm: str, adapter: str, tmp_path: Path
) -> None:
    other = stored(tmp_path / "lora", lm, CONFIG, 5)
    whole = stored(tmp_path / "whole", lm, CONFIG.model_copy(update={"embeddings": True, "lora": None}), 6)
    full = stored(tmp_path / "full", lm, CONFIG.model_copy(update={"full": True, "lora": None}), 7)
    base = engine(lm)
    assert isinstance(base, TransformersEngine)
    asked, words = prompts(12), [Prompt.of("the user chose"), Prompt.of("neither Dune nor")]
    plain = [outcome.text for outcome in answers(base, words)]
    beside = {folder: base.beside(folder) for folder in (Path(adapter), other, whole, full)}
    texts = []
    for folder, mine in beside.items():
        found = [outcome.text for outcome in answers(mine, asked)]
        assert found == [outcome.text for outcome in answers(engine(lm, str(folder)), asked)]
        texts.append(found)
    assert len(set(map(tuple, texts))) == len(beside)
    assert [outcome.text for outcome in answers(base, words)] == plain
    places = {weight.data_ptr() for weight in base.backbone.model.parameters()}
    for folder, mine in beside.items():
        own = [
            name
            for name, weight in mine.backbone.model.named_parameters()
            if weight.data_ptr() not in places and "lora_" not in name
        ]
        if folder == full:
            assert len(own) == sum("lora_" not in name for name, _ in mine.backbone.model.named_parameters())
        else:
            assert all("embed" in name or "head" in name for name in own) if folder == whole else not own


def test_an_answer_that_is_told_while_it_grows_ends_as_the_one_that_is_not(lm: str, adapter: str) -> None:
    mine, asked = engine(lm, adapter), prompts(9)
    for decoding in (GREEDY, GREEDY.model_copy(update={"temperature": 1.0, "seed": 3})):
        whole = answers(mine, asked, decoding)
        pieces: dict[int, list[str]] = {number: [] for number in range(len(asked))}
        found = {}
        for told in mine.stream(asked, decoding):
            if isinstance(told, Piece):
                assert told.index not in found
                pieces[told.index].append(told.text)
            else:
                found[told.index] = told
        assert [found[number] for number in range(len(asked))] == whole
        for outcome in whole:
            assert len(pieces[outcome.index]) >= outcome.tokens_out - 1
            assert all(outcome.text.startswith(piece) for piece in pieces[outcome.index])


def test_a_search_is_not_told_while_it_grows(lm: str, adapter: str) -> None:
    with pytest.raises(UsageError, match="search whose answers are told piece by piece"):
        next(engine(lm, adapter).stream(prompts(1), Decoding(beams=2)))
