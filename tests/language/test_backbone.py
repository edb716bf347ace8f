"""Loading real checkpoints, refusing what is none, and putting prompts to them as they want to be asked."""

import shutil

import pytest
import torch

from raypipe.errors import UsageError
from raypipe.language.backbone import load_backbone
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint


def test_a_real_checkpoint_loads_and_continues_a_story(stories):
    backbone = load_backbone(stories, device="cpu")
    assert (backbone.context, backbone.ends, backbone.model.dtype) == (512, (2,), torch.float32)
    (ids,) = backbone.encode(["Once upon a time"])
    answer = backbone.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert backbone.decode(answer[:, len(ids) :].tolist())[0].startswith(", there was a little girl")


def test_bfloat16_is_a_choice(stories):
    assert load_backbone(stories, "bfloat16", "cpu").model.dtype == torch.bfloat16


def test_a_chat_template_wraps_the_prompt_as_a_users_turn(stories, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    plain, chat = load_backbone(stories, device="cpu"), load_backbone(str(folder), device="cpu")
    wrapped = plain.tokenizer("[user] Who?\n[assistant]", add_special_tokens=False)["input_ids"]
    assert chat.encode(["Who?"]) == [wrapped]
    assert chat.count_tokens(["Who?"]) == plain.count_tokens(["Who?"])
    assert checkpoint_hash(folder) != checkpoint_hash(resolve_checkpoint(stories))


def test_the_hash_follows_content_and_not_the_folders_name(stories, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stories, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    (copy / "README.md").write_text("does not shape an answer")
    assert checkpoint_hash(copy) == checkpoint_hash(resolve_checkpoint(stories))
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("10000.0", "10001.0"))
    assert checkpoint_hash(copy) != checkpoint_hash(resolve_checkpoint(stories))


@pytest.mark.parametrize("ref", ["/nowhere/at/all", "./nowhere", "no such folder"])
def test_a_missing_folder_is_said_to_be_missing(ref):
    with pytest.raises(UsageError, match="There is no checkpoint folder"):
        load_backbone(ref)


@pytest.mark.parametrize("ref", ["my models/x y", "models/a--b", "models/"])
def test_what_cannot_be_a_hub_name_is_said_to_be_missing(ref):
    with pytest.raises(UsageError, match="There is no folder and no hub model"):
        resolve_checkpoint(ref)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no \*\.safetensors.*never loaded"):
        load_backbone(str(tmp_path))


def test_a_damaged_checkpoint_is_refused_with_the_reason(stories, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UsageError, match="cannot be read as a causal language model"):
        load_backbone(str(folder))


def test_an_unreachable_hub_is_said_to_be_unreachable(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="hub cannot be reached"):
        resolve_checkpoint("raypipe-tests/does-not-exist")
