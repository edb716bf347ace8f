"""Which models of a workspace share a row of a report: those that differ in nothing but the seed, whatever they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe.metrics.ranking import Mean
from raypipe.pipeline.align_options import AlignConfig
from raypipe.pipeline.align_record import record
from raypipe.pipeline.evaluate import record as record_recommender
from raypipe.pipeline.report_drawings import plots_of
from raypipe.pipeline.report_figures import figures_of, labels, read_golden
from raypipe.pipeline.report_tables import ReportTable, findings, tables_of
from raypipe.recommenders.evaluation import HeldOut
from raypipe.recommenders.windows import Histories
from raypipe.runtime.job import JobResult
from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.models import Model, Models
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.trsr import TrsrConfig

PROTOCOL = "leave-one-out, whole catalogue, seen items filtered"
GAIN = "relative NDCG@10 gain"
BASE_NDCG = (0.10, 0.12)
HELD = HeldOut.of(Histories(np.array([1, 2, 3] * 3, np.int32), np.array([3, 6, 9])), 1, items=3)


def evaluated(
    seed: int, ndcg: float, guided: Mapping[str, object] | None = None, name: str = "sasrec", **settings: Any
) -> Evaluation:
    """A recommender as `evaluate` records it; with `guided` one whose vectors were refined."""
    recommender = {"model": name, "width": 64, **({"guided": dict(guided)} if guided else {})}
    figures = {name: {"NDCG@10": Measured(ndcg, 0.01), "attribute share: grim": Measured(0.3)}}
    made = {"recommender": {**recommender, **settings}, "trainer": {"seed": seed, "lr": 0.1}}
    content = fingerprint({"figures": ndcg, "name": name, **made})[:32]
    return Evaluation("evaluate", name, content, "", PROTOCOL, seed, figures, settings=made)


def refined(seed: int, ndcg: float, start: Evaluation, **options: Any) -> Evaluation:
    guided = {"base": f"{start.name}/{start.hash}", "scores": f"guided/{'a' * 32}", "block": "scores"}
    guided |= {"items": "frozen", "users": "trained", **options}
    return evaluated(seed, ndcg, guided, start.name)


def ranking(evaluations: Sequence[Evaluation]) -> ReportTable:
    found = tables_of("shop", figures_of(evaluations, "shop"))
    (table,) = [one for one in found if one.section.title == "Ranking" and one.protocol != "scores alone"]
    return table


def rows(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(row.model, row.recommender): row.seeds for row in ranking(evaluations).rows}


@pytest.fixture
def bases() -> list[Evaluation]:
    return [evaluated(seed, ndcg) for seed, ndcg in enumerate(BASE_NDCG)]


def test_seeds_of_guided_refinement_are_one_row_with_its_gain_over_the_base_of_each(bases: list[Evaluation]) -> None:
    made = [*bases, *(refined(seed, 1.2 * BASE_NDCG[seed], base) for seed, base in enumerate(bases))]
    assert rows(made) == {("SASRec", ""): (0, 1), ("Guided", "SASRec"): (0, 1)}
    guided = next(row for row in ranking(made).rows if row.model == "Guided")
    assert guided.cells["NDCG@10"].value == pytest.approx(0.132)
    assert guided.cells["NDCG@10"].spread is not None
    assert (guided.cells[GAIN].value, guided.cells[GAIN].seeds) == (pytest.approx(0.2), (0, 1))
    told = plots_of(figures_of(made, "shop"))
    assert "What decides on recommendations of Guided beside SASRec" in {plot.title for plot in told}


def test_controls_of_guided_refinement_bear_their_names_and_are_no_best_model(bases: list[Evaluation]) -> None:
    blocks: dict[str, dict[str, Any]] = {
        "Guided": {},
        "Guided shuffled": {"block": "shuffled"},
        "Guided random, users absent": {"block": "random", "users": "absent"},
        "Guided reduced": {"block": "none"},
        "Guided items trained": {"items": "trained"},
        "Guided again": {"scores": None},
    }
    made = [
        *bases,
        *(
            refined(seed, 0.11 + number / 100, base, **options)
            for number, options in enumerate(blocks.values())
            for seed, base in enumerate(bases)
        ),
    ]
    assert rows(made) == {("SASRec", ""): (0, 1)} | {(name, "SASRec"): (0, 1) for name in blocks}
    kinds = {row.model: row.kind for row in ranking(made).rows}
    assert {name for name, kind in kinds.items() if kind == "model"} == {"SASRec", "Guided", "Guided items trained"}
    told = findings([ranking(made)])
    assert told[0].startswith("NDCG@10: Guided items trained beside SASRec is best")
    assert any(one.startswith("The control Guided shuffled beside SASRec is as good as Guided beside") for one in told)


def test_scores_of_a_language_model_as_it_is_are_a_control(bases: list[Evaluation]) -> None:
    scores = [
        Evaluation(
            "align", "guided", name * 32, "", "scores alone", 0, {"guided": {"HR@10": Measured(0.1)}}, settings=settings
        )
        for name, settings in (("a", {"tuned": True}), ("b", {"tuned": False}))
    ]
    made = [*bases, *scores, refined(0, 0.13, bases[0]), refined(0, 0.12, bases[0], scores=f"guided/{'b' * 32}")]
    assert {("Guided", "SASRec"), ("Guided zero-shot", "SASRec")} <= set(rows(made))


def test_a_gain_is_told_over_the_base_of_the_same_seed_that_was_asked_the_same(bases: list[Evaluation]) -> None:
    other = replace(bases[0], protocol=f"{PROTOCOL} otherwise")
    for beside in ([], [other], [bases[1]]):
        made = [*beside, refined(0, 0.2, bases[0]), refined(0, 0.3, bases[1], clip=2)]
        assert GAIN not in {figure.metric for figure in figures_of(made, "shop")}


def test_a_gain_is_told_at_equal_width_alone(bases: list[Evaluation]) -> None:
    narrow = replace(refined(0, 0.2, bases[0]), settings={"recommender": {"width": 32, "guided": {"base": ""}}})
    narrow.settings["recommender"]["guided"]["base"] = f"sasrec/{bases[0].hash}"
    assert GAIN not in {figure.metric for figure in figures_of([*bases, narrow], "shop")}
    narrow.settings["recommender"]["width"] = 64
    assert GAIN in {figure.metric for figure in figures_of([*bases, narrow], "shop")}


def system(name: str, recall: float, **settings: Any) -> Evaluation:
    """As `align` records a system that ranks, with a control of its own."""
    figures = {name: {"Recall@5": Measured(recall)}, f"{name}, shuffled items": {"Recall@5": Measured(0.01)}}
    return Evaluation("align", name, fingerprint(settings)[:32], "", PROTOCOL, 0, figures, settings=settings)


def test_ablations_of_systems_bear_the_names_of_the_benchmarks_and_are_no_best_model() -> None:
    """Whether they were trained at the command line or by a benchmark, a report tells of them alike."""
    golden = Path(__file__).parents[1] / "golden"
    made = [
        system("lancer", 0.1, knowledge=True, reasoning=True),
        system("lancer", 0.4, knowledge=True, reasoning=False),
        system("lancer", 0.2, knowledge=False, reasoning=True, first_epochs=0),
        system("lancer", 0.3, knowledge=False, reasoning=False, first_epochs=0),
        system("trsr", 0.1, summaries="recurrent"),
        system("trsr", 0.2, summaries=None),
    ]
    names = labels(made)
    assert names == [
        "LANCER",
        "LANCER no reasoning prompt",
        "LANCER no knowledge prompt",
        "LANCER no prompts",
        "LLM-TRSR",
        "LLM-TRSR no summary",
    ]
    tables = [golden / "lancer-ml-100k.json", golden / "trsr-amazon-industrial.json"]
    assert set(names) <= {figure.model for path in tables for figure in read_golden(str(path))}
    table = ranking(made)
    assert {row.model for row in table.rows if row.kind == "model"} == {"LANCER", "LLM-TRSR"}
    told = findings([table])
    assert "LANCER no reasoning prompt is as good as LANCER: Recall@5 0.4000 against 0.1000" in " ".join(told)
    assert not any("no reasoning prompt is best" in one for one in told)
    assert ("LANCER no prompts, shuffled items", "beside") in {(row.model, row.kind) for row in table.rows}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ({}, {"clip": 2.0}),
        ({"width": 32}, {}),
        ({"loss": {"kind": "bce"}}, {}),
        ({}, {"base": f"sasrec/{'c' * 32}"}),
        ({}, {"scores": f"guided/{'c' * 32}"}),
    ],
)
def test_what_differs_in_more_than_the_seed_is_never_joined(base: dict[str, Any], options: dict[str, Any]) -> None:
    """In an option, in one of the base's, or in what nobody can tell."""
    bases = [evaluated(0, 0.1), evaluated(1, 0.1, **base)]
    made = [*bases, refined(0, 0.2, bases[0]), refined(1, 0.2, bases[1], **options)]
    guided = {model: seeds for (model, _), seeds in rows(made).items() if model.startswith("Guided")}
    assert sorted(guided.values()) == [(0,), (1,)]
    joined = [*bases, refined(0, 0.2, bases[0]), refined(1, 0.2, bases[0])]
    assert rows(joined)["Guided", "SASRec"] == (0, 1), "what was made of one model differs by its own seed alone"


