"""`report`: what a workspace recorded and golden tables hold, on one page and in Markdown, as a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from raypipe.metrics.published import chance_among
from raypipe.pipeline.report import _judged as judged
from raypipe.pipeline.report_drawings import plots_of
from raypipe.pipeline.report_figures import Figure, labels, proper
from raypipe.pipeline.report_plots import ticks
from raypipe.pipeline.report_tables import findings, tables_of
from raypipe.storage.evaluations import Evaluation, Evaluations, Measured
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run, unavailable
from tests.ground import one_paragraph

TABLES = Path(__file__).parents[1] / "golden"
# Of each system's golden table a row and a column that the page shows.
SYSTEMS = {
    "trsr-amazon-industrial": ("LLM-TRSR, no summaries", "Recall@3"),
    "lancer-ml-100k": ("LANCER no prompts", "Recall@5"),
    "guided-amazon-industrial": ("Guided shuffled", "NDCG@10"),
    "alignment-ml-100k": ("RecExplainer-H", "T1 HR@5"),
}
GOLDEN = [*sorted(TABLES.glob("recommenders-*.json")), *(TABLES / f"{name}.json" for name in SYSTEMS)]
PROTOCOL = "leave-one-out, whole catalogue, seen items filtered"
HOSTILE = "<script>document.title='owned'</script>"


def evaluation(name: str, seed: int, ndcg: float, **settings: Any) -> Evaluation:
    """As `evaluate` records a recommender beside its floors."""
    lengths = {f"HR@10 length {one}": ndcg + place / 20 for place, one in enumerate(("1–10", "11–20", "> 200"))}
    own = {"HR@10": 2 * ndcg, "NDCG@10": ndcg, **lengths, "coverage@10": 0.5}
    shares = {"attribute share: what was learnt of the history": 0.6, f"attribute share: {HOSTILE}": 0.4}
    return Evaluation(
        job="evaluate",
        name=name,
        hash=f"{name}{seed}{ndcg}",
        recommender="",
        protocol=PROTOCOL,
        seed=seed,
        figures={
            "transitions": {"NDCG@10": Measured(0.2, 0.01)},
            name: {metric: Measured(value, 0.02) for metric, value in (own | shares).items()},
        },
        switches={"loss": "softmax"},
        settings={"recommender": {"model": name, **settings}},
        training={
            "seconds": 12.0,
            "steps": 300,
            "losses": [[step, 5 - step / 100] for step in range(100, 301, 100)],
            "validations": [[150, 0.1], [300, 0.2]],
        },
    )


def alignment() -> Evaluation:
    """As `align` records an adapter beside probes and controls."""
    places = {f"recovery by place {place}": 0.5 / place for place in range(1, 6)}
    beside = {"shuffled states": 0.04, "probe of states": 0.29, "probe of tokens": 0.28, "probe of hidden states": 0.27}
    figures = {"recinterpreter": {"recovery": Measured(0.25), **{name: Measured(v) for name, v in places.items()}}}
    figures |= {f"recinterpreter, {name}": {"recovery": Measured(value)} for name, value in beside.items()}
    return Evaluation("align", "recinterpreter", "ri", "sasrec", "users held out", 0, figures)


@pytest.fixture
def measured(tmp_path: Path) -> str:
    uri = str(tmp_path / "workspace")
    records = Evaluations(Store(uri))
    records.put(evaluation("sasrec", 0, 0.3), {})
    records.put(evaluation("sasrec", 1, 0.34), {})
    records.put(evaluation("gru4rec", 0, 0.15), {})
    records.put(alignment(), {})
    Store(uri).put("workspace.json", b'{"buckets":4,"format":1,"kind":"time"}')
    return uri


def test_seeds_become_mean_and_spread_beside_intervals_over_users(raypipe: Run, measured: str) -> None:
    ended = raypipe("report", "--workspace", measured, "--dataset", "shop")
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    table = Path(ended.metrics["tables"]).read_text()
    assert Path(ended.metrics["page"]) == Path(measured) / "reports/report.html"
    assert "| SASRec (loss: softmax) | 0.6400 ± 0.0200 (sd 0.0566) | 0.3200 ± 0.0200 (sd 0.0283) | 0, 1 |" in table
    assert "| transitions |  | 0.2000 ± 0.0100 | 0 |" in table
    assert "- NDCG@10: SASRec is best with 0.3200; the best floor, transitions, has 0.2000." in table
    assert "- recovery: RecInterpreter beside SASRec has 0.2500." in table
    assert "- GRU4Rec does not reach transitions: NDCG@10 0.1500 against 0.2000." in table
    assert "| RecInterpreter, shuffled states | SASRec | 0.0400 | 0 |" in table
    assert "| SASRec (loss: softmax) | 300 (sd 0) | 12.0 (sd 0.0) | 0, 1 |" in table
    again = raypipe("report", "--workspace", measured, "--dataset", "shop")
    assert (again.status, again.result["run_key"]) == ("nothing_to_do", ended.result["run_key"])


def test_what_is_told_lies_with_its_run_in_the_tracking_store(raypipe: Run, measured: str) -> None:
    ended = raypipe("report", "--workspace", measured, "--dataset", "shop", "--tracking", "auto", "--title", "Nightly")
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    client = MlflowClient(f"sqlite:///{measured}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raypipe").experiment_id])
    assert (run.data.tags["raypipe.job"], run.data.tags["raypipe.run_key"]) == ("report", ended.result["run_key"])
    assert run.data.params == {"title": "Nightly"}
    assert run.data.metrics == {name: ended.metrics[name] for name in ("figures", "models")}
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"report.html", "report.md"}
    for name, place in (("report.html", "page"), ("report.md", "tables")):
        text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}")
        assert text == Path(ended.metrics[place]).read_text()


def test_a_second_measurement_of_a_model_takes_the_place_of_the_first(raypipe: Run, measured: str) -> None:
    newer = evaluation("sasrec", 1, 0.4)
    Evaluations(Store(measured)).put(newer, {})
    ended = raypipe("report", "--workspace", measured, "--dataset", "shop")
    assert "| 0.3500 ±" in Path(ended.metrics["tables"]).read_text()


def test_models_of_one_name_are_told_apart_by_what_differs() -> None:
    made = [evaluation("sasrec", 0, 0.3, width=64), evaluation("sasrec", 1, 0.3, width=64)]
    assert labels(made) == ["SASRec", "SASRec"]
    made.append(evaluation("sasrec", 0, 0.3, width=32, block="shuffled"))
    assert labels(made)[1:] == [
        "SASRec (recommender.width 64)",
        "SASRec (recommender.block shuffled; recommender.width 32)",
    ]


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("sasrec", "SASRec"),
        ("sasrec-sampled", "SASRec sampled"),
        ("recexplainer-h", "RecExplainer-H"),
        ("recexplainer-h, shuffled users", "RecExplainer-H, shuffled users"),
        ("RecInterpreter, no states", "RecInterpreter, no states"),
        ("Guided zero-shot", "Guided zero-shot"),
        ("popularity", "popularity"),
    ],
)
def test_names_are_spelt_as_in_their_papers(name: str, spelt: str) -> None:
    assert proper(name) == spelt


def figure(model: str, metric: str, value: float, dataset: str = "ml-1m", seed: int = 0) -> Figure:
    return Figure(dataset, PROTOCOL, model, "", metric, value, seed)


def test_what_is_published_of_the_data_and_chance_stand_in_the_table() -> None:
    figures = [figure("SASRec", "NDCG@10", 0.19), figure("RecExplainer-H", "T2 NDCG@5", 0.9)]
    ranking, agreement = tables_of("ml-1m", figures)
    assert [(row.model, row.kind) for row in ranking.rows] == [("SASRec", "model"), ("SASRec, published", "published")]
    assert ranking.rows[1].cells["NDCG@10"].value == 0.1857
    assert [(row.model, row.cells["T2 NDCG@5"].value) for row in agreement.rows] == [
        ("chance", 0.6131),
        ("RecExplainer-H", 0.9),
    ]
    assert [row.model for row in tables_of("ml-100k", figures[:1])[0].rows] == ["SASRec"]
    kept = replace(figures[0], protocol=PROTOCOL.replace("filtered", "kept"))
    assert [row.model for row in tables_of("ml-1m", [kept])[0].rows] == ["SASRec"], "what is published is filtered"


def test_a_control_as_good_as_its_model_is_said_first() -> None:
    figures = [
        figure("Guided", "NDCG@10", 0.10),
        figure("Guided shuffled", "NDCG@10", 0.11),
        figure("Guided random, users absent", "NDCG@10", 0.05),
    ]
    told = findings(tables_of("shop", figures))
    assert told[1:] == ["The control Guided shuffled is as good as Guided: NDCG@10 0.1100 against 0.1000."]


def test_a_second_training_the_base_and_surrogates_are_no_models_of_their_own() -> None:
    figures = [
        figure("Guided", "NDCG@10", 0.10),
        figure("Guided again", "NDCG@10", 0.11),
        figure("Guided base", "NDCG@10", 0.09),
        figure("LANCER", "NDCG@10", 0.10),
        figure("LANCER base LM", "NDCG@10", 0.12),
        figure("RecExplainer-H", "T1 HR@5 unseen", 0.5),
        figure("RecExplainer-H, linear surrogate", "T1 HR@5 unseen", 0.7),
    ]
    assert findings(tables_of("shop", figures)) == [
        "NDCG@10: LANCER base LM is best with 0.1200.",
        "The control Guided again is as good as Guided: NDCG@10 0.1100 against 0.1000.",
        "T1 HR@5 unseen: RecExplainer-H has 0.5000.",
        "The surrogate RecExplainer-H, linear surrogate is as good as RecExplainer-H: T1 HR@5 unseen 0.7000 against 0.5000.",
    ]


def test_the_judgement_that_was_made_last_is_told_whenever_its_file_was_written(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for name, created, mean in (("new", 2e9, 1.5), ("old", 1e9, 0.5)):
        told = {"what": "summarize-recurrent", "metrics": {"rule.mean": mean, "users": 3}, "created": created}
        workspace.store.put(f"judgements/{name}.json", json.dumps(told).encode())
    assert [(one.metric, one.value) for one in judged(workspace, "shop")] == [("rule.mean", 1.5)]


def test_a_system_is_judged_by_what_it_is_published_by() -> None:
    """By NDCG@10 alone LANCER would be above what it is made of without prompts."""
    models = {"LANCER": (0.11, 0.07, 0.10), "LANCER no prompts": (0.12, 0.08, 0.09), "SASRec": (0.3, 0.2, 0.25)}
    metrics = ("Recall@5", "NDCG@5", "NDCG@10")
    figures = [
        figure(model, metric, value)
        for model, values in models.items()
        for metric, value in zip(metrics, values, strict=True)
    ]
    mine = [one for one in figures if one.model != "SASRec"]
    ablation = "The control LANCER no prompts is as good as LANCER: Recall@5 0.1200 against 0.1100, NDCG@5 0.0800 against 0.0700."
    assert findings(tables_of("shop", mine)) == ["Recall@5: LANCER has 0.1100.", "NDCG@5: LANCER has 0.0700.", ablation]
    other = [figure("SASRec", "NDCG@10", 0.25)]
    assert "NDCG@10: SASRec is best with 0.2500." in findings(tables_of("shop", [*mine, *other]))
    unseen = [figure("RecExplainer-H", metric, 0.5) for metric in ("T1 HR@5", "T1 HR@5 unseen")]
    told = findings(tables_of("shop", unseen))
    assert told == ["T1 HR@5: RecExplainer-H has 0.5000.", "T1 HR@5 unseen: RecExplainer-H has 0.5000."]


def test_candidates_in_no_order_stand_beside_those_that_are_ranked() -> None:
    protocol = "leave-one-out, 21 candidates, last 25 events shown"
    ranked = [replace(figure("LLM-TRSR", metric, 0.05), protocol=protocol) for metric in ("Recall@3", "MRR@3")]
    (table,) = tables_of("shop", ranked)
    chance = {metric: cell.value for metric, cell in table.rows[0].cells.items()}
    assert (table.rows[0].model, chance["Recall@3"]) == ("chance", 3 / 21)
    assert chance["MRR@3"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 21)
    assert findings([table])[-1] == (
        "LLM-TRSR does not reach chance: Recall@3 0.0500 against 0.1429, MRR@3 0.0500 against 0.0873."
    )
    (whole,) = tables_of("shop", [figure("SASRec", "Recall@3", 0.2)])
    assert [row.model for row in whole.rows] == ["SASRec"]
    assert chance_among(2)["Recall@3"] == 1


def test_what_summaries_cost_is_told_under_cost() -> None:
    names = ("summary_calls", "summary_tokens_in", "summary_tokens_out", "summary_users", "tokens_asked")
    (table,) = tables_of("shop", [figure("LLM-TRSR", name, 7) for name in names])
    assert (table.section.title, set(table.metrics)) == ("Cost", set(names))


def test_a_floor_that_is_told_beside_several_systems_counts_once() -> None:
    """Each rounds it in its own way."""
    told = [figure("popularity", "NDCG@5", value) for value in (0.035816, 0.0358)]
    (table,) = tables_of("shop", [*told, figure("popularity", "NDCG@5", 0.05, seed=1)])
    cell = table.rows[0].cells["NDCG@5"]
    assert (cell.value, cell.seeds) == (pytest.approx((0.035816 + 0.05) / 2), (0, 1))


def test_hits_and_recall_of_one_relevant_item_are_one_column() -> None:
    """By two columns LANCER would be the best of those that its paper's word is used for."""
    figures = [figure("SASRec", "HR@10", 0.3), figure("LANCER", "Recall@10", 0.2), figure("LANCER", "Recall@5", 0.1)]
    (table,) = tables_of("ml-1m", [*figures, figure("SASRec", "HR@5", 0.2)])
    told = {row.model: row.cells["Recall@10"].value for row in table.rows}
    assert told == {"SASRec": 0.3, "LANCER": 0.2, "SASRec, published": 0.3159}
    assert table.metrics == ("Recall@5", "Recall@10")
    assert findings([table])[0] == "Recall@5: SASRec is best with 0.2000."
    (alone,) = tables_of("ml-1m", figures[:1])
    assert alone.metrics == ("HR@10",)


