"""The built-in LM: a tokenizer that loses nothing, and a checkpoint like any other."""

import pytest

from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash

TEMPLATES = ["Items of one person:\n{items}\nWhat occurs, é?\nAnswer:"]
HOSTILE = [
    "</s> <pad> <unk>",
    "七人の侍 🎬👩‍👩‍👧 e\u0301\u200d\ufeff\x00\x1b[31m",
    "  two  spaces \n\n\t\r\n",
    "العربية Ελλάδα हिन्दी ไทย",
    "\U0010ffff\ufffd\u2028",
    "War Warsaw DramaX Sci-Fi's Café ÿ",
    "",
    TEMPLATES[0],
]


@pytest.fixture(scope="module")
def tokenizer():
    values = ["Drama"] * 3 + ["Children's", "Sci-Fi", "Café (noir)", "3M"]
    return train_tokenizer(["title: Alien; genre: Drama", "七人の侍"], values, TEMPLATES, 600)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("builtin")
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), tokenizer)
    return folder


@pytest.mark.parametrize("text", HOSTILE)
def test_no_character_of_any_title_is_lost(checkpoint, text):
    backbone = load_backbone(str(checkpoint), device="cpu")
    (ids,) = backbone.encode([text])
    assert ids == backbone.tokens_of([text])[0] == backbone.tokenizer(text)["input_ids"]
    assert backbone.tokenizer.decode(ids) == text
    assert backbone.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_an_end_mark_inside_a_title_is_plain_text(tokenizer):
    assert tokenizer.eos_token_id not in tokenizer("</s>")["input_ids"]


def test_attribute_values_and_instructions_are_one_token_each(tokenizer):
    for value in ["Drama", "Children's", "Sci-Fi", "Café (noir)", "3M"]:
        assert len(tokenizer(f" {value}")["input_ids"]) == 1
    assert len(tokenizer("\nWhat occurs, é?\nAnswer:")["input_ids"]) == 1


def test_the_checkpoint_loads_like_any_other(checkpoint, tokenizer):
    backbone = load_backbone(str(checkpoint), device="cpu")
    assert backbone.model.config.model_type == "llama"
    assert (backbone.context, backbone.ends) == (128, (tokenizer.eos_token_id,))
    assert backbone.count_tokens([" Drama", " Drama Drama"]) == [1, 2]


def test_the_same_seed_saves_the_same_weights(checkpoint, tokenizer, tmp_path):
    config = BuiltinLmConfig(size="tiny", context=128)
    save_untrained(tmp_path / "again", config, tokenizer)
    save_untrained(tmp_path / "other", config, tokenizer, seed=1)
    assert checkpoint_hash(tmp_path / "again") == checkpoint_hash(checkpoint)
    assert checkpoint_hash(tmp_path / "other") != checkpoint_hash(checkpoint)