def test_what_is_made_of_a_model_that_nobody_tells_of_is_told_by_its_hash(bases: list[Evaluation]) -> None:
    made = [refined(seed, 0.2, base) for seed, base in enumerate(bases)]
    assert labels(made) == [f"Guided (recommender.guided.base sasrec/{base.hash[:8]})" for base in bases]
    assert bases[0].hash[:8] != bases[1].hash[:8]


def test_one_seed_over_bases_of_several_stays_several_rows(bases: list[Evaluation]) -> None:
    """None of them takes another's place."""
    made = [*bases, refined(0, 0.2, bases[0]), refined(0, 0.3, bases[1]), refined(1, 0.4, bases[1])]
    told = {model: seeds for (model, _), seeds in rows(made).items() if model.startswith("Guided")}
    assert told == {
        "Guided (recommender.guided.base.trainer.seed 0)": (0,),
        "Guided (recommender.guided.base.trainer.seed 1)": (0, 1),
    }


def test_seeds_that_were_trained_on_other_histories_are_not_joined() -> None:
    made = [
        replace(evaluated(seed, 0.1 + seed / 100), versions={"histories": version, "items": 1})
        for seed, version in ((0, 1), (1, 1), (0, 2))
    ]
    assert labels(made[:2]) == ["SASRec", "SASRec"]
    assert labels([made[0], made[2]]) == ["SASRec", "SASRec"], "of one seed the newer takes the older's place"
    assert labels(made) == ["SASRec (histories 1)", "SASRec (histories 1)", "SASRec (histories 2)"]