def test_no_figure_is_left_out() -> None:
    metrics = (
        "HR@10",
        "recovery",
        "T1 HR@5",
        "attribute_precision",
        "rule.mean",
        "collapse",
        "train_seconds",
        "unheard of",
    )
    tables = tables_of("shop", [figure("SASRec", metric, 0.5) for metric in metrics])
    assert [table.metrics for table in tables] == [(metric,) for metric in metrics]
    drawn = [figure("SASRec", f"recovery by place {place}", 0.5) for place in (1, 2)]
    assert tables_of("shop", drawn) == []
    assert len(plots_of(drawn)) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.37), (2.1, 4.9), (0, 30_000), (3, 3), (-0.2, 0.1)])
def test_ticks_are_round_and_hold_everything(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) == 1


def test_what_cannot_be_told_is_one_paragraph(raypipe: Run, tmp_path: Path) -> None:
    empty = raypipe("report", "--workspace", tmp_path / "none")
    assert empty.code == 2
    assert "Nothing was measured" in one_paragraph(empty.stderr)
    absent = raypipe("report", "--workspace", tmp_path / "none", "--golden", tmp_path / "none.json")
    assert (absent.code, "cannot be read: No such file" in one_paragraph(absent.stderr)) == (2, True)
    for text, told in (("[{}]", "0.dataset: Field required"), ("{", "it is no JSON"), ('{"rows": 1}', "valid list")):
        (tmp_path / "g.json").write_text(text)
        wrong = raypipe("report", "--workspace", tmp_path / "none", "--golden", tmp_path / "g.json")
        assert (wrong.code, told in one_paragraph(wrong.stderr)) == (2, True), wrong.stderr
    assert not (tmp_path / "none").exists()


