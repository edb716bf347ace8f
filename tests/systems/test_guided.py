"""Guided refinement's questions, answers and tuning: what is asked, what is read, and that only what is said to moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raypipe.engines.engine import Capabilities, Outcome, OutcomeError
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard, LoraOptions, load_adapter
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.recommenders.attribute_scores import AttributeScores
from raypipe.recommenders.recommender import weights_hash
from raypipe.systems.guided import GuidedConfig, GuidedPrompts, Rating
from raypipe.systems.guided_attributes import (
    CATALOGUE,
    Attribute,
    Domain,
    derived_attributes,
    domains,
    find_attributes,
)
from raypipe.systems.guided_reading import ParseCounts, RatingPrompts, ranking_of_scores, read_expected, read_written
from raypipe.systems.guided_training import TuningTask, prepare_tuning, recommendation_loss

KINDS = ("dark", "funny")
ITEMS, USERS = 24, 60
NAMES = ("grim", "merry")


def planted() -> Catalogue:
    """Every item's text has one of two words; what it is called tells nothing."""
    return Catalogue(
        [f"Film {n}" for n in range(1, ITEMS + 1)],
        [{"kind": [KINDS[n % 2]]} for n in range(ITEMS)],
        [f"A {KINDS[n % 2]} tale." for n in range(ITEMS)],
    )


def attributes() -> tuple[Attribute, ...]:
    return tuple(Attribute(name=name, description=f"how {name}", low="not", high="very") for name in NAMES)


def rating_of(**options: object) -> Rating:
    config = GuidedConfig.model_validate({"described": False, "history": 3, **options})
    return Rating(config, attributes(), planted())


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    rating = rating_of()
    numbers = [f'{{"grim": {n}, "merry": {n}}}' for n in range(1, 11)]
    texts = [*rating.item_lines(), rating.item_prompt("").text, rating.user_prompt([]).text, *numbers]
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=256), train_tokenizer(texts * 3, [], [], 500))
    return str(folder)


@pytest.fixture
def backbone(lm: str) -> Backbone:
    return load_backbone(lm, device="cpu")


@pytest.mark.parametrize("domain", ["movies", "clothing", "games"])
def test_a_domain_has_attributes_with_both_ends_of_a_scale(domain: str) -> None:
    assert domain in domains()
    found = find_attributes(domain, planted(), 10)
    assert 8 <= len(found) <= 12
    for one in found:
        assert len({one.name, one.description, one.low, one.high}) == 4
        assert "\n" not in one.description


def test_a_file_of_attributes_is_read_and_what_is_none_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "attributes:\n- {name: a, description: b, low: c, high: d}\n- {name: e, description: f, low: g, high: h}\n"
    )
    assert [one.name for one in find_attributes(str(mine), planted(), 10)] == ["a", "e"]
    with pytest.raises(UsageError, match=r"no domain 'music'.*Name clothing, games, movies, catalogue"):
        find_attributes("music", planted(), 10)
    mine.write_text("attributes:\n- {name: a}\n")
    with pytest.raises(UsageError, match=r"holds no list of attributes: attributes.0.description: Field required"):
        find_attributes(str(mine), planted(), 10)
    with pytest.raises(ValidationError, match="two attributes have one name"):
        Domain(attributes=attributes()[:1] * 2)


def test_a_catalogue_s_own_words_make_attributes_that_tell_its_kinds_apart() -> None:
    words = {"dark": "grave shadow sorrow", "funny": "joke laughter clown", "calm": "river meadow breeze"}
    catalogue = Catalogue(
        [f"Film {n}" for n in range(30)],
        [{"kind": [list(words)[n % 3]]} for n in range(30)],
        [f"The {words[list(words)[n % 3]]} once more" for n in range(30)],
    )
    found = derived_attributes(catalogue, 3)
    assert found == find_attributes(CATALOGUE, catalogue, 3)
    for kind, told in words.items():
        mine = [one for one in found if set(one.name.split()) <= {kind, *told.split()}]
        assert len(mine) == 1
    with pytest.raises(UsageError, match="do not tell them apart"):
        derived_attributes(Catalogue(["a"] * 9, [{}] * 9, [""] * 9), 3)


