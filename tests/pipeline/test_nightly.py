"""The night end to end with the echo engine: each step only if it has to, the manifest last, and a way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import RaypipeError
from raypipe.pipeline import nightly
from raypipe.pipeline.extract import state_recipe
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from raypipe.pipeline.recommend import RecommendConfig, run_recommend
from raypipe.pipeline.summarize import SummarizeConfig, run_summarize
from raypipe.pipeline.user_rows import change_keys
from raypipe.runtime.job import JobResult
from raypipe.storage.models import Models
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.nights import Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph, table_versions
from tests.pipeline.small_logs import (
    CHAIN_ITEMS,
    CHAIN_LENGTH,
    CHAIN_TRAINING,
    CHAIN_USERS,
    DAY,
    SMALL_ITEMS,
    SMALL_LOG,
    START,
    full_cost,
    newest,
    write_catalogue,
    write_log,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_night_runs_is_nothing_to_do_again_and_can_be_put_back(raypipe: Run, tmp_path: Path, files: Path) -> None:
    uri = str(tmp_path / "workspace")
    catalogue = write_catalogue(files / "items.csv", SMALL_ITEMS)
    words = ("nightly", "--workspace", uri, "--summarize.engine.engine", "echo", "--ingest.catalogue.path", catalogue)
    words += ("--ingest.log.columns.time", "time", "--ingest.log.path")
    log = write_log(files / "monday.csv", SMALL_LOG)

    monday = raypipe(*words, log, "--date", "2026-01-05", "--online.keep", 1)
    assert (monday.code, monday.status) == (0, "ok")
    assert (monday.metrics["online.night"], monday.metrics["online.users"]) == ("2026-01-05", 25)
    assert monday.metrics["ingest.events_added"] == len(SMALL_LOG)
    assert monday.metrics["summarize.computed"] == 25
    nights = Nights(Store(uri))
    first = nights.current()
    assert first is not None
    tables = Workspace(uri).tables
    assert first.tables == {name: table.version() for name, table in tables.items() if table.version() >= 0}
    page = (tmp_path / "workspace/nights/2026-01-05/cards.html").read_text(encoding="utf-8")
    assert "25 users have a summary; 12 of them" in page
    assert page.count("<article>") == 12

    again = raypipe(*words, log, "--date", "2026-01-06")
    assert (again.code, again.status) == (0, "nothing_to_do")
    assert nights.dates() == ["2026-01-05"]
    assert again.result["cost"]["calls"] == 0

    more = write_log(files / "tuesday.csv", [("u2", "i1", START + 99 * DAY)])
    tuesday = raypipe(*words, more, "--date", "2026-01-06")
    assert (tuesday.status, tuesday.metrics["summarize.computed"]) == ("ok", 1)
    assert raypipe("night", "--workspace", uri).metrics == {
        "nights": ["2026-01-05", "2026-01-06"],
        "current": "2026-01-06",
    }

    assert raypipe("night", "--workspace", uri, "--restore", "2026-01-05").code == 0
    restored = nights.current()
    assert restored == first
    old = tables["summaries"].read(restored.tables["summaries"])
    assert "u2" in old["user_id"].to_pylist()
    assert not old.equals(newest(uri, "summaries"))
    unknown = raypipe("night", "--workspace", uri, "--restore", "2025-01-01")
    assert (unknown.code, unknown.status) == (2, "failed")
    assert raypipe("status", "--workspace", uri).metrics["night"] == "2026-01-05"


def test_a_night_keeps_up_its_own_kind_of_summaries_and_no_other_is_served(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    log = write_log(files / "log-2026-01-05.csv", SMALL_LOG)
    night = (*nightly_words(uri, files)[:-1], log, "--date", "2026-01-05", "--online.grace_s", 0)
    assert raypipe(*night).metrics["online.summaries"] == {"hierarchical": 25}
    once = ("--engine.engine", "echo", "--summaries.paradigm", "recurrent")
    assert raypipe("summarize", "--workspace", uri, *once).metrics["computed"] == 25
    again = raypipe(*night)
    assert (again.status, again.metrics["online.summaries"]) == ("ok", {"hierarchical": 25})
    assert raypipe(*night).status == "nothing_to_do"
    # Nothing is to be written, and yet it is another night: of the summaries that it keeps up from now on.
    other = raypipe(*night, "--summarize.summaries.paradigm", "recurrent")
    assert (other.status, other.metrics["online.summaries"], other.result["cost"]["calls"]) == (
        "ok",
        {"recurrent": 25},
        0,
    )
    current = Nights(Store(uri)).current()
    assert current is not None
    assert current.summaries == "summarize-recurrent"


BACKFILL = ("--date", "2026-01-30", "--until", "2026-02-01")


def nightly_words(uri: str, files: Path) -> tuple[str | Path, ...]:
    """Nights of a log for each date, the path last."""
    catalogue = write_catalogue(files / "items.csv", SMALL_ITEMS)
    words = ("nightly", "--workspace", uri, "--summarize.engine.engine", "echo", "--ingest.catalogue.path", catalogue)
    return (*words, "--ingest.log.columns.time", "time", "--ingest.log.path", files / "log-{date}.csv")


def test_a_backfill_is_a_night_for_each_date_and_goes_on_where_it_stopped(
    raypipe: Run, tmp_path: Path, files: Path
) -> None:
    uri = str(tmp_path / "workspace")
    words = nightly_words(uri, files)
    backfill = (*words, *BACKFILL)
    third = len(SMALL_LOG) // 3
    write_log(files / "log-2026-01-30.csv", SMALL_LOG[:third])
    write_log(files / "log-2026-01-31.csv", SMALL_LOG[third : 2 * third])
    stopped = raypipe(*backfill)
    assert (stopped.code, stopped.status) == (2, "failed")
    assert "log-2026-02-01.csv" in stopped.stderr
    assert raypipe("night", "--workspace", uri).metrics["nights"] == ["2026-01-30", "2026-01-31"]
    write_log(files / "log-2026-02-01.csv", SMALL_LOG[2 * third :])
    ended = raypipe(*backfill)
    assert (ended.code, ended.status, ended.metrics["nights"]) == (0, "ok", 3)
    assert raypipe("night", "--workspace", uri).metrics["current"] == "2026-02-01"
    tables = Workspace(uri).tables
    assert [tables[name].version() for name in ("histories", "summaries")] == [2, 2]
    whole = str(tmp_path / "whole")
    log = write_log(files / "whole.csv", SMALL_LOG)
    assert raypipe(*words[:1], "--workspace", whole, *words[3:-1], log).code == 0
    assert newest(uri, "summaries")["summary"].equals(newest(whole, "summaries")["summary"])
    again = raypipe(*backfill)
    assert (again.status, again.result["cost"]["calls"]) == ("nothing_to_do", 0)


def test_a_backfill_that_was_killed_leaves_earlier_nights_as_they_were(
    raypipe: Run, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when the second night's events are in, and its summaries are not."""
    uri = str(tmp_path / "workspace")
    words = nightly_words(uri, files)
    backfill = (*words, *BACKFILL)
    third = len(SMALL_LOG) // 3
    for day, date in enumerate(("2026-01-30", "2026-01-31", "2026-02-01")):
        write_log(files / f"log-{date}.csv", SMALL_LOG[day * third : (day + 1) * third if day < 2 else None])
    steps = []

    def summarize(config: SummarizeConfig, night: NightRuns) -> JobResult:
        steps.append(config)
        if len(steps) == 2:
            raise RaypipeError("The machine went down.", "Submit it again.")
        return run_summarize(config, night)

    monkeypatch.setattr(nightly, "run_summarize", summarize)
    assert raypipe(*backfill).code == 1
    nights = Nights(Store(uri))
    first = nights.get("2026-01-30")
    assert (nights.dates(), Workspace(uri).tables["histories"].version()) == (["2026-01-30"], 1)
    ended = raypipe(*backfill)
    assert (ended.code, ended.status, ended.metrics["nights"]) == (0, "ok", 3)
    assert nights.get("2026-01-30") == first
    found = [nights.get(date) for date in nights.dates()]
    assert [night.tables["histories"] for night in found if night is not None] == [0, 1, 2]
    again = raypipe(*words, "--date", "2026-01-31")
    assert (again.code, again.status) == (2, "failed")
    assert "The night of 2026-01-31 is published, and so is that of 2026-02-01" in again.stderr
    assert nights.get("2026-01-31") == found[1]
    assert raypipe(*words[:-1], files / "log-2026-02-01.csv", "--date", "2026-02-01").status == "nothing_to_do"


