"""Prepared examples and the task a trainer runs on them: loss on answers only, batches a function of the step."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from raypipe.language.backbone import load_backbone
from raypipe.language.batching import batches_of_like_length
from raypipe.language.catalogue import Catalogue
from raypipe.language.instructions import summary_examples
from raypipe.language.pretraining import LmTask, prepare_lm


@pytest.fixture(scope="module")
def prepared(histories, catalogue, tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_lm(folder, histories, catalogue, tiny_data)
    return folder


@pytest.fixture(scope="module")
def task(prepared: Path) -> LmTask:
    return LmTask(prepared)


def test_loss_is_taken_on_the_answer_and_its_end_mark_only(task, prepared, histories, catalogue, tiny_data):
    tokenizer = load_backbone(str(prepared / "start"), device="cpu").tokenizer
    examples = {
        example.prompt: example.answer
        for example in summary_examples(histories, catalogue, tiny_data.prompts, tiny_data.instructions)
    }
    batch = task.batch(0, 0, 0, 1, 8)
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        wanted = labels != -100
        assert torch.equal(labels[wanted], tokens[wanted])
        answer = tokenizer.decode(labels[wanted], skip_special_tokens=False)
        prompt = tokenizer.decode(tokens[: int(wanted.nonzero()[0])])
        assert answer == f" {examples[prompt]}</s>"


def test_the_loss_equals_the_textbooks(task):
    batch = task.batch(0, 0, 0, 1, 8)
    module = task.build()
    logits = module.lm(input_ids=batch["tokens"]).logits[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(module(batch), expected)


def test_padding_changes_no_loss(task):
    batch, module = task.batch(0, 0, 0, 1, 4), task.build()
    padded = {
        **batch,
        "tokens": functional.pad(batch["tokens"], (0, 9), value=3),
        "labels": functional.pad(batch["labels"], (0, 9), value=-100),
    }
    torch.testing.assert_close(module(padded), module(batch))


def test_an_epoch_shows_every_example_once_and_ranks_share_each_batch(task):
    def rows(rank: int, world: int, epoch: int) -> list[bytes]:
        steps = task.steps_per_epoch(10)
        batches = (task.batch(epoch * steps + step, 3, rank, world, 10) for step in range(steps))
        # Trailing padding differs between shares of a batch.
        return [np.trim_zeros(row.numpy(), "b").tobytes() for batch in batches for row in batch["tokens"]]

    whole = rows(0, 1, 0)
    assert len(whole) == 140
    assert sorted(rows(0, 2, 0) + rows(1, 2, 0)) == sorted(whole)
    assert sorted(rows(0, 1, 1)) == sorted(whole)
    assert rows(0, 1, 1) != whole


def test_what_does_not_fill_a_batch_is_as_often_long_as_short():
    """Of a hundred examples, of which an epoch leaves 36 out."""
    lengths = np.arange(100)
    taken = np.zeros(100)
    for epoch in range(200):
        (batch,) = batches_of_like_length(lengths, (0, epoch), 64)
        assert len(set(batch.tolist())) == 64
        taken[batch] += 1
    assert taken[:50].mean() == pytest.approx(taken[50:].mean(), rel=0.05)
    assert taken.min() > 90
    (few,) = batches_of_like_length(lengths[:5], (0, 0), 64)
    assert sorted(few.tolist()) == [0, 1, 2, 3, 4]


def test_two_ranks_with_answers_of_unequal_length_learn_what_one_learns(task):
    module = task.build()
    whole = module(task.batch(3, 1, 0, 1, 10))
    shares = [module(task.batch(3, 1, rank, 2, 10)) for rank in range(2)]
    assert shares[0].item() != pytest.approx(shares[1].item(), rel=1e-3)
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_a_batch_is_the_same_wherever_and_whenever_it_is_asked_for(task):
    elsewhere = pickle.loads(pickle.dumps(task))
    elsewhere.batch(7, 1, 0, 2, 10)
    for name, tensor in task.batch(13, 1, 1, 2, 10).items():
        assert torch.equal(elsewhere.batch(13, 1, 1, 2, 10)[name], tensor)


def test_batches_hold_examples_of_like_length(task):
    batches = [task.batch(step, 0, 0, 1, 10)["tokens"] for step in range(10)]
    real = sum(int((batch != 0).sum()) for batch in batches)
    assert real / sum(batch.numel() for batch in batches) > 0.85


def test_preparation_writes_the_same_bytes_again(prepared, histories, catalogue, tiny_data, tmp_path):
    counts = prepare_lm(tmp_path, histories, catalogue, tiny_data)
    assert counts["examples"] == 140
    for file in ["tokens.npy", "ends.npy", "answer_starts.npy", "start/model.safetensors", "start/tokenizer.json"]:
        assert (tmp_path / file).read_bytes() == (prepared / file).read_bytes()


def test_untrained_weights_saved_as_trained_are_the_same_checkpoint(task, tmp_path):
    module = task.build()
    task.save(dict(module.named_parameters()), tmp_path / "saved")
    again = load_backbone(str(tmp_path / "saved"), device="cpu").model
    for name, weight in module.lm.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)


def test_a_folder_that_was_not_prepared_is_refused(histories, catalogue, tmp_path, tiny_data):
    with pytest.raises(ValueError, match="call prepare_lm first"):
        LmTask(tmp_path)
    short = tiny_data.model_copy(update={"model": tiny_data.model.model_copy(update={"context": 8})})
    with pytest.raises(ValueError, match="No example fits the context of 8 tokens"):
        prepare_lm(tmp_path, histories, catalogue, short)
    with pytest.raises(ValueError, match="without items"):
        prepare_lm(tmp_path, [], Catalogue([], []), tiny_data)
