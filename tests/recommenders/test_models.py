"""What all recommenders share: states that see only their prefix, batches that change nothing, learning, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raypipe.errors import UsageError
from raypipe.metrics.lists import collapse
from raypipe.recommenders.attention import rotated
from raypipe.recommenders.checkpoint import Card, load_recommender, save_recommender
from raypipe.recommenders.config import RecommenderConfig
from raypipe.recommenders.dreamrec import DreamRec, DreamRecOptions, noise_schedule
from raypipe.recommenders.losses import bce_loss
from raypipe.recommenders.noise import seeded_normal
from raypipe.recommenders.recommender import Recommender, freeze, weights_hash
from raypipe.recommenders.sequences import Sequences
from raypipe.recommenders.windows import Histories, Windows

ITEMS = 40
MODELS = ["gru4rec", "caser", "sasrec", "sasrec rotary", "bert4rec", "dreamrec", "mf"]
CAUSAL = [name for name in MODELS if name != "bert4rec"]


def config(name: str, **options: object) -> RecommenderConfig:
    small = {"width": 16, "max_length": 12, "hidden": 24, "heads": 2, "dreamrec": {"steps": 20}}
    model, *places = name.split()
    return RecommenderConfig.model_validate({"model": model, "places": (places or ["learned"])[0], **small, **options})


def some_histories() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, ITEMS + 1, length).tolist() for length in (5, 30, 1, 12, 13)]


@pytest.mark.parametrize("name", MODELS)
def test_a_state_does_not_depend_on_who_else_is_in_the_batch(name: str) -> None:
    model = config(name).build(ITEMS).eval()
    together = model.encode(Sequences.of(some_histories()))
    alone = torch.cat([model.encode(Sequences.of([items])) for items in some_histories()])
    assert together.shape == (5, 16)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_state_moves_when_the_future_is_edited(name: str) -> None:
    model = config(name).build(ITEMS).eval()
    history = some_histories()[3]
    edited = [*history[:7], *(ITEMS + 1 - item for item in history[7:])]
    before, after = (model.encode_all(Sequences.of([items])) for items in (history, edited))
    torch.testing.assert_close(before[:7], after[:7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[7:], after[7:], atol=1e-3)
    # And a state within a longer sequence is the state of the prefix by itself.
    prefix = model.encode(Sequences.of([history[:7]]))
    torch.testing.assert_close(before[6:7], prefix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_sees_as_many_items_as_the_protocol_says(name: str) -> None:
    chosen = config(name)
    model, history = chosen.build(ITEMS).eval(), some_histories()[1]
    for back, is_seen in ((chosen.items_seen, True), (chosen.items_seen + 1, False)):
        edited = list(history)
        edited[-back] = edited[-back] % ITEMS + 1
        before, after = (model.encode(Sequences.of([items])) for items in (history, edited))
        assert torch.allclose(before, after, rtol=0, atol=1e-7) != is_seen


def test_what_training_makes_small_is_told() -> None:
    told = {name: config(name).objective for name in ("sasrec", "bert4rec", "dreamrec")}
    assert told == {
        "sasrec": "softmax",
        "bert4rec": "softmax of masked items",
        "dreamrec": "squared error of item vectors",
    }
    rounded = config("dreamrec", dreamrec={"steps": 20, "rounding": 0.5})
    assert rounded.objective == "squared error of item vectors and 0.5 × softmax"


def test_bert4rec_has_a_negative_for_each_masked_item() -> None:
    batch = {"items": torch.arange(1, 13), "lengths": torch.tensor([5, 7]), "negatives": torch.arange(12, 0, -1)}
    for masked in (1.0, 0.4):
        model = config("bert4rec", masked=masked, loss={"kind": "bce"}).build(ITEMS).eval()
        torch.manual_seed(1)
        hidden = torch.rand(12) < masked
        hidden[[4, 11]] = True
        states = model.head(model._states(Sequences.of_batch(batch), hidden)[hidden])
        expected = bce_loss(states, model.item_states(), batch["items"][hidden], batch["negatives"][hidden])
        torch.manual_seed(1)
        torch.testing.assert_close(model.loss(batch), expected / hidden.sum())


def test_bert4rec_has_no_states_of_positions() -> None:
    with pytest.raises(NotImplementedError, match="one state per prefix"):
        config("bert4rec").build(ITEMS).encode_all(Sequences.of([[1, 2]]))


@pytest.mark.parametrize("name", MODELS)
def test_only_the_last_items_count(name: str) -> None:
    model = config(name).build(ITEMS).eval()
    long = some_histories()[1]
    assert torch.equal(model.encode(Sequences.of([long])), model.encode(Sequences.of([long[-12:]])))


@pytest.mark.parametrize("name", ["caser", "sasrec", "gru4rec", "bert4rec", "dreamrec"])
def test_order_matters_to_all_but_mf(name: str) -> None:
    items = [3, 9, 1, 30, 17, 22]
    model, mf = config(name).build(ITEMS).eval(), config("mf").build(ITEMS).eval()
    assert not torch.allclose(model.encode(Sequences.of([items])), model.encode(Sequences.of([items[::-1]])), atol=1e-4)
    torch.testing.assert_close(mf.encode(Sequences.of([items])), mf.encode(Sequences.of([items[::-1]])))


def next_of(item: int) -> int:
    return item % ITEMS + 1


def chains(count: int, seed: int) -> list[list[int]]:
    """Histories in which every item is followed by the next one of the catalogue."""
    starts = np.random.default_rng(seed).integers(0, ITEMS, count)
    return [[(int(start) + step) % ITEMS + 1 for step in range(10)] for start in starts]


@pytest.mark.parametrize("name", ["caser", "sasrec", "sasrec rotary", "gru4rec", "bert4rec"])
def test_a_planted_answer_is_learnt_and_shuffled_targets_are_not(name: str) -> None:
    def trained(shuffled: bool) -> Recommender:
        model = config(name, dropout=0.0, masked=0.3).build(ITEMS)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        rng = np.random.default_rng(0)
        for step in range(400 if name == "bert4rec" else 120):
            torch.manual_seed(step)
            lists = chains(32, step)
            if shuffled:
                lists = [rng.permutation(ITEMS)[:10].tolist() for _ in lists]
                lists = [[item + 1 for item in items] for items in lists]
            loss = model.loss(batch_of(model, lists))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    asked = [items[:9] for items in chains(200, 999)]
    answers = torch.tensor([next_of(items[-1]) for items in asked])
    rates = {}
    for shuffled in (False, True):
        model = trained(shuffled)
        best = model.score(model.encode(Sequences.of(asked)))[:, 1:].argmax(1) + 1
        rates[shuffled] = float((best == answers).float().mean())
    assert rates[False] > 0.95
    assert rates[True] < 0.15


def test_bert4rec_has_learnt_every_place_it_is_asked_at() -> None:
    """A prefix that fills the window has its mask in the last place, where training's windows must have had one."""
    model = config("bert4rec", dropout=0.0).build(ITEMS)
    histories = Histories(np.arange(40, dtype=np.int32) % ITEMS + 1, np.array([40]))
    windows = Windows(histories, model.max_length, whole=True)
    for step in range(windows.steps_per_epoch(1)):
        batch = windows.batch(step, 0, 0, 1, 1)
        model.loss(
            {name: torch.from_numpy(getattr(batch, name)) for name in ("items", "targets", "lengths")}
        ).backward()
    (places,) = (weight for weight in model.parameters() if weight.shape[0] == model.max_length)
    assert places.grad is not None
    assert (places.grad.norm(dim=1) > 0).all()


