"""What `align` leaves for `report`: of whom the figures are, how they were asked, and whose model it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.metrics.ranking import Mean
from raypipe.pipeline.align_options import AlignConfig
from raypipe.pipeline.align_record import record
from raypipe.pipeline.evaluate import record as record_recommender
from raypipe.pipeline.report_drawings import plots_of
from raypipe.pipeline.report_figures import figures_of, labels
from raypipe.pipeline.report_tables import tables_of
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobResult
from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.models import Model, Models
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.trsr import TrsrConfig

TRSR = TrsrConfig().model_dump(mode="json")
TRSR_PROTOCOL = (
    "leave-one-out, 21 candidates, last 25 events shown, trained before everybody's last event, {} users asked"
)
HISTORIES = Histories(np.array([1, 2, 3] * 3, np.int32), np.array([3, 6, 9]))
LINEAGE = {
    "job": "align",
    "hold_out": 1,
    "held_out_share": 0.0,
    "seed": 0,
    "options": {},
    "config": {},
    "training": {},
    "versions": {},
}
METRICS = {
    "asked": 20,
    "spread": float("nan"),
    "Recall@5": 0.3,
    "perturbed: Recall@5": 0.2,
    "popularity: Recall@5": 0.1,
    "none": None,
}


@pytest.fixture
def home(tmp_path: Path) -> str:
    return str(tmp_path / "home")


def stored(uri: str, folder: Path, name: str, weights: object = "", **lineage: object) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(f"{folder.name} {weights}")
    return Models(Store(uri)).add(name, folder, "recipe", {**LINEAGE, **lineage})


def test_floors_are_rows_of_their_own_and_what_stands_beside_a_model_is_named_after_it(
    home: str, tmp_path: Path
) -> None:
    training = {"seconds": 3.0, "steps": 7, "losses": [], "validations": []}
    options = {"filter_seen": True, "beams": 10}
    model = stored(home, tmp_path / "m", "lancer", seed=2, options=options, config={}, training=training)
    config = AlignConfig(workspace=home, system="lancer", held_out_share=0)
    record(config, JobResult("align", "ok", models={"lancer": model.hash}, metrics=METRICS))
    figures = {(one.model, one.metric): one for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert figures["LANCER", "Recall@5"].value == 0.3
    assert (
        figures["LANCER", "Recall@5"].protocol
        == "leave-one-out, whole catalogue, seen items filtered, trained before everybody's last event, 20 users asked"
    )
    assert figures["LANCER, perturbed", "Recall@5"].seed == 2
    assert figures["popularity", "Recall@5"].value == 0.1
    # Of yes and no it is the normal approximation, and no value from 0 to 1 varies more.
    assert figures["LANCER", "Recall@5"].half_width == pytest.approx(1.96 * (0.3 * 0.7 / 20) ** 0.5, abs=1e-5)
    assert figures["LANCER", "asked"].half_width is None
    assert (figures["LANCER", "train_seconds"].value, figures["LANCER", "steps"].value) == (3, 7)
    assert ("LANCER", "none") not in figures


def test_intervals_that_a_system_tells_reach_the_tables_and_the_plot_by_length(home: str, tmp_path: Path) -> None:
    """What it tells is no bound, and of a part of the users there is none."""
    model = stored(home, tmp_path / "m", "lancer", options={"filter_seen": True}, config={})
    metrics = {"asked": 20, "Recall@5": 0.3, "NDCG@5": 0.2, "Recall@5 cold items": 0.1, "popularity: Recall@5": 0.1}
    lengths = {"Recall@5 length 1–10": 0.25, "Recall@5 length 11–20": 0.35}
    told = {"NDCG@5": 0.111, "Recall@5 cold items": 0.07, "popularity: Recall@5": 0.05, "Recall@5 length 1–10": 0.22}
    config = AlignConfig(workspace=home, system="lancer", held_out_share=0)
    record(config, JobResult("align", "ok", models={"lancer": model.hash}, metrics=metrics | lengths, intervals=told))
    figures = figures_of(Evaluations(Store(home)).all(), "shop")
    widths = {(one.model, one.metric): one.half_width for one in figures}
    assert widths["LANCER", "NDCG@5"] == 0.111
    assert widths["LANCER", "Recall@5 cold items"] == 0.07
    assert widths["popularity", "Recall@5"] == 0.05
    # Older records told none: what is of everybody has a bound.
    assert widths["LANCER", "Recall@5"] == pytest.approx(1.96 * (0.3 * 0.7 / 20) ** 0.5, abs=1e-5)
    (plot,) = plots_of(figures)
    assert plot.rows == (("1–10", "0.2500 ± 0.2200"), ("11–20", "0.3500"))


def test_who_writes_lists_for_everybody_stands_in_one_table_with_recommenders(home: str, tmp_path: Path) -> None:
    model = stored(home, tmp_path / "m", "lancer", options={"filter_seen": True}, config={})
    config = AlignConfig(workspace=home, system="lancer", hold_out=2, held_out_share=0)
    metrics = {"asked": 3, "askable": 3, "NDCG@10": 0.3, "popularity: NDCG@10": 0.1}
    record(config, JobResult("align", "ok", models={"lancer": model.hash}, metrics=metrics))
    rows = {"sasrec": {"NDCG@10": Mean(0.4, 0.0)}, "popularity": {"NDCG@10": Mean(0.1, 0.0)}}
    sasrec = Model("sasrec", "a" * 32, "", {**LINEAGE, "hold_out": 2, "protocol": {}}, 0.0)
    record_recommender(Workspace(home), sasrec, rows, HeldOut.of(HISTORIES, 2, items=3), True)
    figures = [one for one in figures_of(Evaluations(Store(home)).all(), "shop") if one.metric == "NDCG@10"]
    (table,) = tables_of("shop", figures)
    assert {row.model: row.kind for row in table.rows} == {"popularity": "floor", "LANCER": "model", "SASRec": "model"}


def test_what_ranks_candidates_without_a_language_model_has_rows_of_its_own(home: str, tmp_path: Path) -> None:
    model = stored(home, tmp_path / "m", "trsr", options=TRSR)
    metrics = {"asked": 50, "Recall@3": 0.6, "no summaries: Recall@3": 0.5, "boosted trees on facts: Recall@3": 0.7}
    metrics |= {"gru4rec: Recall@3": 0.4, "above 123: Recall@3": 0.1, "above 123: Recall@3 low": 0.02}
    metrics |= {"Recall@3 after 3 to 9 events": 0.5, "Recall@3 after 10 to 24 events": 0.7}
    beside = stored(home, tmp_path / "g", "gru4rec")
    config = AlignConfig(workspace=home, system="trsr", held_out_share=0, model=f"gru4rec/{beside.hash}")
    record(config, JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics))
    figures = figures_of(Evaluations(Store(home)).all(), "shop")
    assert {one.protocol for one in figures} == {TRSR_PROTOCOL.format(50)}
    ranking, compared = tables_of("shop", [one for one in figures if one.metric != "asked"])[:2]
    kinds = {row.model: row.kind for row in ranking.rows}
    assert kinds == {
        "chance": "floor",
        "LLM-TRSR": "model",
        "LLM-TRSR, no summaries": "beside",
        "boosted trees on facts": "model",
        "GRU4Rec": "model",
    }
    assert compared.metrics == ("above 123: Recall@3", "above 123: Recall@3 low")
    (plot,) = plots_of(figures)
    assert plot.rows == (("3 to 9", "0.5000"), ("10 to 24", "0.7000"))


def test_a_model_of_another_workspace_is_told_from_one_of_this(home: str, tmp_path: Path) -> None:
    here = str(tmp_path / "here")
    theirs = stored(home, tmp_path / "m", "lancer", options={"beams": 10})
    result = JobResult("align", "ok", models={"lancer": theirs.hash}, metrics=METRICS)
    given = {"workspace": here, "system": "lancer", "adapter": "lancer", "adapter_workspace": home}
    record(AlignConfig.model_validate(given), result)
    record(AlignConfig.model_validate({**given, "lancer": {"beams": 5}}), result)
    # How many items it reads is what it learnt, and no question of how it is asked.
    record(AlignConfig.model_validate({**given, "lancer": {"beams": 6, "reads": 20}}), result)
    told = [one.settings for one in Evaluations(Store(here)).all()]
    assert {(one["trained_in"], one["beams"]) for one in told} == {("home", 10), ("home", 5), ("home", 6)}
    assert not any("reads" in one for one in told)


def test_an_adapter_is_told_beside_the_recommender_whose_states_it_reads(home: str, tmp_path: Path) -> None:
    stored(home, tmp_path / "r", "gru4rec")
    adapter = stored(home, tmp_path / "m", "recinterpreter", seed=0)
    config = AlignConfig(workspace=home, system="recinterpreter", model="gru4rec")
    for unseen, told in ((1, "held out from every training"), (0, "who may have been trained on")):
        metrics = {"recovery": 0.2, "shuffled states: recovery": 0.01, "unseen_by_all": unseen}
        record(config, JobResult("align", "ok", models={"recinterpreter": adapter.hash}, metrics=metrics))
        (one,) = Evaluations(Store(home)).all()
        assert (one.recommender, one.protocol) == ("gru4rec", f"before everybody's last event, users {told} (10%)")
        assert one.figures["recinterpreter, shuffled states"]["recovery"].value == 0.01


def test_a_recommender_that_learnt_less_than_what_it_stands_beside_says_so(home: str, tmp_path: Path) -> None:
    stored(home, tmp_path / "r", "sasrec", hold_out=2)
    model = stored(home, tmp_path / "m", "trsr", options=TRSR)
    for hold_out, told in ((1, "sasrec-without the last 2 events"), (2, "sasrec")):
        config = AlignConfig(workspace=home, system="trsr", model="sasrec", hold_out=hold_out)
        metrics = {"asked": 20, "Recall@3": 0.5, "sasrec: Recall@3": 0.4}
        record(config, JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics))
        one = Evaluations(Store(home)).all()[-1]
        assert set(one.figures) == {"trsr", told}


def test_what_ranks_the_same_candidates_by_itself_is_a_row_of_its_own(home: str, tmp_path: Path) -> None:
    model = stored(home, tmp_path / "m", "trsr", options=TRSR)
    metrics = {
        "asked": 20,
        "Recall@3": 0.5,
        "no summaries: Recall@3": 0.4,
        "boosted trees: Recall@3": 0.3,
        "sasrec: MRR@3": 0.2,
    }
    stored(home, tmp_path / "s", "sasrec")
    record(
        AlignConfig(workspace=home, system="trsr", held_out_share=0),
        JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics),
    )
    figures = {(one.model, one.metric): one.value for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert figures["LLM-TRSR", "Recall@3"] == 0.5
    assert figures["LLM-TRSR, no summaries", "Recall@3"] == 0.4
    assert figures["boosted trees", "Recall@3"] == 0.3
    assert figures["SASRec", "MRR@3"] == 0.2
    (told,) = {one.protocol for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert told == TRSR_PROTOCOL.format(20)


def test_models_that_differ_in_what_was_joined_are_rows_of_their_own(home: str, tmp_path: Path) -> None:
    """Neither the summaries nor the language model are options of the system."""
    one, other = (stored(home, tmp_path / name, "sasrec").hash for name in ("one", "other"))
    joined = [(None, "a" * 64, one), ("hierarchical", "a" * 64, one), ("recurrent", "a" * 64, one)]
    joined += [("recurrent", "b" * 64, one), ("recurrent", "b" * 64, other)]
    for number, (summaries, lm, recommender) in enumerate(joined):
        given = {"lm": lm, "recommender": f"sasrec/{recommender}", "summaries": summaries, "held_out_share": 0.1}
        model = stored(home, tmp_path / f"m{number}", "trsr", number, options=TRSR, config={}, **given)
        asked = {"workspace": home, "system": "trsr", "summaries": summaries, "model": f"sasrec/{recommender}"}
        metrics = {"asked": 9, "Recall@3": number / 10, "sasrec: Recall@3": 0.5 if recommender == one else 0.6}
        record(
            AlignConfig.model_validate(asked), JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics)
        )
    figures = [one for one in figures_of(Evaluations(Store(home)).all(), "shop") if one.metric == "Recall@3"]
    ours = {figure.model: figure.value for figure in figures if figure.model.startswith("LLM-TRSR")}
    assert sorted(ours.values()) == [0, 0.1, 0.2, 0.3, 0.4]
    assert ours[f"LLM-TRSR (lm bbbbbbbb; recommender sasrec/{one[:8]}; summaries recurrent)"] == 0.3
    beside = {figure.model: figure.value for figure in figures if figure.model.startswith("SASRec")}
    assert beside == {f"SASRec (sasrec/{one[:8]})": 0.5, f"SASRec (sasrec/{other[:8]})": 0.6}


def test_scores_by_language_models_that_were_tuned_elsewhere_are_told_by_which(home: str, tmp_path: Path) -> None:
    for value, tuned in ((0.1, None), (0.2, f"guided/{'a' * 32}"), (0.3, f"guided/{'b' * 32}")):
        model = stored(home, tmp_path / f"m{value}", "guided", value, options={}, tuned=tuned)
        config = AlignConfig(workspace=home, system="guided", adapter=tuned)
        metrics = {"asked": 9, "HR@10": value}
        record(config, JobResult("align", "ok", models={"guided": model.hash}, metrics=metrics))
    figures = [one for one in figures_of(Evaluations(Store(home)).all(), "shop") if one.metric == "HR@10"]
    assert sorted(figure.value for figure in figures) == [0.1, 0.2, 0.3]
    assert any("tuned guided/aaaaaaaa" in figure.model for figure in figures)


def test_floors_of_different_cuts_are_told_apart(home: str, tmp_path: Path) -> None:
    """They are counted on what the models beside them were trained on."""
    cuts = [(1, 0.0), (2, 0.0), (2, 0.1)]
    for hold_out, share in cuts:
        value = round(hold_out / 10 + share, 1)
        lineage = {"hold_out": hold_out, "held_out_share": share, "protocol": {}, "options": {}}
        model = stored(home, tmp_path / f"m{value}", "lancer", value, **lineage)
        config = AlignConfig(workspace=home, system="lancer", hold_out=hold_out, held_out_share=share)
        metrics = {"asked": 9, "popularity: Recall@5": value}
        record(config, JobResult("align", "ok", models={"lancer": model.hash}, metrics=metrics))
        rows = {"popularity": {"Recall@5": Mean(value, 0.0)}}
        everybody = HeldOut.of(HISTORIES, hold_out, items=3)
        record_recommender(
            Workspace(home), Model("sasrec", f"{value}", "", {**LINEAGE, **lineage}, 0.0), rows, everybody, True
        )
    figures = [one for one in figures_of(Evaluations(Store(home)).all(), "shop") if one.model == "popularity"]
    assert len({figure.protocol for figure in figures}) == len(figures) == 6
    assert sorted(figure.value for figure in figures) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    last = "leave-one-out, whole catalogue, seen items filtered, trained before everybody's last 2 events without 10% of the users"
    assert last in {figure.protocol for figure in figures}


def test_figures_of_some_users_say_of_how_many_and_stand_beside_those_of_all(home: str) -> None:
    model = Model("sasrec", "a" * 32, "", {**LINEAGE, "hold_out": 2, "protocol": {}}, 0.0)
    for asked, value in ((np.ones(3, bool), 0.1), (np.array([True, False, True]), 0.2)):
        held = HeldOut.of(HISTORIES, 2, items=3, asked=asked)
        record_recommender(Workspace(home), model, {"sasrec": {"Recall@5": Mean(value, 0.0)}}, held, True)
    values = {one.protocol: one.value for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    told = "whole catalogue, seen items filtered, trained before everybody's last 2 events"
    assert values == {f"leave-one-out, {told}": 0.1, f"leave-one-out, 2 of 3 users, {told}": 0.2}


@pytest.mark.parametrize(
    "other",
    [
        {"summaries": "recurrent"},
        {"hold_out": 2},
        {"asked": 7},
        {"answer_tokens": 9},
        {"model": "gru4rec"},
        {"trsr": {"recent": 0}},
        {"trsr": {"candidates": {"seed": 1}}},
    ],
)
def test_a_stored_model_asked_otherwise_has_a_record_of_its_own(
    home: str, tmp_path: Path, other: dict[str, object]
) -> None:
    for name in ("sasrec", "gru4rec"):
        stored(home, tmp_path / name, name)
    model = stored(home, tmp_path / "m", "trsr", options=TRSR, config={}, summaries="hierarchical", hold_out=2)
    for number, more in enumerate(({}, other)):
        metrics = {"asked": 5, "Recall@3": number / 10}
        given = {"workspace": home, "system": "trsr", "adapter": "trsr", **more}
        record(
            AlignConfig.model_validate(given), JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics)
        )
    figures = [one for one in figures_of(Evaluations(Store(home)).all(), "shop") if one.metric == "Recall@3"]
    assert sorted(figure.value for figure in figures) == [0, 0.1]


def test_settings_that_are_not_shown_tell_models_apart_too() -> None:
    def of(**settings: object) -> Evaluation:
        return Evaluation("align", "trsr", "a", "", "p", 0, {"trsr": {"Recall@3": Measured(0.5)}}, settings=settings)

    five = dict.fromkeys("abcde", 1)
    made = [of(**five), of(**dict.fromkeys("abcde", 2)), of(**{**five, "e": 3}), of(**five)]
    told = labels(made)
    assert (len(set(told)), told[0]) == (3, told[3])
    assert told[1] == "LLM-TRSR (a 2; b 2; c 2; d 2 and 1 more)"
    assert told[0].startswith("LLM-TRSR (a 1; b 1; c 1; d 1 and 1 more; settings ")