def test_a_question_shows_the_item_or_the_last_items_and_the_attributes() -> None:
    rating = rating_of(described=True)
    asked = rating.item_prompt(rating.item_lines()[3]).text
    assert "title: Film 4; kind: funny; text: A funny tale." in asked
    assert "- grim: how grim (1 not, 10 very)\n- merry: how merry" in asked
    assert rating.words == ['{"grim": ', ', "merry": ', "}"]
    short = rating_of(text_characters=0)
    assert "tale" not in short.item_prompt(short.item_lines()[3]).text
    for wrong in ("on {top}", "{items} on {top} {attributes} {attributes}", "{items} of {user} on {top}"):
        with pytest.raises(ValidationError, match="each once, and no other"):
            GuidedPrompts(user=wrong)
    with pytest.raises(ValidationError, match="trains nothing"):
        GuidedConfig(lora=None)


def test_a_question_may_leave_the_attributes_to_its_answer() -> None:
    plain = GuidedPrompts(item="{item}, 1 to {top}:", user="{items}\n1 to {top}:")
    rating = rating_of(prompts=plain, described=False)
    assert rating.item_prompt("Film 4").text == "Film 4, 1 to 10:"
    assert rating.user_prompt(["Film 4", "Film 5"]).text == "Film 4\nFilm 5\n1 to 10:"
    assert rating.words == ['{"grim": ', ', "merry": ', "}"]
    for given in ({"described": True}, {"described": False, "reading": "parsed"}):
        with pytest.raises(ValidationError, match="put the mark in, or set described to false and reading to expected"):
            GuidedConfig.model_validate({"prompts": plain, **given})


def test_users_are_shown_by_as_many_last_items_as_there_is_room_for(backbone: Backbone) -> None:
    rating = rating_of()
    questions = RatingPrompts(rating, backbone)
    (asked,) = questions.of_users([[1, 2, 3, 4, 5]])
    assert [f"Film {n};" in asked.text for n in range(1, 6)] == [False, False, True, True, True]
    lines = rating.short_lines()
    frame = len(backbone.encode([rating.user_prompt([]).text])[0])
    each = backbone.count_tokens([f"{lines[4]}\n"])[0]
    (less,) = rating.user_prompts(backbone, [[3, 4, 5]], lines, frame + 2 * each)
    assert [f"Film {n};" in less.text for n in (3, 4, 5)] == [False, True, True]
    assert len(backbone.encode([less.text])[0]) <= frame + 2 * each
    with pytest.raises(UsageError, match="more than the"):
        rating.user_prompts(backbone, [[3]], lines, frame)
    long = Rating(rating.config, rating.attributes, Catalogue(["word " * 300], [{}], [""]))
    with pytest.raises(UsageError, match="Show less"):
        RatingPrompts(long, backbone).ids(RatingPrompts(long, backbone).of_items())


ANSWERS = {
    '{"grim": 7, "merry": 2}': (7, 2),
    'Sure: {"merry": 2.5, "grim": 10, "other": 3} as asked': (10, 2.5),
    '{"grim": 0, "merry": 3}': (None, 3),
    '{"grim": 11, "merry": "3"}': (None, None),
    '{"grim": true, "merry": 1}': (None, 1),
    '{"grim": 7, "merry": ': (None, None),
    "no": (None, None),
    "[7, 2]": (None, None),
}


@pytest.mark.parametrize(("text", "expected"), ANSWERS.items())
def test_what_is_no_number_of_the_scale_is_missing_and_never_guessed(
    text: str, expected: tuple[float | None, float | None]
) -> None:
    found = rating_of().parsed(text)
    assert [None if np.isnan(value) else float(value) for value in found] == list(expected)


class Scripted:
    """Answers in turn."""

    capabilities = Capabilities()
    context = 512

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes

    def generate(self, prompts, decoding, choices=None):
        yield from self.outcomes