@pytest.mark.parametrize(
    ("dates", "problem"),
    [
        (("--until", "2026-01-30"), "has no first date before it"),
        (("--date", "2026-01-31", "--until", "2026-01-30"), "has no first date before it"),
        (("--date", "2026-01-01", "--until", "2026-01-30"), "the log's path names none"),
        (("--date", "2026-02-30"), "2026-02-30"),
    ],
)
def test_dates_that_make_no_sense_are_refused_before_work_starts(
    raypipe: Run, tmp_path: Path, dates: tuple[str, ...], problem: str
) -> None:
    log = ("--ingest.log.path", tmp_path / "log.csv", "--ingest.log.columns.time", "time")
    ended = raypipe("nightly", "--workspace", tmp_path / "workspace", *log, *dates)
    assert (ended.code, ended.status) == (2, "failed")
    assert problem in ended.stderr
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("--train.hold_out", 0, "--train.trainer.validate_every", "null"),
            "set train.hold_out to 2 or more, to 1 if nothing is validated, or train_policy to never.",
        ),
        (("--gate.metric", "NDGC@10"), "Config key 'gate.metric' is 'NDGC@10': `evaluate` has no such metric; it has"),
    ],
)
def test_a_training_that_no_gate_can_judge_is_refused_before_work_starts(
    raypipe: Run, tmp_path: Path, options: tuple[object, ...], problem: str
) -> None:
    ended = raypipe("nightly", "--workspace", tmp_path / "workspace", "--train_policy", "nightly", *options)
    assert (ended.code, ended.status) == (2, "failed")
    assert problem in one_paragraph(ended.stderr)
    assert not (tmp_path / "workspace").exists()


