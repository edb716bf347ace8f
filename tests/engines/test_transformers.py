"""Batched generation equals one-by-one generation, and one bad prompt concerns no other."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from raypipe.engines import decoding as decoding_loop
from raypipe.engines import prefill
from raypipe.engines.engine import Decoding, EngineConfig, Outcome
from raypipe.language.backbone import load_backbone
from raypipe.language.prompt import Prompt, Vectors

STORY = "Once upon a time there was little girl named Lily who liked to play with her red ball and cat in park"


@pytest.fixture(params=["stories", "random_lm"])
def lm(request) -> str:
    return request.getfixturevalue(request.param)


def engine(lm: str, **settings):
    return EngineConfig(lm=lm, device="cpu", threads=1, **settings).build()


def mixed_prompts(count: int) -> list[Prompt]:
    rng = random.Random(0)
    return [Prompt.of(" ".join(rng.choices(STORY.split(), k=rng.randint(1, 60)))) for _ in range(count)]


def answers(lm: str, prompts: list[Prompt], decoding: Decoding, **settings) -> list[Outcome]:
    return sorted(engine(lm, **settings).generate(prompts, decoding), key=lambda outcome: outcome.index)


def test_g7_one_truth_a_batch_of_mixed_lengths_answers_as_each_prompt_alone(lm):
    prompts, decoding = mixed_prompts(32), Decoding(max_new_tokens=40)
    alone = engine(lm)
    singles = [next(alone.generate([prompt], decoding)) for prompt in prompts]
    batched = answers(lm, prompts, decoding)
    assert [outcome.text for outcome in batched] == [outcome.text for outcome in singles]
    assert [outcome.tokens_out for outcome in batched] == [outcome.tokens_out for outcome in singles]
    assert len({outcome.text for outcome in batched}) > 16


def test_our_loop_answers_as_transformers_own_generate(stories):
    backbone = load_backbone(stories, device="cpu")
    prompts = mixed_prompts(6)
    expected = []
    for prompt in prompts:
        (ids,) = backbone.encode([prompt.text])
        ids_out = backbone.model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)
        expected += backbone.decode(ids_out[:, len(ids) :].tolist())
    assert [outcome.text for outcome in answers(stories, prompts, Decoding(max_new_tokens=30))] == expected


def test_a_mark_among_the_words_of_a_prompt_is_generated_from_and_counted_as_words(stories):
    backbone, text = load_backbone(stories, device="cpu"), "Lily said </s> and <s> to <unk> her"
    words = backbone.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(words) & set(backbone.tokenizer.all_special_ids)
    ids = [backbone.tokenizer.bos_token_id, *words]
    written = backbone.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[:, len(ids) :]
    (outcome,) = answers(stories, [Prompt.of(text)], Decoding(max_new_tokens=20))
    assert [outcome.text] == backbone.decode(written.tolist())
    assert outcome.tokens_in == len(ids)
    assert EngineConfig(lm=stories).token_counter()([text, "Lily"]) == [len(words), *backbone.count_tokens(["Lily"])]


def test_the_size_of_batches_changes_no_answer(lm):
    prompts, decoding = mixed_prompts(16), Decoding(max_new_tokens=20)
    assert answers(lm, prompts, decoding, batch_tokens=200) == answers(lm, prompts, decoding)


def test_what_all_prompts_begin_with_is_read_once(stories, monkeypatch):
    instructions = "Once upon a time there was a little girl who had a red ball and a dog and a cat."
    prompts = [Prompt.of(f"{instructions} {prompt.text}") for prompt in mixed_prompts(24)]
    decoding = Decoding(max_new_tokens=20)
    shared = prefill.shared_start(load_backbone(stories, device="cpu").encode([p.text for p in prompts]))
    assert len(shared) >= 20
    read: list[int] = []

    def counting(lm: str) -> list[Outcome]:
        built = engine(lm)
        model = built.backbone.model
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda **given: read.append(given["input_ids"].numel()) or forward(**given)
        )
        return sorted(built.generate(prompts, decoding), key=lambda outcome: outcome.index)

    once = counting(stories)
    assert read[0] == len(shared)
    with_sharing = sum(read)
    read.clear()
    monkeypatch.setattr(prefill, "shared_start", lambda prompts: [])
    assert counting(stories) == once
    assert sum(read) >= with_sharing + len(shared) * (len(prompts) - 1)
    alone = engine(stories)
    assert [next(alone.generate([prompt], decoding)).text for prompt in prompts] == [outcome.text for outcome in once]


def test_the_shared_start_leaves_a_token_of_every_prompt():
    start = list(range(30))
    assert prefill.shared_start([[*start, 7], [*start, 8, 9], [*start, 7, 1]]) == start
    assert prefill.shared_start([start, start]) == start[:-1]
    assert prefill.shared_start([start, [0, 1, 2, 9]]) == []  # too few to be worth it
    assert prefill.shared_start([start]) == []


def test_sampling_follows_seed_and_prompt_and_never_the_batch(lm):
    prompts, decoding = mixed_prompts(16), Decoding(max_new_tokens=20, temperature=1.0, seed=7)
    together = answers(lm, prompts, decoding)
    assert answers(lm, prompts[::-1], decoding, batch_tokens=150)[::-1][3].text == together[3].text
    assert [o.text for o in answers(lm, prompts[:3], decoding)] == [o.text for o in together[:3]]
    other = decoding.model_copy(update={"seed": 8})
    assert [o.text for o in answers(lm, prompts, other)] != [o.text for o in together]


def test_a_prompt_too_long_is_an_error_in_its_row_and_never_cut(stories):
    long, short = answers(stories, [Prompt.of("cat " * 600), Prompt.of("Once")], Decoding(max_new_tokens=10))
    assert long.error is not None
    assert (long.error.kind, long.text) == ("prompt_too_long", "")
    assert long.tokens_in > 512
    assert (short.error, short.tokens_out) == (None, 10)


def test_the_context_is_filled_to_its_last_token(stories):
    prompt = Prompt.of("Once upon a time")
    (length,) = (outcome.tokens_in for outcome in answers(stories, [prompt], Decoding(max_new_tokens=1)))
    decodings = [Decoding(max_new_tokens=limit) for limit in (64 - length, 65 - length)]
    fits, too_long = (answers(stories, [prompt], decoding, context=64)[0] for decoding in decodings)
    assert (fits.error, fits.tokens_out, fits.finish_reason) == (None, 64 - length, "length")
    assert too_long.error is not None


def test_vectors_and_empty_prompts_concern_their_rows_only(random_lm):
    vectors = Prompt.of("x", Vectors(np.zeros((1, 64), np.float32), "sasrec"))
    outcomes = answers(random_lm, [vectors, Prompt.of(""), Prompt.of("fine")], Decoding(max_new_tokens=3))
    assert [outcome.error.kind if outcome.error else None for outcome in outcomes] == [
        "unsupported_prompt",
        "unsupported_prompt",
        None,
    ]


def test_the_end_mark_stops_an_answer_and_is_not_part_of_it(random_checkpoint, tmp_path):
    ending = random_checkpoint(tmp_path, always_ends=True)
    (outcome,) = answers(ending, [Prompt.of("Say nothing.")], Decoding(max_new_tokens=5))
    assert (outcome.text, outcome.tokens_out, outcome.finish_reason, outcome.error) == ("", 0, "stop", None)


def test_no_prompts_are_no_outcomes(random_lm):
    assert answers(random_lm, [], Decoding()) == []
    assert engine(random_lm).count_tokens([]) == []


def test_identity_follows_the_weights_and_not_the_place(random_lm, random_checkpoint, tmp_path):
    same, other = random_checkpoint(tmp_path / "same"), random_checkpoint(tmp_path / "other", seed=1)
    identity = EngineConfig(lm=random_lm).identity()
    assert set(identity) == {"engine", "version", "dtype", "context", "model"}
    assert EngineConfig(lm=same, threads=3).identity() == identity
    assert EngineConfig(lm=other).identity() != identity
    assert EngineConfig(lm=random_lm, dtype="bfloat16").identity() != identity


def ending_often(lm: str, every: int = 10, **settings):
    """An engine whose answers end at about every tenth token, so that rows come and go at all times."""
    found = engine(lm, **settings)
    found.backbone = replace(found.backbone, ends=tuple(range(0, 400, every)))
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_tokens", [1, 200, 500, 5000])
def test_prompts_that_join_a_batch_are_answered_as_alone(random_lm, batch_tokens, temperature):
    prompts, decoding = mixed_prompts(40), Decoding(max_new_tokens=30, temperature=temperature)
    alone = ending_often(random_lm)
    singles = [next(alone.generate([prompt], decoding)) for prompt in prompts]
    lengths = [outcome.tokens_out for outcome in singles]
    assert len(set(lengths)) > 8
    found = list(ending_often(random_lm, batch_tokens=batch_tokens).generate(prompts, decoding))
    assert len(found) == 40
    for outcome in found:
        single = singles[outcome.index]
        assert (outcome.text, outcome.tokens_out, outcome.finish_reason) == (
            single.text,
            single.tokens_out,
            single.finish_reason,
        )


def test_a_batch_never_holds_more_tokens_than_it_may(random_lm, monkeypatch):
    held, live = [], []
    step = decoding_loop._Batch.step

    def watched(batch):
        held.append(batch.mask.numel())
        live.append(int(batch.live.sum()))
        step(batch)

    monkeypatch.setattr(decoding_loop._Batch, "step", watched)
    prompts = mixed_prompts(40)
    list(ending_often(random_lm, batch_tokens=2000).generate(prompts, Decoding(max_new_tokens=30, temperature=1.0)))
    assert max(held) <= 2000
    assert np.mean(live) > 6, "room that rows leave is filled again: without that 4.7"


def test_a_model_whose_cache_slides_answers_as_alone(sliding_lm):
    prompts, decoding = mixed_prompts(12), Decoding(max_new_tokens=20)
    alone = engine(sliding_lm)
    singles = [next(alone.generate([prompt], decoding)).text for prompt in prompts]
    assert [outcome.text for outcome in answers(sliding_lm, prompts, decoding, batch_tokens=300)] == singles


def test_rows_that_have_ended_take_no_position_that_the_model_does_not_have(learned_positions_lm):
    words = STORY.split()[:14]
    prompts = [Prompt.of(" ".join(["Once", *random.Random(seed).sample(words, 14)])) for seed in range(40)]
    alone = ending_often(learned_positions_lm, 30)
    (length,) = {len(ids) for ids in alone.backbone.encode([prompt.text for prompt in prompts])}
    decoding = Decoding(max_new_tokens=64 - length, temperature=1.0)
    assert decoding.max_new_tokens >= 20
    singles = [next(alone.generate([prompt], decoding)) for prompt in prompts]
    assert len({outcome.tokens_out for outcome in singles}) > 4
    batched = ending_often(learned_positions_lm, 30, batch_tokens=4 * 64).generate(prompts, decoding)
    assert {outcome.index: outcome.text for outcome in batched} == {
        number: outcome.text for number, outcome in enumerate(singles)
    }