def test_answers_that_cannot_be_parsed_are_counted_by_reason() -> None:
    outcomes = [
        Outcome(2, '{"grim": 3, "merry": 4}', finish_reason="stop"),
        Outcome(0, '{"grim": 3, "merry": ', finish_reason="length"),
        Outcome(1, "I would rather not.", finish_reason="stop"),
        Outcome(3, '{"grim": 9}', finish_reason="stop"),
        Outcome(4, error=OutcomeError("prompt_too_long", "too long")),
    ]
    rating, written = rating_of(), ParseCounts()
    found = np.zeros((5, 2), np.float32)
    for places, values in read_written(Scripted(outcomes), rating, [rating.item_prompt("x")] * 5, 9, written):
        found[places] = values
    assert (written.answers, written.unparsed, written.missing) == (5, 3, 1)
    assert written.reasons == {"unended": 1, "malformed": 1, "prompt_too_long": 1}
    np.testing.assert_array_equal(found, [[np.nan] * 2, [np.nan] * 2, [3, 4], [9, np.nan], [np.nan] * 2])


@pytest.mark.parametrize("kind", ["sampled_softmax", "bpr"])
def test_the_recommendation_loss_is_that_of_a_plain_loop_in_float64(kind: str) -> None:
    rng = np.random.default_rng(0)
    users, positives, negatives = (rng.uniform(1, 10, (rows, 3)) for rows in (4, 4, 5))
    same = np.zeros((4, 5), bool)
    same[1, 2] = same[3, 0] = True
    items = np.concatenate([positives, negatives])
    u, p, n = (
        ((rows - among.mean(0)) / among.std(0)).clip(-3, 3)
        for rows, among in ((users, users), (positives, items), (negatives, items))
    )
    wanted = 0.0
    for row in range(4):
        own = u[row] @ p[row] / 3**0.5
        others = np.array([u[row] @ n[column] / 3**0.5 for column in range(5) if not same[row, column]])
        if kind == "bpr":
            wanted += np.log1p(np.exp(others - own)).mean()
        else:
            wanted += np.log(np.exp(own) + np.exp(others).sum()) - own
    told = recommendation_loss(
        *(torch.from_numpy(rows) for rows in (users, positives, negatives)),
        torch.from_numpy(same),
        kind,  # type: ignore[arg-type]
    )
    assert float(told) == pytest.approx(wanted, rel=1e-9)


def test_items_that_are_scored_ever_more_alike_lower_no_loss() -> None:
    rng = np.random.default_rng(0)
    scores = [torch.from_numpy(rng.uniform(1, 10, (rows, 3))) for rows in (4, 4, 5)]
    same = torch.zeros((4, 5), dtype=torch.bool)
    losses = [
        float(recommendation_loss(*(5 + share * (one - 5) for one in scores), same, "sampled_softmax"))
        for share in (1, 0.1, 0.01)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-9)


