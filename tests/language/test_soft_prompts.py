"""Vectors in prompts: where their tokens go, what they are, and that nothing but the answer is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.projectors import Projector, ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import IGNORED, SoftPromptLm, collate, encode

WIDTH = 6
WIDTHS = {"user": WIDTH, "item": WIDTH}
KINDS = [ProjectorConfig(kind=kind) for kind in ("linear", "mlp", "qformer")]
POOLED = ProjectorConfig(pool="learned_positions", positions=4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(["the user chose Alien and Brazil and Casablanca"] * 9, [], [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=256), tokenizer)
    return load_backbone(str(folder), device="cpu")


def states(count: int, seed: int = 0, source: str = "user") -> Vectors:
    return Vectors(np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32), source)


def model(backbone: Backbone, *configs: ProjectorConfig, injection: str = "replace") -> SoftPromptLm:
    hidden = backbone.model.get_input_embeddings().weight.shape[1]
    torch.manual_seed(0)
    sources = dict(zip(("user", "item"), configs, strict=False))
    projectors = {source: config.build(WIDTH, hidden) for source, config in sources.items()}
    return SoftPromptLm(backbone.model, projectors, injection).eval()


def projector(lm: SoftPromptLm, source: str = "user") -> Projector:
    found = lm.projectors[source]
    assert isinstance(found, Projector)
    return found


@pytest.mark.parametrize("config", [*KINDS, POOLED], ids=lambda config: f"{config.kind}-{config.pool}")
def test_vectors_stand_where_the_prompt_has_them_and_text_is_what_it_was(
    backbone: Backbone, config: ProjectorConfig
) -> None:
    lm = model(backbone, config)
    prompts = [Prompt.of("the user ", states(3), " chose"), Prompt.of(states(5, 1), "and Alien and Brazil")]
    encoded = [encode(backbone, prompt, {"user": projector(lm).config}, WIDTHS) for prompt in prompts]
    batch = collate(encoded)
    embedded = lm.embed(batch)
    words = backbone.model.get_input_embeddings().weight
    for row, (prompt, vectors) in enumerate(zip(encoded, (states(3), states(5, 1)), strict=True)):
        known = torch.ones(1, len(vectors.values), dtype=torch.bool)
        expected, _ = projector(lm)(torch.from_numpy(vectors.values)[None], known)
        ((start, _),) = prompt.soft
        stop = start + expected.shape[1]
        torch.testing.assert_close(embedded[row, start:stop], expected[0])
        assert config.tokens_of(len(vectors.values)) == stop - start
        for place, token in enumerate(prompt.ids):
            if not start <= place < stop:
                assert torch.equal(embedded[row, place], words[token])
    assert batch["mask"].sum(1).tolist() == [len(prompt.ids) for prompt in encoded]


def test_two_sources_in_one_prompt_each_have_their_projector(backbone: Backbone) -> None:
    lm = model(backbone, ProjectorConfig(), ProjectorConfig(kind="mlp"))
    prompt = Prompt.of("the user ", states(1), " chose ", states(1, 1, "item"), states(1, 2, "item"))
    batch = collate([encode(backbone, prompt, {source: projector(lm, source).config for source in WIDTHS}, WIDTHS)])
    embedded = lm.embed(batch)[0]
    one = torch.ones(1, 1, dtype=torch.bool)
    expected = [
        projector(lm, v.source)(torch.from_numpy(v.values)[None], one)[0][0, 0]
        for v in (states(1), states(1, 1, "item"), states(1, 2, "item"))
    ]
    torch.testing.assert_close(embedded[-2:], torch.stack(expected[1:]))
    (start,) = batch["starts/user"].tolist()
    torch.testing.assert_close(embedded[start], expected[0])


def test_added_tokens_have_a_word_of_their_own_below_them(backbone: Backbone) -> None:
    replaced, added = model(backbone, ProjectorConfig()), model(backbone, ProjectorConfig(), injection="add")
    with torch.no_grad():
        added.words["user"].fill_(0.5)
    batch = collate([encode(backbone, Prompt.of("user ", states(2)), {"user": ProjectorConfig()}, WIDTHS)])
    difference = added.embed(batch) - replaced.embed(batch)
    torch.testing.assert_close(difference[0, -2:], torch.full_like(difference[0, -2:], 0.5))
    assert not difference[0, :-2].any()


def test_only_the_answer_is_learnt_and_the_loss_is_its_cross_entropy(backbone: Backbone) -> None:
    lm = model(backbone, POOLED)
    prompts = [Prompt.of("the user ", states(4), " chose"), Prompt.of(states(2, 1), "chose Alien and")]
    encoded = [encode(backbone, prompt, {"user": projector(lm).config}, WIDTHS) for prompt in prompts]
    answers = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" Brazil", " Casablanca")]
    batch = collate(encoded, answers)
    for row, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
        labels = batch["labels"][row].tolist()
        assert labels[len(prompt.ids) : len(prompt.ids) + len(answer)] == answer
        assert set(labels[: len(prompt.ids)] + labels[len(prompt.ids) + len(answer) :]) <= {IGNORED}
    logits = backbone.model(inputs_embeds=lm.embed(batch), attention_mask=batch["mask"]).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(lm(batch), expected)
    lm(batch).backward()
    assert projector(lm).layers.weight.grad.abs().sum() > 0


def test_learned_places_begin_with_the_last_vector_and_leave_out_what_is_not_there() -> None:
    pooled = POOLED.build(WIDTH, 8)
    values = torch.randn(2, 4, WIDTH)
    known = torch.tensor([[False, False, True, True], [True, True, True, True]])
    tokens, _ = pooled(values, known)
    torch.testing.assert_close(tokens[:, 0], pooled.layers(values[:, -1]))
    with torch.no_grad():
        pooled.places.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tokens, _ = pooled(values, known)
    torch.testing.assert_close(tokens[0, 0], pooled.layers(3 * values[0, 2] + 4 * values[0, 3]))
    shorter, _ = pooled(values[:1, 2:], known[:1, 2:])
    torch.testing.assert_close(shorter, tokens[:1])


@pytest.mark.parametrize("rows", [500, 2])
def test_a_whitened_projector_starts_where_every_direction_is_as_large(rows: int) -> None:
    """But for one in which nothing differs, and however few vectors there are to tell by."""
    plain = ProjectorConfig().build(WIDTH, 8)
    torch.manual_seed(0)
    mixed = torch.randn(rows, WIDTH) @ torch.diag(10.0 ** -torch.arange(WIDTH)) @ torch.randn(WIDTH, WIDTH) + 3
    mixed[:, 0] = mixed[:, 1]
    torch.manual_seed(1)
    whitened = ProjectorConfig(whitened=True).build(WIDTH, 8)
    whitened.whiten(mixed)
    assert {name for name, _ in whitened.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "enter.weight",
        "enter.bias",
    }
    entered = whitened.enter(mixed).detach()
    assert entered.isfinite().all()
    torch.testing.assert_close(entered.mean(0), torch.zeros(WIDTH), atol=1e-3, rtol=0)
    spread = torch.linalg.eigvalsh(entered.T @ entered / rows)
    assert spread.max() == pytest.approx(1, abs=1e-2)
    tokens, _ = whitened(mixed[:, None], torch.ones(rows, 1, dtype=torch.bool))
    torch.testing.assert_close(tokens[:, 0], whitened.layers(entered))


def test_a_qformer_does_not_see_what_is_not_there() -> None:
    former = ProjectorConfig(kind="qformer", tokens=3).build(WIDTH, 8)
    values, known = torch.randn(1, 5, WIDTH), torch.tensor([[False, False, True, True, True]])
    tokens, _ = former(values, known)
    disturbed = values.clone()
    disturbed[:, :2] = 99
    torch.testing.assert_close(former(disturbed, known)[0], tokens)
    torch.testing.assert_close(former(values[:, 2:], known[:, 2:])[0], tokens)


def test_a_qformer_attends_by_content_and_by_place_counted_from_the_end() -> None:
    former = ProjectorConfig(kind="qformer", tokens=2, positions=3).build(WIDTH, 8)
    values, known = torch.randn(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.bool)
    former(values, known)[0].square().sum().backward()
    attention = former.layers.attention
    query, key, _ = attention.in_proj_weight.grad.chunk(3)
    assert query.abs().max() > 1e-4
    assert key.abs().max() > 1e-4
    before, _ = former(values, known)
    with torch.no_grad():
        former.layers.places[0] += torch.arange(8.0)
    assert not torch.allclose(former(values, known)[0], before)
    shorter = former(values[:, 2:], known[:, 2:])[0]
    with torch.no_grad():
        former.layers.places[0] -= torch.arange(8.0)  # The place of vectors further back than two moves nothing of two.
    torch.testing.assert_close(former(values[:, 2:], known[:, 2:])[0], shorter)
    with pytest.raises(ValidationError, match="a qformer pools vectors itself"):
        ProjectorConfig(kind="qformer", pool="learned_positions")


def test_vectors_that_no_projector_reads_are_refused(backbone: Backbone) -> None:
    reads = {"user": ProjectorConfig()}
    with pytest.raises(ValueError, match="no projector for vectors of 'item'"):
        encode(backbone, Prompt.of(states(1, source="item")), reads, WIDTHS)
    with pytest.raises(ValueError, match="are 3 wide, and their projector reads 6"):
        encode(backbone, Prompt.of(Vectors(np.zeros((1, 3), np.float32), "user")), reads, WIDTHS)


def test_pieces_of_a_chat_stand_within_the_users_turn(stories: str) -> None:
    chat = load_backbone(stories, device="cpu")
    chat.tokenizer.chat_template = "<|user|>{{ messages[0]['content'] }}<|assistant|>"
    ((ids, starts),) = chat.encode_pieces([["Once upon", 2, " a time"]])
    before, after = (chat.tokenizer.decode(part).replace(" ", "") for part in (ids[: starts[0]], ids[starts[0] + 2 :]))
    assert (before, after) == ("<|user|>Onceupon", "atime<|assistant|>")
    assert ids[starts[0] : starts[0] + 2] == [0, 0]
