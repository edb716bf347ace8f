"""Checkpoints to generate with beside the real one: tiny random ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer


@pytest.fixture(scope="session")
def random_checkpoint() -> Callable[..., str]:
    return _random_checkpoint


@pytest.fixture(scope="session")
def random_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _random_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def sliding_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose cache holds the last eight tokens."""
    folder = tmp_path_factory.mktemp("sliding")
    words = "Once upon a time there was little girl named Lily who liked to play with her red ball and cat in park"
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=512), train_tokenizer([words] * 3, [], [], 300), 0)
    config = MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=8, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def learned_positions_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with an embedding of each position, of which it has 64."""
    folder = tmp_path_factory.mktemp("positions")
    words = "Once upon a time there was little girl named Lily who liked to play with her red ball and cat in park"
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=64), train_tokenizer([words] * 3, [], [], 300), 0)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def _random_checkpoint(folder: Path, *, seed: int = 0, always_ends: bool = False) -> str:
    """A model that talks nonsense at length, or one that ends every answer before its first word."""
    tokenizer = train_tokenizer(["Once upon a time there was a little girl named Lily"] * 3, [], [], 400)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=512), tokenizer, seed)
    if always_ends:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])
        # All logits are 0 then, and the first token, the end mark, is chosen.
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
