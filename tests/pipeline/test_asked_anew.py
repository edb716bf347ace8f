"""A stored model that asks everybody is measured by the cut that it was trained by, and so is what stands beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.pipeline import lancer, trsr_measures
from raypipe.pipeline.asked_anew import asked_anew
from raypipe.pipeline.held_out import are_held_out
from raypipe.pipeline.sequences import read_histories
from raypipe.recommenders.floors import Popularity
from raypipe.recommenders.windows import Histories
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.workspace import Workspace
from raypipe.systems.lancer import LancerConfig, LancerPrompts
from raypipe.systems.trsr import TrsrConfig
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.made import make_ready
from tests.pipeline.ranked_logs import TERSE
from tests.pipeline.small_logs import CHAIN_ITEMS
from tests.untrained import store_untrained_ranker, store_untrained_writer

HOLD_OUT, SHARE = 2, 0.3
CUT = {"hold_out": HOLD_OUT, "held_out_share": SHARE}
RANKER = TrsrConfig(prompt=TERSE, facts=True)
WRITER = LancerConfig(
    shown=2, reads=2, virtual_tokens=2, beams=2, text_characters=0, prompts=LancerPrompts(line="{title}", perturbed=())
)


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, ...]:
    """How `align` is called in a workspace with an untrained model of each system, both of one cut."""
    uri, lm = str(tmp_path / "workspace"), tmp_path / "lm"
    make_ready(uri)
    titles = [f"Title {n}" for n in range(1, CHAIN_ITEMS + 1)]
    texts = [*titles, TERSE, "yes no NULL title: genre: A person chose, oldest first: ->"]
    save_untrained(lm, BuiltinLmConfig(size="tiny", context=256), train_tokenizer(texts * 5, titles, [], 500))
    store_untrained_ranker(uri, RANKER, lm, **CUT)
    store_untrained_writer(uri, WRITER, lm, **CUT)
    return ("align", "--workspace", uri, "--lm", str(lm), "--asked", "20", "--answer_tokens", "8")


@pytest.mark.parametrize(("system", "module"), [("trsr", trsr_measures), ("lancer", lancer)])
def test_floors_and_records_are_of_the_cut_of_the_training(
    raypipe: Run, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, system: str, module: object
) -> None:
    learnt: list[Histories] = []

    def counted(training: Histories, items: int) -> Popularity:
        learnt.append(training)
        return Popularity(training, items)

    monkeypatch.setattr(module, "Popularity", counted)
    uri = asked[2]
    ended = raypipe(*asked, "--system", system, "--adapter", system)
    assert ended.code == 0, ended.stderr
    users, histories = read_histories(Workspace(uri), Workspace(uri).tables["histories"].version())
    expected = histories.without_last(HOLD_OUT).of(~are_held_out(users, SHARE))
    (floor,) = learnt
    assert 0 < len(expected) < len(histories)
    assert np.array_equal(floor.items, expected.items)
    (record,) = Evaluations(Workspace(uri).store).all()
    assert "trained before everybody's last 2 events without 30% of the users" in record.protocol
    same = raypipe(*asked, "--system", system, "--adapter", system, "--hold_out", "2", "--held_out_share", "0.3")
    assert (same.code, same.metrics["popularity: Recall@5"]) == (0, ended.metrics["popularity: Recall@5"])
    assert "is not read" not in ended.stderr + same.stderr
    words = ["--trsr.negatives", "3"] if system == "trsr" else ["--lancer.learnt", "3"]
    other = raypipe(*asked, "--system", system, "--adapter", system, *words)
    assert other.code == 0, other.stderr
    assert f"a stored model keeps what it was trained with: {words[0]} is not read" in other.stderr


@pytest.mark.parametrize("system", ["trsr", "lancer"])
def test_what_is_no_recommender_is_told_with_the_command_that_measures_it(
    raypipe: Run, asked: tuple[str, ...], system: str
) -> None:
    ended = raypipe("evaluate", "--workspace", asked[2], "--model", system)
    assert ended.code == 2
    told = one_paragraph(ended.stderr)
    assert f"The model {system} is an adapter that `raypipe align` made, and no recommender." in told
    assert f"`raypipe align --system {system} --adapter {system}` measures it" in told


@pytest.mark.parametrize("system", ["trsr", "lancer"])
def test_another_cut_is_refused(raypipe: Run, asked: tuple[str, ...], system: str) -> None:
    for option, value in (("--held_out_share", "0.1"), ("--hold_out", "1")):
        ended = raypipe(*asked, "--system", system, "--adapter", system, option, value)
        assert ended.code == 2
        told = one_paragraph(ended.stderr)
        assert f"{option} {value} is another cut" in told
        assert f"Leave out {option}" in told


def test_of_options_with_options_of_their_own_only_those_given_are_replaced() -> None:
    prompts = {"line": "{title}", "perturbed": [{"lead": "Titles:"}]}
    stored = LancerConfig.model_validate({"prompts": prompts, "beams": 3}).model_dump(mode="json")
    line = LancerConfig.model_validate({"prompts": {"line": "{title}"}})
    assert asked_anew("lancer", line, stored) == stored
    given = LancerConfig.model_validate({"prompts": {"line": "{title}; {genre}", "perturbed": []}, "cold_events": 4})
    assert asked_anew("lancer", given, stored) == {
        **stored,
        "cold_events": 4,
        "prompts": {**stored["prompts"], "perturbed": []},
    }
    ranker = TrsrConfig.model_validate({"candidates": {"negatives": 50}}).model_dump(mode="json")
    other = TrsrConfig.model_validate({"candidates": {"seed": 1}})
    assert asked_anew("trsr", other, ranker)["candidates"] == {"negatives": 50, "seed": 1}