def test_users_that_are_scored_ever_more_like_the_mean_item_lower_no_loss() -> None:
    rng = np.random.default_rng(0)
    users, positives, negatives = (torch.from_numpy(rng.uniform(4, 6, (rows, 3))) for rows in (4, 4, 5))
    same, mean = torch.zeros((4, 5), dtype=torch.bool), torch.cat([positives, negatives]).mean(0)
    losses = [
        float(recommendation_loss(mean + share * (users - mean), positives, negatives, same, "sampled_softmax"))
        for share in (1, 0.1, 0.01)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


def tuning(lm: str, folder: Path, **options: object) -> tuple[TuningTask, RatingPrompts, np.ndarray]:
    """Users who like one kind each, and what they chose next."""
    rating = rating_of(lora=LoraOptions(rank=4, dropout=0.0).model_dump(), negatives=8, **options)
    backbone = load_backbone(lm, device="cpu")
    questions = RatingPrompts(rating, backbone)
    rng = np.random.default_rng(0)
    # Item n is of kind (n − 1) % 2.
    liked = np.arange(USERS) % 2
    chosen = np.stack([rng.choice(np.arange(1 + kind, ITEMS + 1, 2), 4, replace=False) for kind in liked])
    card = AdapterCard(rating.config.adapter, {}, "lm-hash", "")
    prepare_tuning(
        folder,
        questions.ids(questions.of_items()),
        questions.ids(questions.of_users(chosen[:, :3].tolist())),
        chosen[:, 3].tolist(),
        questions.form,
        lm,
        card,
        rating.config,
        seed=0,
    )
    return TuningTask(folder), questions, chosen


def trained(task: TuningTask, steps: int, lr: float = 0.01) -> nn.Module:
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    for step in range(steps):
        loss = model(task.batch(step, 0, 0, 1, 12))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def scores_by(model: nn.Module, questions: RatingPrompts, chosen: np.ndarray) -> tuple[AttributeScores, np.ndarray]:
    def read(prompts: list) -> np.ndarray:
        found = np.zeros((len(prompts), len(NAMES)), np.float32)
        for places, values in read_expected(model, questions.form, questions.ids(prompts), 600):
            found[places] = values
        return found

    items = read(questions.of_items())
    table = np.concatenate([np.full((1, len(NAMES)), np.nan, np.float32), items])
    users = read(questions.of_users(chosen[:, :3].tolist()))
    return AttributeScores(NAMES, table, users, np.arange(len(users)), {}), users


def test_tuned_scores_tell_the_planted_kinds_apart_and_recommend_and_only_the_update_moves(
    lm: str, tmp_path: Path
) -> None:
    task, questions, chosen = tuning(lm, tmp_path / "data")
    before = weights_hash(load_backbone(lm, device="cpu").model)
    untuned = ranking_of_scores(*scores_by(load_backbone(lm, device="cpu").model, questions, chosen), chosen[:, 3])
    model = trained(task, 60)
    base = {name.replace(".base_layer", ""): weight for name, weight in model.adapted.lm.state_dict().items()}
    plain = load_backbone(lm, device="cpu").model
    assert all(torch.equal(base[name], weight) for name, weight in plain.state_dict().items())
    assert weights_hash(plain) == before
    kept = {name: weight for name, weight in model.named_parameters() if task.keeps(name)}
    assert kept
    assert all("lora_" in name for name in kept)

    task.save({name: weight.detach() for name, weight in kept.items()}, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", load_backbone(lm, device="cpu"), "lm-hash").lm
    scores, users = scores_by(again, questions, chosen)
    np.testing.assert_allclose(scores.items, scores_by(model.adapted.lm, questions, chosen)[0].items, atol=1e-5)
    dark, funny = scores.items[1::2], scores.items[2::2]
    apart = np.abs(dark.mean(0) - funny.mean(0)) / (dark.std(0) + funny.std(0) + 1e-3)
    assert apart.max() > 2
    found = ranking_of_scores(scores, users, chosen[:, 3])
    # Ten of the twelve items of the kind.
    assert found["scores HR@10"] > 0.7
    assert found["scores HR@10"] > untuned["scores HR@10"] + 0.15
    assert found["shuffled users: scores HR@10"] < 0.25
    assert found["chance: scores HR@10"] == pytest.approx(10 / ITEMS, abs=1e-4)


def test_a_tuned_model_writes_what_can_be_parsed(lm: str, tmp_path: Path) -> None:
    task, questions, _ = tuning(lm, tmp_path / "data", format_weight=5.0)
    model = trained(task, 60)
    for prompt in questions.ids(questions.of_items()[:4]):
        asked = {"input_ids": torch.tensor([prompt]), "max_new_tokens": questions.form.longest, "do_sample": False}
        out = model.adapted.lm.generate(**asked)[0, len(prompt) :].tolist()
        assert out[-1] == questions.form.end
        (text,) = questions.backbone.decode([out])
        assert not np.isnan(questions.rating.parsed(text)).any(), text


def test_batches_are_a_function_of_the_step_and_ranks_share_users_and_others(lm: str, tmp_path: Path) -> None:
    task, _, _ = tuning(lm, tmp_path)
    whole, again = task.batch(3, 0, 0, 1, 12), TuningTask(tmp_path).batch(3, 0, 0, 1, 12)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    halves = [task.batch(3, 0, rank, 2, 12) for rank in (0, 1)]
    assert sorted(torch.cat([half["targets"] for half in halves]).tolist()) == sorted(whole["targets"].tolist())
    assert halves[0]["negatives"].tolist() == halves[1]["negatives"].tolist() == whole["negatives"].tolist()
    assert float(halves[0]["count"]) == 6
    assert task.batch(4, 0, 0, 1, 12)["targets"].tolist() != whole["targets"].tolist()
