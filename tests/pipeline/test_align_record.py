"""What `align` leaves for `report`: of whom the figures are, how they were asked, and whose model it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.pipeline.align import AlignConfig
from raypipe.pipeline.align_record import record
from raypipe.pipeline.report_drawings import plots_of
from raypipe.pipeline.report_figures import figures_of
from raypipe.pipeline.report_tables import tables_of
from raypipe.runtime.job import JobResult
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.models import Model, Models
from raypipe.storage.store import Store

METRICS = {"asked": 20, "Recall@5": 0.3, "perturbed: Recall@5": 0.2, "popularity: Recall@5": 0.1, "none": None}


@pytest.fixture
def home(tmp_path: Path) -> str:
    return str(tmp_path / "home")


def stored(uri: str, folder: Path, name: str, **lineage: object) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(name)
    return Models(Store(uri)).add(name, folder, "recipe", lineage)


def test_floors_are_rows_of_their_own_and_what_stands_beside_a_model_is_named_after_it(
    home: str, tmp_path: Path
) -> None:
    training = {"seconds": 3.0, "steps": 7, "losses": [], "validations": []}
    options = {"filter_seen": True, "beams": 10}
    model = stored(home, tmp_path / "m", "lancer", seed=2, options=options, config={}, training=training)
    config = AlignConfig(workspace=home, system="lancer")
    record(config, JobResult("align", "ok", models={"lancer": model.hash}, metrics=METRICS))
    figures = {(one.model, one.metric): one for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert figures["LANCER", "Recall@5"].value == 0.3
    assert (
        figures["LANCER", "Recall@5"].protocol == "leave-one-out, whole catalogue, seen items filtered, 20 users asked"
    )
    assert figures["LANCER, perturbed", "Recall@5"].seed == 2
    assert figures["popularity", "Recall@5"].value == 0.1
    # Of yes and no it is the normal approximation, and no value from 0 to 1 varies more.
    assert figures["LANCER", "Recall@5"].half_width == pytest.approx(1.96 * (0.3 * 0.7 / 20) ** 0.5, abs=1e-5)
    assert figures["LANCER", "asked"].half_width is None
    assert (figures["LANCER", "train_seconds"].value, figures["LANCER", "steps"].value) == (3, 7)
    assert ("LANCER", "none") not in figures


def test_what_ranks_candidates_without_a_language_model_has_rows_of_its_own(home: str, tmp_path: Path) -> None:
    model = stored(home, tmp_path / "m", "trsr", options={"candidates": {"negatives": 20}})
    metrics = {"asked": 50, "Recall@3": 0.6, "no summaries: Recall@3": 0.5, "boosted trees on facts: Recall@3": 0.7}
    metrics |= {"gru4rec: Recall@3": 0.4, "above 123: Recall@3": 0.1, "above 123: Recall@3 low": 0.02}
    metrics |= {"Recall@3 after 3 to 9 events": 0.5, "Recall@3 after 10 to 24 events": 0.7}
    config = AlignConfig(workspace=home, system="trsr", model="gru4rec/0")
    record(config, JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics))
    figures = figures_of(Evaluations(Store(home)).all(), "shop")
    assert {one.protocol for one in figures} == {"leave-one-out, 21 candidates, 50 users asked"}
    ranking, compared = tables_of("shop", [one for one in figures if one.metric != "asked"])[:2]
    kinds = {row.model: row.kind for row in ranking.rows}
    assert kinds == {
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
    told = [one.settings for one in Evaluations(Store(here)).all()]
    assert {(one["trained_in"], one["beams"]) for one in told} == {("home", 10), ("home", 5)}


def test_an_adapter_is_told_beside_the_recommender_whose_states_it_reads(home: str, tmp_path: Path) -> None:
    stored(home, tmp_path / "r", "gru4rec")
    adapter = stored(home, tmp_path / "m", "recinterpreter", seed=0)
    config = AlignConfig(workspace=home, system="recinterpreter", model="gru4rec")
    for unseen, told in ((1, "held out from every training"), (0, "who may have been trained on")):
        metrics = {"recovery": 0.2, "shuffled states: recovery": 0.01, "unseen_by_all": unseen}
        record(config, JobResult("align", "ok", models={"recinterpreter": adapter.hash}, metrics=metrics))
        (one,) = Evaluations(Store(home)).all()
        assert (one.recommender, one.protocol) == ("gru4rec", f"before everybody's last event, users {told}")
        assert one.figures["recinterpreter, shuffled states"]["recovery"].value == 0.01


def test_what_ranks_the_same_candidates_by_itself_is_a_row_of_its_own(home: str, tmp_path: Path) -> None:
    model = stored(home, tmp_path / "m", "trsr", options={"candidates": {"negatives": 20}})
    metrics = {
        "asked": 20,
        "Recall@3": 0.5,
        "no summaries: Recall@3": 0.4,
        "boosted trees: Recall@3": 0.3,
        "sasrec: MRR@3": 0.2,
    }
    record(
        AlignConfig(workspace=home, system="trsr"),
        JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics),
    )
    figures = {(one.model, one.metric): one.value for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert figures["LLM-TRSR", "Recall@3"] == 0.5
    assert figures["LLM-TRSR, no summaries", "Recall@3"] == 0.4
    assert figures["boosted trees", "Recall@3"] == 0.3
    assert figures["SASRec", "MRR@3"] == 0.2
    (told,) = {one.protocol for one in figures_of(Evaluations(Store(home)).all(), "shop")}
    assert told == "leave-one-out, 21 candidates, 20 users asked"
