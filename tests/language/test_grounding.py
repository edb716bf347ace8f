"""Grounding: what was written is taken for the nearest line, and how far that is guessed is told."""

from __future__ import annotations

import numpy as np
import pytest

from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.grounding import Grounding

LINES = ("Drama : Alien", "War : Brazil", "Drama : Dune", "Alien : Drama")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer([*LINES, " Casablanca"] * 5, [], [], 500)
    save_untrained(folder, BuiltinLmConfig(size="tiny", context=64), tokenizer)
    return load_backbone(str(folder), device="cpu")


def test_the_nearest_line_is_that_of_a_plain_loop_in_float64(backbone: Backbone) -> None:
    weights = backbone.model.get_input_embeddings().weight.detach().double().numpy()  # type: ignore[operator]

    def embedded(text: str) -> np.ndarray:
        found = weights[backbone.tokenizer(f" {text}")["input_ids"]].max(0)
        return found / np.linalg.norm(found)

    answers = ["War : Dune", "Casablanca", "Drama : Alie", "Brazil"]
    grounded = Grounding(backbone, LINES).ground(answers)
    for number, answer in enumerate(answers):
        cosines = np.array([embedded(line) @ embedded(answer) for line in LINES])
        best = np.sort(cosines)[::-1]
        assert cosines[grounded.nearest[number]] == pytest.approx(best[0], abs=1e-6)
        assert grounded.margin[number] == pytest.approx(best[0] - best[1], abs=1e-6)
    assert not grounded.exact.any()


def test_a_line_to_the_letter_is_that_line_whatever_else_has_its_words(backbone: Backbone) -> None:
    grounded = Grounding(backbone, LINES).ground(LINES)
    assert grounded.nearest.tolist() == [0, 1, 2, 3]
    assert grounded.exact.all()
    # The first and the last hold the same words in another order, which the largest values cannot tell apart.
    assert grounded.margin[0] == pytest.approx(0, abs=1e-6)


def test_nothing_written_is_no_line_by_no_margin(backbone: Backbone) -> None:
    grounded = Grounding(backbone, LINES).ground([""])
    assert (grounded.nearest.tolist(), grounded.margin.tolist(), grounded.exact.tolist()) == ([-1], [0.0], [False])
    assert Grounding(backbone, LINES).ground([]).nearest.shape == (0,)


def test_a_line_whose_words_are_no_numbers_is_nobodys_nearest(backbone: Backbone) -> None:
    answers = ["War : Dune", "Casablanca", "Drama : Alie", "Brazil"]
    known = Grounding(backbone, LINES).ground(answers)
    lost = backbone.twin("everything")
    (ids,) = lost.tokenizer([" Zulu"])["input_ids"]
    used = {token for text in (*LINES, *answers) for token in lost.tokenizer(f" {text}")["input_ids"]}
    unused = sorted(set(ids) - used)
    assert unused
    lost.model.get_input_embeddings().weight.data[unused] = np.nan  # type: ignore[operator]
    found = Grounding(lost, ["Zulu", *LINES]).ground([*answers, "Zulu!"])
    assert found.nearest[:-1].tolist() == (known.nearest + 1).tolist()
    assert found.margin[:-1] == pytest.approx(known.margin, abs=1e-6)
    assert np.isfinite(found.margin).all()