def test_bases_that_were_trained_on_other_histories_tell_what_is_made_of_them_apart(bases: list[Evaluation]) -> None:
    dated = [replace(base, versions={"histories": number}) for number, base in enumerate(bases)]
    made = [*dated, *(refined(seed, 0.2, base) for seed, base in enumerate(dated))]
    assert labels(made)[2:] == [f"Guided (recommender.guided.base.histories {number})" for number in (0, 1)]


def stored(uri: str, folder: Path, name: str, **lineage: object) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(folder.name)
    of_any = {"hold_out": 1, "held_out_share": 0.0, "config": {}, "options": {}, "training": {}, "versions": {}}
    return Models(Store(uri)).add(name, folder, "recipe", {**of_any, **lineage})


def config_of(seed: int, **guided: object) -> dict[str, Any]:
    return {"recommender": {"model": "sasrec", **({"guided": guided} if guided else {})}, "trainer": {"seed": seed}}


def test_records_tell_how_a_base_was_made_whether_it_was_evaluated_or_not(tmp_path: Path) -> None:
    uri = str(tmp_path / "home")
    cut: dict[str, Any] = {"hold_out": 1, "protocol": {}, "versions": {"histories": 3, "items": 1}}
    scores = stored(uri, tmp_path / "g", "guided", seed=0, config={"asked": 1}, options={"tuned": False}, **cut)
    for seed in (0, 1):
        base = stored(uri, tmp_path / f"b{seed}", "sasrec", seed=seed, config=config_of(seed), **cut)
        guided = config_of(seed, base=f"sasrec/{base.hash}", scores=f"guided/{scores.hash}")
        model = stored(uri, tmp_path / f"m{seed}", "sasrec", seed=seed, config=guided, **cut)
        record_recommender(Workspace(uri), model, {"sasrec": {"NDCG@10": Mean(0.1, 0.0)}}, HELD, True)
    found = Evaluations(Store(uri)).all()
    assert rows(found) == {("Guided zero-shot", "SASRec"): (0, 1)}
    assert {one.versions["histories"] for one in found} == {3}
    assert {part.seed for one in found for part in one.parts.values()} == {0, 1}


