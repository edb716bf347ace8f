"""The night end to end with the echo engine: each step only if it has to, the manifest last, and a way back."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import RaypipeError
from raypipe.pipeline import nightly
from raypipe.pipeline.summarize import SummarizeConfig, run_summarize
from raypipe.runtime.job import JobResult
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.nights import Nights
from raypipe.storage.releases import Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.pipeline.small_logs import (
    CHAIN_TRAINING,
    CHAIN_USERS,
    DAY,
    SMALL_ITEMS,
    SMALL_LOG,
    START,
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


def test_a_night_that_no_cap_lets_summarise_is_a_night_all_the_same(raypipe: Run, ingested: str) -> None:
    words = ("--summarize.engine.engine", "echo", "--summarize.max_calls", 0, "--date", "2026-01-05")
    night = raypipe("nightly", "--workspace", ingested, *words)
    assert (night.code, night.status) == (0, "ok"), night.stderr
    assert night.metrics["summarize.capped"] > 0
    published = Nights(Store(ingested)).current()
    assert published is not None
    assert "summaries" not in published.tables


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
