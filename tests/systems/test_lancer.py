"""LANCER on planted structure: what is asked and learnt, and that each prompt carries what nothing else does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel

from raypipe.engines.engine import Choices, Decoding
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterCard
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.catalogue import Catalogue
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.language.prefixes import PREFIX
from raypipe.language.prompt import Text, Vectors
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.recommender import weights_hash
from raypipe.recommenders.windows import Histories
from raypipe.systems.lancer import (
    Frame,
    LancerConfig,
    LancerPrompts,
    grounding_figures,
    lists_of,
    ranks_of_lists,
)
from raypipe.systems.lancer_examples import FIRST, LancerExamples, LancerTrainingData, prepare_lancer
from raypipe.systems.lancer_figures import CONTROL, EvaluationSet, rank_figures
from raypipe.systems.lancer_lists import stored_config
from raypipe.systems.lancer_training import LancerLm, LancerTask
from tests.systems.lancer_world import (
    EVENTS,
    ITEMS,
    USERS,
    WIDTH,
    catalogue,
    config_of,
    histories,
    prepared,
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    texts = [*(f" Film {n} ->" for n in range(1, ITEMS + 1)), "title: A person chose, oldest first:", "genre: War"]
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=128), train_tokenizer(texts * 5, [], [], 400))
    return folder


@pytest.fixture(scope="module")
def gpt2(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's kind of language model, which learns positions."""
    folder = Path(shutil.copytree(lm, tmp_path_factory.mktemp("gpt2"), dirs_exist_ok=True))
    tokens = len(load_backbone(str(lm), device="cpu").tokenizer)
    sizes = {"vocab_size": tokens, "n_positions": 128, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def test_a_line_holds_attributes_and_title_and_a_content_the_text_too() -> None:
    told = Catalogue(
        ["Alien", "Dune {title}"], [{"genre": ["Horror", "Sci-Fi"], "brand": ["Fox"]}, {}], ["In space.", "Sand"]
    )
    config = LancerConfig()
    assert config.lines(told) == ["Fox, Horror, Sci-Fi : Alien", "Dune {title}"]
    assert config.contents(told)[0] == "title: Alien; brand: Fox; genre: Horror, Sci-Fi; text: In space."
    assert config_of().lines(told) == ["Alien", "Dune {title}"]
    with pytest.raises(ValidationError, match="needs"):
        LancerPrompts(line="{attributes}")
    # A single beam is no search, and its line would have no probability.
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        LancerConfig(beams=1)
    with pytest.raises(UsageError, match="The adapter lancer cannot be asked"):
        stored_config("lancer", {"options": {"beams": 1}})
    with pytest.raises(ValidationError, match="set first_epochs to 0"):
        LancerConfig(knowledge=False, first_stage="items")


def test_a_question_shows_the_last_items_and_holds_the_vectors_of_the_last_read(lm: Path, tmp_path: Path) -> None:
    world = prepared(lm, tmp_path, shown=2, reads=3, second_stage="frozen")
    world.trained(0)
    writer = world.writer(28).lancer
    (prompt,) = writer.prompts([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    vectors, *words = prompt.segments
    assert [segment.text for segment in words if isinstance(segment, Text)] == [
        "A person chose, oldest first:",
        " Film 3",
        " ->",
        " Film 4",
        " ->",
    ]
    stored = np.load(tmp_path / "vectors.npy")
    assert isinstance(vectors, Vectors)
    np.testing.assert_allclose(vectors.values, stored[[2, 3, 4]], atol=1e-5)
    (framed,) = writer.prompts([[4]], [[4]], Frame(lead="History:", join=","))
    assert framed.words == "History: Film 4,"
    # Of two items one is shown where there is room for one and a half.
    lead, line = writer.tokenizer.count_tokens(["A person chose, oldest first:", " Film 4 ->"])
    tight = replace(writer, room=lead + line + line // 2)
    (cut,) = tight.prompts([[3, 4]], [[3, 4]])
    assert cut.words == "A person chose, oldest first: Film 4 ->"
    with pytest.raises(ValueError, match="without an item"):
        writer.prompts([[]], [[]])


@pytest.mark.parametrize("options", [{}, {"reasoning": False}, {"knowledge": False}], ids=str)
def test_a_stretch_is_as_many_examples_that_share_their_beginning(
    lm: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    world = prepared(lm, tmp_path, learnt=3, shown=20, first_epochs=0, first_stage="both", **options)
    task = world.task()
    model = task.build().eval()

    @torch.no_grad()
    def total(stretches: list[list[int]], batch: dict[str, torch.Tensor] | None = None) -> float:
        told = (
            task.examples.histories(np.array(stretches), read_once=task.config.reads_once) if batch is None else batch
        )
        return float(model({**told, "count": torch.tensor(1.0)}))

    together = total([[5, 4, 3]])
    singles = []
    for first in (4, 5, 6):
        batch = task.examples.histories(np.array([[5, first, 1]]), read_once=task.config.reads_once)
        if world.config.reasoning:
            # What stands before a stretch stands before each of its items.
            before = task.examples.histories(np.array([[5, 4, 1]]), read_once=task.config.reads_once)
            batch |= {name: value for name, value in before.items() if name.startswith((PREFIX, "items"))}
        singles.append(total([], batch))
    assert together == pytest.approx(sum(singles), rel=1e-4)


def test_every_event_but_the_first_is_learnt_once_in_an_epoch_wherever_stretches_begin(
    lm: Path, tmp_path: Path
) -> None:
    task = prepared(lm, tmp_path, validated=1, learnt=3).task()
    # Nine events stand before the cut, of which one validates.
    for offset in range(3):
        found = [
            (row, first + n) for row, first, count in task.examples.stretches(offset).tolist() for n in range(count)
        ]
        assert sorted(found) == [(row, event) for row in range(USERS) for event in range(1, EVENTS - 2)]
    few = LancerExamples(tmp_path, 1).stretches(0)
    assert [first + count for _, first, count in few.tolist()] == [EVENTS - 2] * USERS
    whole, again = task.batch(7, 0, 0, 1, 12), LancerTask(tmp_path, "second", 1000, 10).batch(7, 0, 0, 1, 12)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    halves = [task.batch(7, 0, rank, 2, 12) for rank in (0, 1)]
    assert sum(len(half["tokens"]) for half in halves) == len(whole["tokens"]) == 12
    learnt = int((whole["labels"] >= 0).sum())
    assert [float(half["count"]) for half in halves] == [learnt / 2] * 2


def test_what_is_not_perturbed_is_as_in_training() -> None:
    prompts = LancerPrompts(frame=Frame(lead="So far:", join=";"))
    frames = [(frame.lead, frame.join) for frame in prompts.perturbed_frames]
    assert frames[1:] == [("History:", ";"), ("So far:", ","), ("What comes next?", " |")]
    with pytest.raises(ValidationError, match="a perturbed frame is one of training's"):
        LancerPrompts.model_validate({"frame": {"join": ";"}, "perturbed": [{"join": ";"}]})


def test_training_draws_a_frame_for_each_stretch_and_validation_asks_in_the_first(lm: Path, tmp_path: Path) -> None:
    frames = [{"lead": "History:"}, {"join": ";"}]
    prompts = {"line": "{title}", "perturbed": (), "training": frames}
    task = prepared(lm, tmp_path, learnt=2, validated=1, prompts=prompts).task()
    backbone = load_backbone(str(lm), device="cpu")
    counts = dict.fromkeys(
        ("A person chose, oldest first: Film ->", "History: Film ->", "A person chose, oldest first: Film ;"), 0
    )
    for step in range(20):
        batch = task.batch(step, 0, 0, 1, 12)
        for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
            text = backbone.tokenizer.decode(row[mask == 1])
            lead, join = text.split(" Film")[0], "->" if "->" in text else ";"
            counts[f"{lead} Film {join}"] += 1
    assert sum(counts.values()) == 240
    assert min(counts.values()) > 50
    first = task.examples.histories(np.array([[0, 3, 1]]), read_once=False)
    assert backbone.tokenizer.decode(first["tokens"][0]).startswith("A person chose, oldest first:")
    with pytest.raises(ValidationError, match="one of training's"):
        LancerPrompts(training=(Frame(lead="History:"),))


def test_neither_training_nor_a_question_reads_what_is_held_out(lm: Path, tmp_path: Path) -> None:
    """The event that is asked for, and the one that validates, are another's in one of two worlds."""
    one, other = histories(), histories()
    for at, item in ((-1, 11), (-2, 12)):
        other.items[other.ends + at] = item
    backbone, config = load_backbone(str(lm), device="cpu"), config_of(learnt=3)
    card = AdapterCard(config.adapter, {PREFIX: WIDTH}, checkpoint_hash(lm), "")
    batches = []
    for number, told in enumerate((one, other)):
        texts = LancerTrainingData(config.lines(catalogue()), config.contents(catalogue()), told.without_last(1), 1)
        prepare_lancer(tmp_path / str(number), texts, backbone, str(lm), card, config, seed=0)
        task = LancerTask(tmp_path / str(number), "second", 1000, 1000)
        batches.append([task.batch(step, 0, 0, 1, 12) for step in range(2 * task.steps_per_epoch(12))])
    for mine, theirs in zip(*batches, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = histories()
    other.items[other.ends - 1] = 11
    prefixes = [EvaluationSet(HeldOut.of(told, 1, ITEMS), np.zeros(USERS, bool)).histories() for told in (one, other)]
    assert prefixes[0] == prefixes[1]


def test_a_reasoning_prompt_tells_what_words_do_not_and_is_the_items_that_were_read(lm: Path, tmp_path: Path) -> None:
    before = weights_hash(load_backbone(str(lm), device="cpu").model)
    world = prepared(lm, tmp_path / "whole", first_epochs=0, first_stage="both")
    world.trained(400)
    found = world.figures()
    ablated = prepared(lm, tmp_path / "ablated", reasoning=False, first_epochs=0, first_stage="both")
    ablated.trained(400)
    without = ablated.figures()
    assert weights_hash(load_backbone(str(lm), device="cpu").model) == before
    # Three films of a user's round are left when the last is known, and nobody says which.
    assert found["Recall@5"] > 0.8
    assert found["NDCG@5"] > 0.7
    # What the ablation learns instead hangs on a processor's rounding: .41 on one, below .4 on another.
    assert without["NDCG@5"] < 0.5
    assert found["NDCG@5"] > without["NDCG@5"] + 0.3
    assert found[f"{CONTROL}: NDCG@5"] < 0.5 * found["NDCG@5"]
    assert (found["grounding exact@1"], found["refused"]) == (1.0, 0)


def test_a_knowledge_prompt_makes_contents_likelier_while_the_model_stays(lm: Path, tmp_path: Path) -> None:
    world = prepared(lm, tmp_path, first_stage="items")
    model, losses = world.trained(150, "first", lr=0.02)
    batch = world.task("first").batch(0, 0, 0, 1, ITEMS)
    told = {name: batch[name] for name in ("contents/tokens", "contents/mask", "contents/count")}
    assert isinstance(model, LancerLm)
    prefix, model.adapted.prefix = model.adapted.prefix, None
    with torch.no_grad():
        without = float(model(told))
    model.adapted.prefix = prefix
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert np.mean(losses[-10:]) < 0.6 * without
    plain = load_backbone(str(lm), device="cpu").model
    trained = dict(model.adapted.lm.named_parameters())  # type: ignore[union-attr]
    assert all(torch.equal(weight, trained[name]) for name, weight in plain.named_parameters())
    # The second stage starts from it, and items are represented otherwise than without.
    start = world.task().build()
    weight = start.adapted.prefix.knowledge.embedding.weight  # type: ignore[union-attr]
    torch.testing.assert_close(weight, model.adapted.prefix.knowledge.embedding.weight)  # type: ignore[union-attr]
    assert (tmp_path / FIRST).is_file()


def test_a_frozen_knowledge_prompt_moves_in_no_step_and_a_trained_one_does(lm: Path, tmp_path: Path) -> None:
    moved = {}
    for kind in ("frozen", "trained"):
        world = prepared(lm, tmp_path / kind, second_stage=kind, first_epochs=0, first_stage="both")
        before = world.task().build().adapted.prefix.knowledge.embedding.weight.detach().clone()  # type: ignore[union-attr]
        model, _ = world.trained(3)
        moved[kind] = not torch.equal(before, model.adapted.prefix.knowledge.embedding.weight)  # type: ignore[union-attr]
    assert moved == {"frozen": False, "trained": True}


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"reasoning": False, "second_stage": "frozen"}, False),
        ({"reasoning": False}, True),
        ({"representation": "padding"}, True),
        ({"representation": "padding", "second_stage": "frozen"}, False),
    ],
)
def test_the_second_stage_trains_the_knowledge_prompt_where_it_is_said_to(
    lm: Path, tmp_path: Path, options: dict, moves: bool
) -> None:
    model = prepared(lm, tmp_path, **options).task().build()
    assert model.adapted.prefix is not None
    assert {weight.requires_grad for weight in model.adapted.prefix.knowledge.parameters()} == {moves}


def test_the_embedding_of_padding_tells_no_items_apart(lm: Path, tmp_path: Path) -> None:
    world = prepared(lm, tmp_path, representation="padding")
    vectors = np.load(world.folder / "vectors.npy")[1:]
    assert (vectors == vectors[0]).all()
    apart = np.load(
        prepared(lm, tmp_path / "mean", representation="mean", second_stage="frozen").folder / "vectors.npy"
    )
    assert len(np.unique(apart[1:].round(4), axis=0)) == ITEMS


@pytest.mark.parametrize("options", [{}, {"reasoning": False}, {"reasoning": False, "knowledge": False}], ids=str)
@pytest.mark.parametrize("named", ["lm", "gpt2", "stories"])
def test_validation_is_the_probability_that_an_engine_gives_the_event_behind_training_s(
    named: str, request: pytest.FixtureRequest, tmp_path: Path, options: dict[str, bool]
) -> None:
    lm = Path(request.getfixturevalue(named))
    world = prepared(lm, tmp_path, validated=1, first_epochs=0, first_stage="both", learnt=2, **options)
    task = world.task()
    model = task.build().eval()
    world.trained(0)
    total, count = task.validate(model, 0, 1)
    assert count == USERS
    parts = [task.validate(model, rank, 2) for rank in (0, 1)]
    assert sum(part for part, _ in parts) == pytest.approx(total, rel=1e-5)
    written = world.writer(8)
    writer, engine = written.lancer, written.engine
    known = histories().without_last(2)
    before = [known.items[known.starts[row] : known.ends[row]].tolist() for row in range(USERS)]
    targets = histories().items[histories().ends - 2].tolist()
    told = 0.0
    every = Decoding(max_new_tokens=24, beams=ITEMS)
    for outcome in engine.generate(writer.prompts(before, before), every, Choices(tuple(writer.lines))):
        told += next(beam.logprob for beam in outcome.beams if beam.chosen == (targets[outcome.index] - 1,))
    assert told == pytest.approx(total, rel=1e-4)


def test_lists_hold_each_item_once_in_order_and_a_target_that_is_not_there_stands_behind_them() -> None:
    grounded = [np.array([3, 0, 3, 5, 4]), np.array([2])]
    assert lists_of(grounded, [[5], [2]], filter_seen=True) == [{3: 0, 4: 4}, {}]
    assert lists_of(grounded, [[5], [2]], filter_seen=False) == [{3: 0, 5: 3, 4: 4}, {2: 0}]
    # What nothing was written for is no item.
    assert lists_of([np.array([0, 1])], [[]], filter_seen=True) == [{1: 1}]
    above, same = ranks_of_lists([[3, 4], [3, 4], []], [4, 9, 9], [10, 10, 10])
    # Of ten candidates eight are left, one of which it is.
    assert (above.tolist(), same.tolist()) == ([1, 2, 0], [1, 8, 10])


def test_what_is_chosen_again_is_a_candidate_of_the_model_as_of_the_floors(lm: Path, tmp_path: Path) -> None:
    """Everybody chose all that they ever will: of seen items the target alone is in the lists."""
    world = prepared(lm, tmp_path, filter_seen=True, constrained=True, beams=ITEMS)
    world.trained(0)
    figures = world.figures()
    assert figures["listed"] == ITEMS - 4 + 1
    assert figures["Recall@10"] == 1
    unmeasured = world.writer(8).lists([[1, 2, 3, 4]]).items
    assert set(unmeasured[0]) == set(range(5, ITEMS + 1))


def test_figures_tell_short_histories_cold_items_and_unseen_users_apart() -> None:
    told = Histories(np.array([1, 2, 3, *range(1, 13), 4, 1], np.int32), np.array([3, 16, 17]))
    held = HeldOut.of(told, 1, ITEMS)
    evaluated = EvaluationSet(held, np.array([True, False]))
    told = rank_figures(np.array([0, 7]), np.array([1, 1]), evaluated, config_of(cold_events=3))
    found = {name: mean.value for name, mean in told.items()}
    assert found["Recall@5"] == 0.5
    assert (found["Recall@5 length 1–10"], found["Recall@5 length 11–20"]) == (1.0, 0.0)
    assert (found["Recall@5 cold users"], found["Recall@5 unseen users"]) == (1.0, 1.0)
    assert found["Recall@5 cold items"] == 0.5
    assert "Recall@5 length > 200" not in found


def test_grounding_is_told_by_place_and_by_how_near_the_next_line_is() -> None:
    exact = [np.array([True, False, True]), np.array([False])]
    found = grounding_figures(exact, [np.array([0.9, 0.2, 0.9]), np.array([0.4])], (1, 2))
    assert found["exact@1"] == 0.5
    assert found["exact@2"] == pytest.approx(1 / 3)
    assert found["guessed"] == 0.5
    assert found["margin"] == pytest.approx(0.3)


def test_what_does_not_fit_is_told_before_anything_is_trained(lm: Path, tmp_path: Path) -> None:
    long = Catalogue([f"Film {'word ' * 60}{n}" for n in range(ITEMS)], [{}] * ITEMS)
    with pytest.raises(UsageError, match="Two items of up to"):
        prepared(lm, tmp_path, long)
    config, backbone = config_of(), load_backbone(str(lm), device="cpu")
    card = AdapterCard(config.adapter, {PREFIX: WIDTH}, "lm", "")
    single = Histories(np.array([1, 2], np.int32), np.array([1, 2]))
    with pytest.raises(ValueError, match="no next item to learn"):
        prepare_lancer(tmp_path, LancerTrainingData(["a"], ["a"], single, 0), backbone, str(lm), card, config, 0)
    with pytest.raises(ValueError, match="call prepare_lancer first"):
        LancerTask(tmp_path / "nowhere", "first", 1, 1)