def batch_of(model: Recommender, lists: list[list[int]]) -> dict[str, Tensor]:
    inputs = Sequences.of(lists if not model.causal else [items[:-1] for items in lists])
    targets = Sequences.of([items[1:] for items in lists])
    return {
        "items": inputs.items,
        "lengths": inputs.lengths,
        "targets": targets.items,
        "count": torch.tensor(float(len(targets.items))),
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_gives_the_same_states(name: str, tmp_path: Path) -> None:
    model = config(name).build(ITEMS).eval()
    card = Card(config(name), {"items": ITEMS, "hash": "x"}, [3, 1])
    save_recommender(tmp_path / "model", card, model.state_dict())
    loaded, found = load_recommender(tmp_path / "model")
    histories = Sequences.of(some_histories())
    assert found == card
    assert not loaded.training
    assert torch.equal(loaded.score(loaded.encode(histories)), model.score(model.encode(histories)))


def test_a_checkpoint_that_is_none_or_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no recommender: recommender\.json is missing"):
        load_recommender(tmp_path)
    model = config("sasrec").build(ITEMS)
    save_recommender(tmp_path, Card(config("sasrec"), {"items": ITEMS + 1}, []), model.state_dict())
    with pytest.raises(UsageError, match="another model's: table is"):
        load_recommender(tmp_path)
    for broken in (torch.nan, torch.inf):
        weights = config("sasrec").build(ITEMS + 1).state_dict()
        weights["table"][3, 0] = broken
        save_recommender(tmp_path, Card(config("sasrec"), {"items": ITEMS + 1}, []), weights)
        with pytest.raises(
            UsageError, match=r"damaged: table holds weights that are no finite numbers\. Train it again"
        ):
            load_recommender(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here at all")
    with pytest.raises(UsageError, match="damaged"):
        load_recommender(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda told: told.pop("config"), r"is damaged: recommender\.json has no 'config'\. Train it again"),
        (lambda told: told.pop("format"), r"is damaged: recommender\.json has no 'format'"),
        (lambda told: told["catalogue"].pop("items"), r"is damaged: recommender\.json has no 'items'"),
        (lambda told: told.pop("blocks"), r"is damaged: recommender\.json has no 'blocks'"),
        (lambda told: told.update(blocks=3), r"is damaged: recommender\.json is not one of `raypipe train`"),
        (
            lambda told: told["config"].update(heads_of_tomorrow=2),
            r"does not take: heads_of_tomorrow: .* Upgrade raypipe",
        ),
        (lambda told: told.update(format=2), r"made by a newer raypipe: its format is 2.*Upgrade raypipe"),
    ],
)
def test_a_card_that_is_damaged_or_of_a_newer_raypipe_is_refused(
    change: Callable[[dict[str, Any]], object], problem: str, tmp_path: Path
) -> None:
    save_recommender(tmp_path, Card(config("sasrec"), {"items": ITEMS}, []), config("sasrec").build(ITEMS).state_dict())
    told = json.loads((tmp_path / "recommender.json").read_text())
    change(told)
    (tmp_path / "recommender.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=problem):
        load_recommender(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_model_stays_what_it_was(name: str) -> None:
    model = freeze(config(name).build(ITEMS))
    before = weights_hash(model)
    with pytest.raises(RuntimeError, match="frozen"):
        model.train()
    model.score(model.encode(Sequences.of(some_histories())))
    assert weights_hash(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert weights_hash(model) != before


def test_an_empty_history_has_no_state() -> None:
    with pytest.raises(ValueError, match="empty history"):
        Sequences.of([[1], []])


def test_rotary_places_make_products_depend_on_distance_alone() -> None:
    queries, keys = torch.randn(2, 8), torch.randn(2, 8)
    turned = [rotated(vectors[:, None, None].expand(2, 1, 9, 8)) for vectors in (queries, keys)]
    products = (turned[0][:, 0] @ turned[1][:, 0].transpose(1, 2)).double()
    for distance in range(-8, 9):
        along = products.diagonal(distance, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products[:, 0, 0], (queries * keys).sum(1).double(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(products[:, 0, 0], products[:, 0, 3], atol=1e-2)


@pytest.mark.parametrize("kind", ["exp", "cosine", "linear"])
def test_a_schedule_ends_in_noise(kind: str) -> None:
    betas = noise_schedule(kind, 500)  # type: ignore[arg-type]
    kept = (1 - betas).cumprod(0)
    assert ((betas > 0) & (betas < 1)).all()
    assert kept[0] > 0.99
    assert kept[-1] < 0.01


def test_noise_is_normal_and_a_function_of_the_seed_alone() -> None:
    seeds = torch.arange(2000) * 7919 + 5
    noise = seeded_normal(seeds, 3, 64)
    assert torch.equal(noise[100:101], seeded_normal(seeds[100:101], 3, 64))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(noise[:, :2].T)[0, 1]) < 0.08
    assert not torch.equal(noise, seeded_normal(seeds, 4, 64))
    counted = (noise.abs() > 1.96).float().mean()
    assert counted == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(("sampling_steps", "layers"), [(None, 1), (7, 1), (7, 2)])
def test_an_oracle_is_ddpm_step_by_step(sampling_steps: int | None, layers: int) -> None:
    """Against algorithm 2 written out for one user in float64."""
    options = DreamRecOptions(steps=20, sampling_steps=sampling_steps, guidance=1.5, denoiser_layers=layers)
    model = config("dreamrec", dreamrec=options.model_dump()).build(ITEMS).double().eval()
    assert isinstance(model, DreamRec)
    state = model.encode(Sequences.of([[1, 2, 3]])).detach()
    seed = torch.tensor([11])
    kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - noise_schedule("linear", 20)).cumprod(0)])
    times = [round(t) for t in np.linspace(20, 1, sampling_steps or 20)]
    x = seeded_normal(seed, 0, 16).double()
    for draw, (t, before) in enumerate(zip(times, [*times[1:], 0], strict=True), start=1):
        guided = model._denoised(x, state, torch.tensor([t]))
        free = model._denoised(x, model.nobody[None], torch.tensor([t]))
        clean = 2.5 * guided - 1.5 * free
        beta = 1 - kept[t] / kept[before]
        mean = kept[before].sqrt() * beta / (1 - kept[t]) * clean
        mean += (1 - beta).sqrt() * (1 - kept[before]) / (1 - kept[t]) * x
        variance = (1 - kept[before]) / (1 - kept[t]) * beta
        x = mean + (variance.sqrt() * seeded_normal(seed, draw, 16).double() if before else 0)
    torch.testing.assert_close(model.oracle(state, seed), x.detach(), rtol=1e-8, atol=1e-8)


def test_one_step_without_guidance_is_the_denoisers_own_answer() -> None:
    options = DreamRecOptions(steps=20, sampling_steps=1, guidance=0, denoiser_layers=2)
    model = config("dreamrec", dreamrec=options.model_dump()).build(ITEMS).eval()
    assert isinstance(model, DreamRec)
    states = model.encode(Sequences.of([[1, 2, 3], [4]])).detach()
    seeds = torch.tensor([3, 4])
    expected = model._denoised(seeded_normal(seeds, 0, 16), states, torch.tensor([20, 20]))
    torch.testing.assert_close(model.oracle(states, seeds), expected.detach())


@pytest.mark.parametrize(("rounding", "apart"), [(0.0, False), (1.0, True)])
def test_item_vectors_collapse_unless_they_must_be_told_apart(rounding: float, apart: bool) -> None:
    """Histories in which every item is followed by the next one of the catalogue."""
    options = {"steps": 20, "sampling_steps": 1, "guidance": 0, "normalised": True, "rounding": rounding}
    model = config("dreamrec", dreamrec=options).build(ITEMS).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(200):
            starts = torch.randint(ITEMS, (16, 1), generator=rng)
            chains = (starts + torch.arange(9)) % ITEMS + 1
            items, targets = chains[:, :-1].flatten(), chains[:, 1:].flatten()
            batch = {"items": items, "targets": targets, "lengths": torch.full((16,), 8), "count": torch.tensor(128.0)}
            optimiser.zero_grad()
            model(batch).backward()
            optimiser.step()
    assert (collapse(model.item_states().detach().numpy()) < 0.2) == apart


def test_an_oracle_does_not_depend_on_the_batch() -> None:
    model = config("dreamrec").build(ITEMS).eval()
    states = model.encode(Sequences.of(some_histories()))
    together = model.queries(states)
    alone = torch.cat([model.queries(state[None]) for state in states])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
