"""What stands before a prompt in every layer: the same in training and in an engine, in order, and absent where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import MistralConfig, MistralForCausalLM

from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, AdapterConfig, build_adapter, load_adapter, save_adapter
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.prefixes import PREFIX, Prefix, PrefixConfig, PrefixShape, split_prefix
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import Encoded, SoftPromptLm, collate

WIDTH = 64  # of the tiny language model


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    save_untrained(
        folder, BuiltinLmConfig(size="tiny", context=64), train_tokenizer(["one two three"] * 3, [], [], 300)
    )
    return str(folder)


def adapted(lm: str, **options: object) -> SoftPromptLm:
    config = AdapterConfig(prefix=PrefixConfig.model_validate({"knowledge": 4, "vectors": 3, **options}))
    return build_adapter(load_backbone(lm, device="cpu"), AdapterCard(config, {PREFIX: WIDTH}, "lm", "")).eval()


def prefixed(rows: int, ids: list[int]) -> Encoded:
    rng = np.random.default_rng(rows)
    return Encoded(ids, [], Vectors(rng.normal(size=(rows, WIDTH)).astype(np.float32), PREFIX))


@torch.no_grad()
def test_keys_and_values_of_a_prefix_are_those_of_a_plain_loop(lm: str) -> None:
    model = adapted(lm)
    prefix = model.prefix
    assert prefix is not None
    vectors = torch.randn(2, 3, WIDTH)
    tokens, _ = prefix(2, vectors, torch.ones(2, 3, dtype=torch.bool))
    told = prefix.shape.split(tokens)
    heads = (prefix.shape.heads, prefix.shape.width)
    weight, bias = prefix.attention.in_proj_bias.chunk(3), prefix.attention
    read = prefix.knowledge.embedding.weight
    for row in range(2):
        for place in range(3):
            query = torch.nn.functional.layer_norm(vectors[row, place], (WIDTH,)) + prefix.places[place]
            queried = bias.q_proj_weight @ query + weight[0] if bias.q_proj_weight is not None else None
            if queried is None:
                wq, wk, wv = bias.in_proj_weight.chunk(3)
            else:
                wq, wk, wv = bias.q_proj_weight, bias.k_proj_weight, bias.v_proj_weight
            scores = (read @ wk.T + weight[1]) @ (wq @ query + weight[0]) / WIDTH**0.5
            seen = bias.out_proj(scores.softmax(0) @ (read @ wv.T + weight[2]))
            flat = prefix.out(seen).view(prefix.shape.layers, 2, *heads)
            for layer, (keys, values) in enumerate(told):
                torch.testing.assert_close(keys[row, :, place], flat[layer, 0], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(values[row, :, place], flat[layer, 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"knowledge": 0}, {"vectors": 0}], ids=str)
@torch.no_grad()
def test_a_prompt_reads_the_same_alone_and_beside_others_with_longer_prefixes(lm: str, options: dict[str, int]) -> None:
    model = adapted(lm, **options)
    rows = [prefixed(1, [5, 6, 7]), prefixed(3, [8, 9]), prefixed(2, [5, 9, 6, 8])]
    if options.get("vectors") == 0:
        rows = [Encoded(row.ids, []) for row in rows]
    together = model.states(collate(rows))
    for number, row in enumerate(rows):
        alone = model.states(collate([row]))[0]
        torch.testing.assert_close(together[number, : len(row.ids)], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_stands_before_is_read_and_the_last_vectors_have_the_last_places(lm: str) -> None:
    model = adapted(lm)
    assert model.prefix is not None
    model.prefix.places.normal_()
    one, other = prefixed(3, [5, 6, 7]), prefixed(3, [5, 6, 7])
    assert one.prefix is not None
    other = Encoded(other.ids, [], Vectors(one.prefix.values[::-1].copy(), PREFIX))
    read = model.states(collate([one]))
    assert not torch.allclose(read, model.states(collate([other])), atol=1e-3)
    bare = build_adapter(load_backbone(lm, device="cpu"), AdapterCard(AdapterConfig(), {}, "lm", ""))
    assert not torch.allclose(read, bare.states(collate([Encoded(one.ids, [])])), atol=1e-3)
    # Of two vectors the last place is the last one's.
    two, _ = model.prefix(1, torch.randn(1, 2, WIDTH).fill_(0.5), torch.ones(1, 2, dtype=torch.bool))
    three, _ = model.prefix(1, torch.randn(1, 3, WIDTH).fill_(0.5), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(two, three[:, 1:])


def test_a_prefix_and_every_weight_of_the_model_are_stored_and_read_again(lm: str, tmp_path: Path) -> None:
    config = AdapterConfig(prefix=PrefixConfig(knowledge=2, vectors=2), full=True)
    card = AdapterCard(config, {PREFIX: WIDTH}, "lm", "")
    model = build_adapter(load_backbone(lm, device="cpu"), card, seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in weights} == {"lm", "prefix"}
    save_adapter(tmp_path, card, weights)
    again = load_adapter(tmp_path, load_backbone(lm, device="cpu"), "lm")
    rows = collate([prefixed(2, [5, 6])])
    with torch.no_grad():
        torch.testing.assert_close(again.states(rows), model.eval().states(rows))


def test_vectors_that_stand_first_are_the_prefix_and_no_others() -> None:
    vectors = Vectors(np.zeros((1, 2), np.float32), PREFIX)
    assert split_prefix(Prompt.of(vectors, "a", "b")) == (vectors, Prompt.of("a", "b"))
    assert split_prefix(Prompt.of("a", vectors)) == (None, Prompt.of("a", vectors))


def test_a_prefix_of_nothing_and_a_model_that_forgets_are_refused() -> None:
    with pytest.raises(ValidationError, match="knowledge prompt, vectors, or both"):
        PrefixConfig(knowledge=0, vectors=0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "sliding_window": 8}
    with pytest.raises(UsageError, match="forgets what lies behind its window"):
        PrefixShape.of(MistralForCausalLM(MistralConfig(**sizes, **heads)))


def test_grouped_heads_are_counted_by_their_keys(lm: str) -> None:
    model = load_backbone(lm, device="cpu").model
    model.config.num_key_value_heads = 2  # type: ignore[union-attr]
    shape = PrefixShape.of(model)
    assert (shape.heads, shape.size) == (2, shape.layers * 2 * 2 * shape.width)
    tokens, there = Prefix(PrefixConfig(knowledge=3, vectors=0), shape, WIDTH)(5, None, None)
    assert (tokens.shape, there.all()) == ((5, 3, shape.size), True)
