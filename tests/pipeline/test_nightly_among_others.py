"""A night while others publish: it is of one version of what it reads, and of what its own steps wrote."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from raypipe.errors import RaypipeError, UnavailableError
from raypipe.pipeline import nightly
from raypipe.pipeline.extract import state_recipe
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from raypipe.pipeline.online import OnlineConfig
from raypipe.pipeline.recommend import RecommendConfig, run_recommend
from raypipe.pipeline.summarize import SummarizeConfig, run_summarize
from raypipe.pipeline.user_rows import change_keys
from raypipe.runtime.job import JobResult
from raypipe.storage.locks import hold
from raypipe.storage.models import Models
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.nights import Night, Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph, table_versions
from tests.leases import taken_over
from tests.pipeline.small_logs import (
    CHAIN_ITEMS,
    CHAIN_LENGTH,
    CHAIN_USERS,
    DAY,
    SMALL_ITEMS,
    START,
    full_cost,
    write_catalogue,
    write_log,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


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


def test_a_night_that_is_published_is_over_although_it_cannot_be_loaded(
    raypipe: Run, ingested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("nightly", "--workspace", ingested, "--summarize.engine.engine", "echo", "--summarize.max_calls", 20)
    words += ("--online.keep", 1, "--date", "2026-01-05")

    def away(_: OnlineConfig) -> JobResult:
        raise UnavailableError("The online store is away.", "Submit again.")

    with monkeypatch.context() as patch:
        patch.setattr(nightly, "run_online", away)
        failed = raypipe(*words)
    assert (failed.code, Nights(Store(ingested)).dates()) == (1, ["2026-01-05"])
    assert NightRuns(Store(ingested), "2026-01-05").all() == []
    # What comes next on its date is another night, with caps of its own.
    again = raypipe(*words)
    assert (again.status, 0 < again.result["cost"]["calls"] <= 20) == ("ok", True), again.stderr
    assert again.metrics["summarize.computed"] > 0


def test_a_night_whose_lease_is_lost_while_its_cards_are_written_is_not_published(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = nightly.NightlyConfig(workspace=s3_uri), Store(s3_uri)
    night = Night("2026-01-05", {}, {}, {}, "")
    with contextlib.ExitStack() as successor, hold(store, ["nights"], "sleeper") as locks:
        with monkeypatch.context() as patch:
            patch.setattr(nightly, "write_cards", lambda *_: successor.enter_context(taken_over(store, "nights")))
            with pytest.raises(RaypipeError, match="lease on nights ran out"):
                nightly._publish(config, Workspace(s3_uri), night, locks)
        assert Nights(store).dates() == []


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
