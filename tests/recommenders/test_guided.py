"""Guided blocks: what stands in the columns, whose state gets which block, what of it moves, and what comes back from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raypipe.errors import UsageError
from raypipe.recommenders.attribute_scores import AttributeScores, load_scores, save_scores
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.guided import GuidedOptions, Start, fuse, reduced
from raypipe.recommenders.recommender import Recommender
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.task import RecommenderTask, prepare_training
from raypipe.recommenders.windows import Histories
from raypipe.storage.model_users import read_users, without

ITEMS, USERS, WIDTH = 30, 12, 12
ATTRIBUTES = ("dark", "funny", "long")
MODELS = ("gru4rec", "sasrec", "bert4rec")
NAMED = GuidedOptions(scores="guided/1")
TRAINED = np.arange(ITEMS + 1) > 0


def scores_of(items: int = ITEMS) -> AttributeScores:
    rng = np.random.default_rng(0)
    rows = rng.normal(5, 2, (items + 1, 3)).astype(np.float32)
    keys = np.sort(rng.integers(-(2**62), 2**62, USERS))
    return AttributeScores(ATTRIBUTES, rows, rng.normal(6, 2, (USERS, 3)).astype(np.float32), keys, {"items": items})


def options(**changes: object) -> GuidedOptions:
    return GuidedOptions.model_validate({"scores": "guided/1", **changes})


def histories(scores: AttributeScores) -> Histories:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 9, USERS)
    items = rng.integers(1, ITEMS + 1, int(lengths.sum())).astype(np.int32)
    return Histories(items, lengths.cumsum(), scores.keys[::-1].copy())


def task(folder: Path, model: str, start: Start, scores: AttributeScores, **changes: object) -> RecommenderTask:
    small = {"model": model, "width": WIDTH, "max_length": 8, "hidden": 16, "heads": 2, "dropout": 0.0}
    config = RecommenderConfig.model_validate({**small, "guided": options(**changes)})
    held = np.ones(USERS, np.int32)
    prepare_training(folder, histories(scores), held, {"items": ITEMS, "hash": "x"}, config, 0, start)
    return RecommenderTask(folder)


def built(folder: Path, model: str, **changes: object) -> tuple[RecommenderTask, Recommender, AttributeScores]:
    scores = scores_of()
    start = fuse(scores, options(**changes), WIDTH, None, TRAINED, 0)
    made = task(folder, model, start, scores, **changes)
    found = made.build()
    assert isinstance(found, Recommender)
    return made, found, scores


@pytest.mark.parametrize("model", MODELS)
def test_blocks_that_stay_in_float32_are_no_hindrance_to_training_in_bfloat16(model: str, tmp_path: Path) -> None:
    """As DeepSpeed casts: parameters alone."""
    made, found, _ = built(tmp_path, model)
    for weight in found.parameters():
        weight.data = weight.data.bfloat16()
    loss = found(made.batch(0, 0, 0, 1, 4))
    loss.backward()
    assert loss.isfinite()
    assert found.item_states().dtype == torch.bfloat16
    made.save(found.state_dict(), tmp_path / "out")
    loaded, _ = load_recommender(tmp_path / "out")
    assert torch.equal(loaded.user_block, found.user_block.float())


def test_scores_stand_in_standard_deviations_of_their_own_and_what_was_not_read_in_the_middle() -> None:
    scores = scores_of()
    scores.items[4, 1] = scores.users[2, 0] = np.nan
    scores.items[:, 2] = 7  # all alike but for rounding: tells nothing
    scores.items[::3, 2] += 1e-5
    scores.items[9, 0] = 1000
    items, users = scores.normalised(clip=3)
    for column in (0, 1):
        for found, rows in ((items[1:], scores.items[1:]), (users, scores.users)):
            known = rows[:, column].astype(np.float64)
            expected = np.nan_to_num(((known - np.nanmean(known)) / np.nanstd(known)).clip(-3, 3))
            np.testing.assert_allclose(found[:, column], expected, rtol=1e-4, atol=1e-5)
    assert items[9, 0] == 3
    assert items[4, 1] == users[2, 0] == 0
    assert not items[:, 2].any()
    assert not users[:, 2].any()
    assert scores.telling.tolist() == [True, True, False]
    assert not items[0].any()


def test_the_reduction_is_that_of_the_trained_items_and_keeps_what_varies() -> None:
    rng = np.random.default_rng(2)
    plane = rng.normal(size=(ITEMS + 1, 2)) @ rng.normal(size=(2, 6))
    trained = TRAINED & (np.arange(ITEMS + 1) % 5 > 0)
    # What was never trained is far off the plane, and must not turn it.
    vectors = np.where(trained[:, None], plane, rng.normal(0, 50, plane.shape)).astype(np.float32)
    found = reduced(vectors, 2, trained)
    apart = [np.linalg.norm(rows[trained][:, None] - rows[trained][None], axis=2) for rows in (vectors, found)]
    np.testing.assert_allclose(apart[1], apart[0], rtol=1e-4, atol=1e-4)
    assert not found[0].any()
    with pytest.raises(UsageError, match="have 6 dimensions to be reduced to 7"):
        reduced(vectors, 7, trained)


def test_blocks_are_as_long_as_what_is_beside_them_and_controls_hold_what_they_say() -> None:
    scores = scores_of()
    base = np.random.default_rng(3).normal(0, 4, (ITEMS + 1, WIDTH)).astype(np.float32)
    found = {
        block: fuse(scores, options(block=block, scale=0.5), WIDTH, base, TRAINED, 0)
        for block in ("scores", "shuffled", "random", "none")
    }
    blocks = {name: start.blocks for name, start in found.items()}
    assert all(block is not None for block in blocks.values())
    beside = np.linalg.norm(found["scores"].table[1:], axis=1).mean()
    for name in ("scores", "shuffled", "random"):
        assert np.linalg.norm(blocks[name].items[1:], axis=1).mean() == pytest.approx(0.5 * beside, rel=1e-4)
        assert blocks[name].users.shape == (USERS, 3)
    plain, shuffled = blocks["scores"].items[1:], blocks["shuffled"].items[1:]
    np.testing.assert_allclose(np.sort(shuffled, axis=0), np.sort(plain, axis=0), rtol=1e-5)
    assert not np.allclose(shuffled, plain)
    assert abs(np.corrcoef(blocks["random"].items[1:].ravel(), plain.ravel())[0, 1]) < 0.3
    assert not blocks["none"].items.any()
    assert len(blocks["none"].users) == 0
    for start in found.values():
        np.testing.assert_array_equal(start.table, found["scores"].table)
        assert start.table.shape[1] + start.blocks.items.shape[1] == WIDTH


def test_items_and_base_of_a_smaller_catalogue_leave_the_rest_in_the_middle() -> None:
    start = fuse(scores_of(ITEMS - 4), NAMED, WIDTH, None, TRAINED, 0)
    assert start.blocks is not None
    assert start.blocks.items.shape == (ITEMS + 1, 3)
    assert not start.blocks.items[-4:].any()
    with pytest.raises(UsageError, match="3 wide, and 3 attributes leave nothing"):
        fuse(scores_of(), NAMED, 3, None, TRAINED, 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("states", ["added", "alone"])
def test_the_score_is_that_of_the_state_and_that_of_the_two_blocks(name: str, states: str, tmp_path: Path) -> None:
    made, model, scores = built(tmp_path, name, states=states)
    model.eval()
    lists = [[3, 1, 4, 1], [5, 9, 2], [6, 5]]
    strangers = Sequences.of(lists)
    stranger = int(scores.keys[0]) + 1
    keys = torch.tensor([int(scores.keys[7]), stranger, int(scores.keys[2])])
    known = Sequences(strangers.items, strangers.lengths, keys)
    blocks = np.stack([model.user_block[7].detach().numpy(), np.zeros(3), model.user_block[2].detach().numpy()])
    with torch.no_grad():
        plain, personal = model.encode(strangers), model.encode(known)
        scored = model.score(personal)
        table = model.item_states()
    left = WIDTH - 3
    own = plain[:, left:].numpy() if states == "added" else np.zeros((3, 3))
    expected = (
        plain[:, :left] @ table[:, :left].T + torch.from_numpy((own + blocks).astype(np.float32)) @ model.item_block.T
    )
    torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)
    if made.config.model != "bert4rec":
        everywhere = model.encode_all(known).detach()
        torch.testing.assert_close(known.last(everywhere), personal, rtol=1e-5, atol=1e-5)


def steps(made: RecommenderTask, model: Recommender, count: int = 4) -> dict[str, Tensor]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(count):
        loss = model(made.batch(step, 0, 0, 1, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, {"item_block", "user_keys"}),
        ({"users": "frozen"}, {"item_block", "user_keys", "user_block"}),
        ({"items": "trained"}, {"user_keys"}),
        ({"items": "trained", "users": "absent"}, set()),
    ],
    ids=["as published", "users frozen", "items trained", "no users"],
)
def test_only_what_is_said_to_be_trained_moves(
    name: str, changes: dict[str, str], stays: set[str], tmp_path: Path
) -> None:
    made, model, _ = built(tmp_path, name, **changes)
    before = steps(made, model)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name]) and tensor.numel()}
    assert same == stays
    made.save(model.state_dict(), tmp_path / "out")
    loaded, card = load_recommender(tmp_path / "out")
    assert card.blocks == (3, 0 if "absent" in changes.values() else USERS)
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("states", ["added", "alone"])
def test_who_is_forgotten_is_scored_as_a_stranger_and_everybody_else_as_before(
    name: str, states: str, tmp_path: Path
) -> None:
    made, model, scores = built(tmp_path, name, states=states)
    made.save(model.state_dict(), tmp_path / "out")
    rows = read_users(tmp_path / "out")
    assert rows is not None
    before, _ = load_recommender(tmp_path / "out")
    after, card = load_recommender(tmp_path / "out", users=without(rows, scores.keys[[3, 5]]))
    assert card.blocks == (3, USERS)
    lists = [[1 + n, 9, 2 + n] for n in range(USERS)]

    def states_of(model: Recommender, keys: np.ndarray) -> Tensor:
        sequences = Sequences.of(lists)
        with torch.no_grad():
            return model.encode(Sequences(sequences.items, sequences.lengths, torch.from_numpy(keys)))

    strangers = scores.keys.copy()
    strangers[[3, 5]] += 1
    assert torch.equal(states_of(after, scores.keys), states_of(before, strangers))
    assert not torch.equal(states_of(after, scores.keys), states_of(before, scores.keys))


def test_users_keep_their_keys_through_every_cut_of_a_history() -> None:
    mine = histories(scores_of())
    lengths = np.where(np.arange(USERS) % 4 == 0, 1, mine.lengths)
    short = mine.take(mine.starts, lengths)
    np.testing.assert_array_equal(short.users, mine.users)
    left = short.without_last(1)
    warm = left.lengths > 0
    assert not warm.all()
    np.testing.assert_array_equal(left.users[warm], mine.users[warm])
    again = left.within(ITEMS // 2).take(left.within(ITEMS // 2).starts, left.within(ITEMS // 2).lengths)
    some = again.lengths > 0
    np.testing.assert_array_equal(again.users[some], mine.users[some])
    rows = np.array([7, 2, 5])
    np.testing.assert_array_equal(mine.take(mine.ends[rows] - 2, np.array([2, 2, 2])).users, mine.users[rows])


def test_a_model_without_blocks_knows_no_users(tmp_path: Path) -> None:
    plain = RecommenderConfig(width=WIDTH, hidden=16, max_length=8)
    prepare_training(
        tmp_path, histories(scores_of()), np.ones(USERS, np.int32), {"items": ITEMS, "hash": "x"}, plain, 0
    )
    made = RecommenderTask(tmp_path)
    assert "users" not in made.batch(0, 0, 0, 1, 4)
    assert not {"item_block", "user_block", "user_keys"} & set(made.build().state_dict())


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="without `scores` there are no columns to fill"):
        GuidedOptions(base="sasrec", block="random")
    with pytest.raises(ValidationError, match=r"guided is for gru4rec, sasrec, bert4rec, and the model is mf"):
        RecommenderConfig(model="mf", guided=GuidedOptions(base="sasrec"))


def test_scores_come_back_from_their_files_and_others_are_told(tmp_path: Path) -> None:
    scores = scores_of()
    save_scores(tmp_path / "scores", scores)
    again = load_scores(tmp_path / "scores")
    assert again.names == scores.names
    assert again.catalogue == {"items": ITEMS}
    np.testing.assert_array_equal(again.items, scores.items)
    np.testing.assert_array_equal(again.keys, scores.keys)
    (tmp_path / "scores/scores.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="are damaged"):
        load_scores(tmp_path / "scores")
    with pytest.raises(UsageError, match="holds no scores"):
        load_scores(tmp_path)


def test_where_attributes_decide_guided_vectors_beat_reduced_ones_noise_and_another_item_s_scores(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(5)
    items, users, kinds = 300, 60, 10
    kind = rng.integers(0, kinds, items + 1)
    rows = np.eye(kinds, dtype=np.float32)[kind] * 6 + 2 + rng.normal(0, 1, (items + 1, kinds)).astype(np.float32)
    likes = rng.integers(0, kinds, users)
    # Four events of one kind each, so that most items are seen once or never, and one more that is asked for.
    chosen = np.stack([rng.choice(np.flatnonzero(kind[1:] == liked) + 1, 5, replace=False) for liked in likes])
    keys = np.arange(users)
    scores = AttributeScores(
        tuple("abcdefghij"), rows, np.stack([rows[mine[:4]].mean(0) for mine in chosen]), keys, {"items": items}
    )
    seen = Histories(chosen[:, :4].ravel().astype(np.int32), np.full(users, 4).cumsum(), keys)
    small = {"model": "sasrec", "width": 16, "max_length": 8, "hidden": 32, "dropout": 0.2, "layers": 1}

    def trained(name: str, base: np.ndarray | None, **changes: object) -> tuple[float, np.ndarray]:
        guided = options(**changes) if base is not None else GuidedOptions()
        config = RecommenderConfig.model_validate({**small, "guided": guided})
        start = fuse(scores, guided, 16, base, np.arange(items + 1) > 0, 0) if base is not None else None
        targets = chosen[:, 4].astype(np.int32)
        prepare_training(tmp_path / name, seen, targets, {"items": items, "hash": "x"}, config, 0, start)
        made = RecommenderTask(tmp_path / name)
        torch.manual_seed(0)
        model = made.build()
        assert isinstance(model, Recommender)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(40):
            loss = model(made.batch(step, 0, 0, 1, 16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total, count = made.validate(model, 0, 1)
        return total / count, model.item_states().detach().numpy()

    full, base = trained("full", None)
    found = {block: trained(block, base, block=block, scale=2)[0] for block in ("scores", "shuffled", "random", "none")}
    assert found["scores"] > 1.5 * max(full, *(value for name, value in found.items() if name != "scores"))
