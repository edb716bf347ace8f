"""Numbers in the slots of an answer: their spellings, and expectations beside a brute force in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raypipe.errors import UsageError
from raypipe.language.backbone import Backbone, PromptTokenizer, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.number_slots import NumberForm, expected_numbers

WORDS = ['{"dark": ', ', "funny": ', ', "long": ', "}"]
PROMPTS = ["Once upon a time there was a big dog.", "A film. Rate it:", "The little girl and the cat went out to play"]


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Spells every number as one token, with the space before it."""
    folder = tmp_path_factory.mktemp("lm")
    texts = [*PROMPTS, *(f'{{"dark": {n}, "funny": {n}, "long": {n}}}' for n in range(1, 11))]
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), train_tokenizer(texts * 5, [], [], 500))
    return load_backbone(str(folder), device="cpu")


@pytest.fixture(scope="module")
def digits(stories: str) -> Backbone:
    """Spells ten as one and nought: a real checkpoint, trained on toy stories."""
    return load_backbone(stories, device="cpu")


@pytest.fixture(params=["builtin", "digits"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.getfixturevalue(request.param)


def form_of(backbone: Backbone, top: int = 10) -> NumberForm:
    return NumberForm.of(backbone, WORDS, top, backbone.ends[0])


def test_each_tokenizer_spells_the_numbers_as_it_really_does(builtin: Backbone, digits: Backbone) -> None:
    one, two = form_of(builtin), form_of(digits)
    assert [len(number) for number in one.numbers] == [1] * 10
    assert one.branches == ()
    assert [len(number) for number in two.numbers] == [1] * 9 + [2]
    assert two.numbers[9][0] == two.numbers[0][0]
    assert two.branches == two.numbers[0]
    assert digits.tokenizer.convert_ids_to_tokens(two.numbers[9]) == ["1", "0"]
    assert form_of(digits, top=9).branches == ()


def test_an_answer_is_spelled_as_a_model_would_write_it(backbone: Backbone) -> None:
    form = form_of(backbone)
    rng = np.random.default_rng(0)
    for fill in rng.integers(1, 11, (20, 3)).tolist():
        text = " " + "".join(f"{word}{number}" for word, number in zip(WORDS, fill, strict=False)) + WORDS[-1]
        tokens, before, words = form.answer(fill)
        assert tokens == backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(tokens) < form.longest
        for place, number in zip(before, fill, strict=True):
            spelled = form.numbers[number - 1]
            assert tuple(tokens[place + 1 : place + 1 + len(spelled)]) == spelled
            assert not any(words[place + 1 : place + 1 + len(spelled)])
        assert sum(words) == sum(map(len, form.segments))


@torch.no_grad()
def brute_force(lm: Any, form: NumberForm, prompt: list[int], fill: list[int]) -> list[float]:
    """Each slot by itself, each spelling by a pass of its own, in float64."""

    def after(tokens: list[int]) -> torch.Tensor:
        return lm(input_ids=torch.tensor([tokens])).logits[0, -1].double().softmax(0)

    tokens, before, _ = form.answer(fill)
    found = []
    for place in before:
        context = prompt + tokens[: place + 1]
        root = after(context)
        chances = []
        for number in form.numbers:
            chance = root[number[0]]
            longer = [other[1] for other in form.numbers if len(other) > 1 and other[0] == number[0]]
            if len(number) > 1:
                chance = chance * after([*context, number[0]])[number[1]]
            elif longer:
                chance = chance * (1 - after([*context, number[0]])[longer].sum())
            chances.append(float(chance))
        found.append(sum(n * chance for n, chance in enumerate(chances, 1)) / sum(chances))
    return found


def test_expectations_are_those_of_every_spelling_read_by_itself(backbone: Backbone) -> None:
    form = form_of(backbone)
    prompts = backbone.encode(PROMPTS)
    fills = np.random.default_rng(1).integers(1, 11, (3, 3))
    with torch.no_grad():
        told = expected_numbers(backbone.model, form, form.collate(prompts, fills))
    double = load_backbone(backbone.tokenizer.name_or_path, device="cpu").model.double()
    expected = [brute_force(double, form, prompt, fill) for prompt, fill in zip(prompts, fills.tolist(), strict=True)]
    np.testing.assert_allclose(told.numbers.numpy(), expected, atol=1e-4)
    # And they are not all the middle of the scale, whatever is asked.
    assert np.ptp(np.array(expected)) > 1e-3


def test_who_shares_a_batch_changes_nothing(backbone: Backbone) -> None:
    form = form_of(backbone)
    prompts = backbone.encode(PROMPTS)
    fills = form.middle(3)
    with torch.no_grad():
        together = expected_numbers(backbone.model, form, form.collate(prompts, fills))
        alone = [expected_numbers(backbone.model, form, form.collate([prompt], fills[:1])) for prompt in prompts]
    torch.testing.assert_close(together.numbers, torch.cat([one.numbers for one in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.form, torch.stack([one.form for one in alone]).sum(), rtol=1e-4, atol=1e-3)
    assert together.count == sum(int(one.count) for one in alone) == 3 * (sum(map(len, form.segments)) + 1 + 3)


def test_the_loss_of_the_form_is_that_of_its_words_and_of_any_number_between_them(backbone: Backbone) -> None:
    form = form_of(backbone)
    (prompt,) = backbone.encode(PROMPTS[:1])
    fill = [10, 3, 7]
    with torch.no_grad():
        told = expected_numbers(backbone.model, form, form.collate([prompt], np.array([fill])))
        tokens, before, words = form.answer(fill)
        whole = [*prompt, *tokens, form.end]
        chances = backbone.model(input_ids=torch.tensor([whole])).logits[0].double().softmax(1)
    spelled = zip([*tokens, form.end], [*words, True], strict=True)
    wanted = -sum(float(chances[len(prompt) + at - 1, token].log()) for at, (token, word) in enumerate(spelled) if word)
    # Of numbers that begin alike, the shorter takes what the longer leaves: together they are their first token's.
    firsts = sorted({number[0] for number in form.numbers})
    wanted -= sum(float(chances[len(prompt) + place, firsts].sum().log()) for place in before)
    assert float(told.form) == pytest.approx(wanted, rel=1e-4)


def test_gradients_of_expectations_are_those_of_finite_differences(backbone: Backbone) -> None:
    form = form_of(backbone)
    lm = load_backbone(backbone.tokenizer.name_or_path, device="cpu").model.double()
    batch = form.collate(backbone.encode(PROMPTS), np.random.default_rng(1).integers(1, 11, (3, 3)))
    weight = lm.get_decoder().layers[0].self_attn.q_proj.weight
    torch.manual_seed(0)
    direction = torch.randn_like(weight)

    def told(moved: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(moved * direction)
            numbers = expected_numbers(lm, form, batch).numbers
            weight.sub_(moved * direction)
        return numbers

    differences = (told(1e-4) - told(-1e-4)) / 2e-4
    numbers = expected_numbers(lm, form, batch).numbers
    for row in range(3):
        for slot in range(3):
            (gradient,) = torch.autograd.grad(numbers[row, slot], weight, retain_graph=True)
            assert float((gradient * direction).sum()) == pytest.approx(
                float(differences[row, slot]), rel=0.02, abs=2e-4
            )
    assert differences.abs().max() > 0.01


def test_a_tokenizer_that_cannot_tell_numbers_apart_is_told() -> None:
    words = {word: number for number, word in enumerate(["?", "{", "}", ",", ":", '"', "dark", "funny", "long"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    blind = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?"))
    with pytest.raises(UsageError, match=r"from 1 to 10 as one or two tokens of their own.*--guided.top 9"):
        NumberForm.of(blind, WORDS, 10, 0)