def test_a_step_that_fails_leaves_the_night_before_in_force(
    raypipe: Run, summarised: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("nightly", "--workspace", summarised, "--summarize.engine.engine", "echo", "--date")
    assert raypipe(*words, "2026-01-05").status == "ok"
    before = Nights(Store(summarised)).current()

    def fail(*_: object) -> None:
        raise RaypipeError("The cards cannot be written.", "Try again.")

    monkeypatch.setattr("raypipe.pipeline.nightly.write_cards", fail)
    log = write_log(files / "more.csv", [("u2", "i1", START + 99 * DAY)])
    more = ("--ingest.log.path", log, "--ingest.log.columns.time", "time")
    failed = raypipe(*words, "2026-01-06", *more)
    assert (failed.code, failed.status) == (1, "failed")
    assert Nights(Store(summarised)).current() == before
    monkeypatch.undo()
    assert raypipe(*words, "2026-01-06", *more).status == "ok"
    current = Nights(Store(summarised)).current()
    assert current is not None
    assert current.date == "2026-01-06"


def test_a_night_that_is_submitted_again_spends_its_caps_once_and_tells_all_that_it_cost(
    raypipe: Run, ingested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("nightly", "--workspace", ingested, "--summarize.engine.engine", "echo", "--summarize.max_calls", 20)
    words += ("--summarize.price_in", 1000, "--date")

    def fail(*_: object) -> None:
        raise RaypipeError("The cards cannot be written.", "Try again.")

    with monkeypatch.context() as patch:
        patch.setattr("raypipe.pipeline.nightly.write_cards", fail)
        assert raypipe(*words, "2026-01-05").code == 1
    capped = Workspace(ingested).ledger("summarize").newest()
    assert capped is not None
    first = capped.result()
    assert first is not None
    assert 0 < first["cost"]["calls"] <= 20
    assert first["metrics"]["capped"] > 0
    again = raypipe(*words, "2026-01-05")
    assert (again.code, again.status) == (0, "ok"), again.stderr
    counted = ("calls", "tokens_in", "tokens_out", "money")
    assert {name: again.result["cost"][name] for name in counted} == {name: first["cost"][name] for name in counted}
    told = {f"summarize.{name}": value for name, value in first["metrics"].items()}
    assert {name: again.metrics[name] for name in told} == told
    assert again.result["run_key"] == capped.run_key
    published = Nights(Store(ingested)).current()
    assert published is not None
    assert published.metrics["summarize"] == first["metrics"]
    # What the caps left is the next night's, and so are the caps.
    tomorrow = raypipe(*words, "2026-01-06")
    assert (tomorrow.status, 0 < tomorrow.result["cost"]["calls"] <= 20) == ("ok", True)
    assert tomorrow.metrics["summarize.computed"] > 0


def test_the_passes_of_a_night_share_its_caps(
    raypipe: Run, ingested: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def summarize(config: SummarizeConfig, night: NightRuns) -> JobResult:
        result = run_summarize(config, night)
        ran.append(int(result.cost["calls"]))
        if len(ran) == 1:
            ingest_one(ingested, files, SMALL_ITEMS + 1)
        return result

    monkeypatch.setattr(nightly, "run_summarize", summarize)
    words = ("--summarize.engine.engine", "echo", "--summarize.max_calls", 20, "--date", "2026-01-05")
    ended = raypipe("nightly", "--workspace", ingested, *words)
    assert (ended.code, len(ran)) == (0, 2), ended.stderr
    assert ended.result["cost"]["calls"] == sum(ran) <= 20


def ingest_one(uri: str, files: Path, item: int) -> None:
    """An event of u2 with an item that is new, as another process would."""
    log = write_log(files / f"meanwhile-{item}.csv", [("u2", f"i{item}", START + (99 + item) * DAY)])
    catalogue = write_catalogue(files / f"items-{item}.csv", item)
    options = {"log": {"path": str(log), "columns": {"time": "time"}}, "catalogue": {"path": str(catalogue)}}
    shared = {"workspace": uri, "tracking": "off", "cluster": {"workers": 1}}
    assert run_ingest(IngestConfig.model_validate({**shared, **options})).status == "ok"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_night_into_which_somebody_ingests_is_of_one_version_of_histories_and_items(
    raypipe: Run, trained: str, files: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The ingest lands before the night summarises, when states and lists are made, or after."""
    recommender = Models(Store(trained)).newest("sasrec")
    assert recommender is not None
    releases = Releases(Store(trained))
    releases.point("champion", releases.add(Release(f"sasrec/{recommender.hash}", "echo")))
    words = ("nightly", "--workspace", trained, "--summarize.engine.engine", "echo")
    ran: list[str] = []

    def summarize(config: SummarizeConfig, night: NightRuns) -> JobResult:
        ran.append(when)
        if ran == ["before"]:
            ingest_one(trained, files, CHAIN_ITEMS + 1)
        result = run_summarize(config, night)
        if ran == ["after"]:
            ingest_one(trained, files, CHAIN_ITEMS + 1)
        return result

    monkeypatch.setattr(nightly, "run_summarize", summarize)
    night = raypipe(*words, "--date", "2026-01-05", "--online.keep", 1)
    assert (night.code, night.status) == (0, "ok"), night.stderr
    assert "another job published histories, items or other rows" in night.stderr
    published = Nights(Store(trained)).current()
    assert published is not None
    tables = Workspace(trained).tables
    assert published.tables == table_versions(trained)
    assert published.tables == {name: table["version"] for name, table in night.result["tables"].items()}
    # Everybody's rows are of the histories that the manifest names.
    states = tables["hidden_states"].read(published.tables["hidden_states"], ["user_id", "change_key"])
    histories = tables["histories"].read(published.tables["histories"], ["user_id", "history_key"])
    keys = change_keys(histories["history_key"].combine_chunks(), state_recipe(recommender.hash))
    assert sorted(zip(*states.to_pydict().values(), strict=True)) == sorted(
        zip(histories["user_id"].to_pylist(), keys.to_pylist(), strict=True)
    )
    assert night.metrics["online.states"] == CHAIN_USERS
    # What each pass did is told apart, and what they cost is told together: u2's second block and its merge anew.
    did = {name: night.metrics[f"{name}.computed"] for name in ("extract.pass1", "extract", "summarize")}
    assert did == {"extract.pass1": CHAIN_USERS, "extract": 1, "summarize": CHAIN_USERS if when == "before" else 1}
    assert ("summarize.pass1.computed" in night.metrics) == (when == "after")
    assert published.metrics["extract.pass1"]["computed"] == CHAIN_USERS
    calls = CHAIN_USERS * full_cost(CHAIN_LENGTH)
    assert night.result["cost"]["calls"] == (calls if when == "before" else calls + 2)
    assert night.result["run_key"]


def test_a_night_is_of_the_lists_that_it_made_itself(
    raypipe: Run, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = Models(Store(trained)).newest("sasrec")
    assert recommender is not None
    releases = Releases(Store(trained))
    releases.point("champion", releases.add(Release(f"sasrec/{recommender.hash}", "echo")))
    ran: list[str] = []

    def summarize(config: SummarizeConfig, night: NightRuns) -> JobResult:
        if not ran:  # somebody tries shorter lists, under the same name
            tried = {"workspace": trained, "tracking": "off", "cluster": {"workers": 1}, "length": 2}
            assert run_recommend(RecommendConfig.model_validate(tried)).status == "ok"
        ran.append("summarize")
        return run_summarize(config, night)

    monkeypatch.setattr(nightly, "run_summarize", summarize)
    words = ("--summarize.engine.engine", "echo", "--recommend.length", 3, "--date", "2026-01-05")
    night = raypipe("nightly", "--workspace", trained, *words)
    assert (night.code, len(ran)) == (0, 2), night.stderr
    assert "another job published histories, items or other rows" in night.stderr
    published = Nights(Store(trained)).current()
    assert published is not None
    lists = Workspace(trained).tables["recommendations"].read(published.tables["recommendations"], ["items"])
    assert {len(items) for items in lists["items"].to_pylist()} == {3}


def test_a_night_that_no_cap_lets_summarise_is_a_night_all_the_same(raypipe: Run, ingested: str) -> None:
    words = ("--summarize.engine.engine", "echo", "--summarize.max_calls", 0, "--date", "2026-01-05")
    night = raypipe("nightly", "--workspace", ingested, *words)
    assert (night.code, night.status) == (0, "ok"), night.stderr
    assert night.metrics["summarize.capped"] > 0
    published = Nights(Store(ingested)).current()
    assert published is not None
    assert "summaries" not in published.tables


def test_a_night_fails_where_somebody_ingests_all_the_time_and_the_one_before_stays(
    raypipe: Run, summarised: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("nightly", "--workspace", summarised, "--summarize.engine.engine", "echo", "--date")
    assert raypipe(*words, "2026-01-05").status == "ok"
    before = Nights(Store(summarised)).current()
    ran: list[SummarizeConfig] = []

    def summarize(config: SummarizeConfig, night: NightRuns) -> JobResult:
        ran.append(config)
        ingest_one(summarised, files, SMALL_ITEMS + len(ran))
        return run_summarize(config, night)

    with monkeypatch.context() as patch:
        patch.setattr(nightly, "run_summarize", summarize)
        failed = raypipe(*words, "2026-01-06")
    assert len(ran) == 3
    assert (failed.code, failed.status) == (1, "failed")
    assert "during each of the 3 times that its steps ran" in one_paragraph(failed.stderr)
    assert Nights(Store(summarised)).current() == before
    assert raypipe(*words, "2026-01-06").status == "ok"


def test_a_night_trains_judges_recommends_and_a_refusal_keeps_the_release_in_force(
    raypipe: Run, trained: str, files: Path
) -> None:
    words = ("nightly", "--workspace", trained, "--summarize.engine.engine", "echo", "--recommend.length", 5)
    plain = raypipe(*words, "--date", "2026-01-04")
    assert (plain.code, plain.status) == (0, "ok")
    assert "recommendations" not in plain.result["tables"]

    trains = (*words, "--train_policy", "nightly", *(str(word).replace("--", "--train.") for word in CHAIN_TRAINING))
    monday = raypipe(*trains, "--date", "2026-01-05")
    assert (monday.code, monday.status) == (0, "ok"), monday.stderr
    assert monday.metrics["recommend.computed"] == monday.metrics["extract.computed"] == CHAIN_USERS
    assert raypipe("online", "--workspace", trained).metrics["states"] == CHAIN_USERS
    nights = Nights(Store(trained))
    first = nights.current()
    assert first is not None
    assert first.release["recommender"].startswith("sasrec/")
    assert first.release["lm"] == "echo"
    assert raypipe(*trains, "--date", "2026-01-06").status == "nothing_to_do"

    # What came overnight, and a training too short to learn anything.
    log = write_log(files / "more.csv", [("u1", "i1", START + 99 * DAY)])
    short = (*trains, "--ingest.log.path", log, "--ingest.log.columns.time", "time", "--train.trainer.steps", 1)
    short += ("--extract.positions", "all")
    tuesday = raypipe(*short, "--date", "2026-01-06")
    assert (tuesday.code, tuesday.status) == (3, "refused")
    assert "of the release in force, which stays" in tuesday.stderr
    second = nights.current()
    assert second is not None
    assert (second.date, second.release) == ("2026-01-06", first.release)
    assert second.tables["recommendations"] > first.tables["recommendations"]
    assert tuesday.metrics["recommend.computed"] == 1
    # States after every event are another variant: those that are loaded are monday's, and u1's history is not.
    assert raypipe("online", "--workspace", trained).metrics["states"] == CHAIN_USERS - 1
    # Judged once: the same night again has nothing to do, and refuses nothing.
    assert raypipe(*short, "--date", "2026-01-07").status == "nothing_to_do"


def test_a_refusal_is_told_again_until_a_night_has_ended_with_it_and_belongs_to_its_gate(
    raypipe: Run, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raypipe("release", "--workspace", trained, "--recommender", "sasrec").code == 0
    words = ("nightly", "--workspace", trained, "--summarize.engine.engine", "echo", "--train_policy", "nightly")
    words += tuple(str(word).replace("--", "--train.") for word in CHAIN_TRAINING)
    words += ("--train.trainer.steps", 1, "--date")
    releases, nights = Releases(Store(trained)), Nights(Store(trained))
    before = releases.named("champion")

    def fail(*_: object) -> None:
        raise RaypipeError("The machine went down.", "Submit it again.")

    with monkeypatch.context() as patch:
        patch.setattr(nightly, "run_summarize", fail)
        assert raypipe(*words, "2026-01-05").code == 1
        assert nights.dates() == []
    again = raypipe(*words, "2026-01-05")
    assert (again.code, again.status, nights.dates()) == (3, "refused", ["2026-01-05"]), again.stderr
    assert "of the release in force, which stays" in again.stderr
    later = raypipe(*words, "2026-01-06")
    assert (later.code, later.status) == (0, "nothing_to_do")
    champion = releases.named("champion")
    assert before is not None
    assert champion is not None
    assert champion.recommender == before.recommender
    looser = raypipe(*words, "2026-01-06", "--gate.least_share", 0, "--no-gate.beats_popularity")
    assert (looser.code, looser.status) == (0, "ok"), looser.stderr
    champion = releases.named("champion")
    assert champion is not None
    assert champion.recommender != before.recommender