class Outline(HTMLParser):
    """What a page asks for from elsewhere, and how its tables and drawings are named."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.unnamed = 0
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [
            str(given[name]) for name in ("src", "href") if name in given and not str(given[name]).startswith("#")
        ]
        if tag in {"table", "svg"}:
            self._open.append(tag)
        elif self._open and tag != {"table": "caption", "svg": "title"}[self._open.pop()]:
            self.unnamed += 1
        if tag == "th" and given.get("scope") not in {"col", "row"}:
            self.unnamed += 1


MEASURE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll') && !one.closest('svg') &&
  one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName);
const outside = [...document.querySelectorAll('svg')].flatMap(svg => [...svg.querySelectorAll('text, path, rect, circle')].filter(
  one => { const b = one.getBBox(), v = svg.viewBox.baseVal;
    return b.x < -1 || b.y < -1 || b.x + b.width > v.width + 1 || b.y + b.height > v.height + 1 }).map(one => one.textContent));
const covered = [...document.querySelectorAll('svg')].flatMap(svg => { const boxes = [...svg.querySelectorAll('text')].map(
  one => [one.textContent, one.getBBox()]); return boxes.flatMap(([name, a], at) => boxes.slice(at + 1).filter(([, b]) =>
    a.x < b.x + b.width && b.x < a.x + a.width && a.y + 3 < b.y + b.height && b.y + 3 < a.y + a.height).map(() => name)) });
const rows = [...document.querySelectorAll('table')].flatMap(table => { const [head, ...rows] = [...table.rows].map(
  row => [...row.cells].map(cell => cell.innerText.trim()));
  return rows.map(row => Object.fromEntries(row.map((text, at) => [at ? head[at] : 'first', text]))) });
document.title = JSON.stringify({rows, wide, outside, covered, tables: document.querySelectorAll('table').length,
  lines: document.querySelectorAll('path.line').length, bars: document.querySelectorAll('svg rect[rx]').length})
</script></body>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it_and_fetches_nothing(raypipe: Run, measured: str, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        unavailable("There is no chromium")
    golden = ["--golden", ",".join(map(str, GOLDEN))]
    ended = raypipe("report", "--workspace", measured, "--dataset", HOSTILE, *golden, "--folder", tmp_path / "out")
    assert ended.code == 0, ended.stderr
    page = Path(ended.metrics["page"]).read_text()
    outline = Outline()
    outline.feed(page)
    assert (outline.fetched, outline.unnamed) == ([], 0)
    assert not re.search(r"url\(|@import|<script", page)
    (tmp_path / "measured.html").write_text(page.replace("</body>", MEASURE))
    command = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", (tmp_path / "measured.html").as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&gt;", ">").replace("&lt;", "<"))  # type: ignore[index]
    assert (found["wide"], found["outside"], found["covered"]) == ([], [], [])
    assert found["tables"] > 20
    for name, (model, metric) in SYSTEMS.items():
        told = json.loads((TABLES / f"{name}.json").read_text())
        mean = fmean(one["value"] for one in told if (one["model"], one["metric"]) == (model, metric))
        shown_of = [row[metric] for row in found["rows"] if row["first"] == model and row.get(metric)]
        assert [text.split(" ")[0] for text in shown_of] == [f"{mean:.4f}"], name
    # Three data sets and ours by length, two trainings of sasrec and one of gru4rec with loss and validation, recovery.
    assert found["lines"] >= 10
    assert found["bars"] >= 9