def test_seeds_of_a_system_beside_recommenders_of_their_own_seeds_are_one_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "home")
    options = TrsrConfig().model_dump(mode="json")
    for seed, width in ((0, 64), (1, 64), (2, 32)):
        config = {"recommender": {"model": "sasrec", "width": width}, "trainer": {"seed": seed}}
        beside = stored(uri, tmp_path / f"b{seed}", "sasrec", seed=seed, config=config)
        named = f"sasrec/{beside.hash}"
        model = stored(uri, tmp_path / f"m{seed}", "trsr", seed=seed, options=options, recommender=named)
        metrics = {"asked": 9, "Recall@3": 0.3 + seed / 10, "sasrec: Recall@3": 0.2 + seed / 10}
        asked = AlignConfig(workspace=uri, system="trsr", held_out_share=0, model=named)
        record(asked, JobResult("align", "ok", models={"trsr": model.hash}, metrics=metrics))
    evaluations = Evaluations(Store(uri)).all()
    assert {name: seeds for (name, _), seeds in rows(evaluations[:2]).items() if name != "chance"} == {
        "LLM-TRSR": (0, 1),
        "SASRec": (0, 1),
    }
    assert {name: seeds for (name, _), seeds in rows(evaluations).items() if name != "chance"} == {
        "LLM-TRSR (recommender.recommender.width 64)": (0, 1),
        "LLM-TRSR (recommender.recommender.width 32)": (2,),
        "SASRec (recommender.width 64)": (0, 1),
        "SASRec (recommender.width 32)": (2,),
    }


def test_scores_that_were_tuned_elsewhere_say_by_which_beside_an_option_of_that_name(tmp_path: Path) -> None:
    uri = str(tmp_path / "home")
    for number, tuned in enumerate((None, f"guided/{'a' * 32}", f"guided/{'b' * 32}")):
        options = {"tuned": True}
        model = stored(uri, tmp_path / f"m{number}", "guided", seed=0, config={}, options=options, tuned=tuned)
        asked = AlignConfig(workspace=uri, system="guided", adapter=tuned)
        result = JobResult("align", "ok", models={"guided": model.hash}, metrics={"asked": 9, "HR@10": number / 10})
        record(asked, result)
    figures = [one for one in figures_of(Evaluations(Store(uri)).all(), "shop") if one.metric == "HR@10"]
    assert sorted(figure.value for figure in figures) == [0, 0.1, 0.2]
