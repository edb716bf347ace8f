"""What no kept night, release or run needs goes; what any of them needs stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.storage.locks import hold
from raypipe.storage.models import Model, Models
from raypipe.storage.nights import Night, Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.schemas import REJECTS
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig
from tests.conftest import Run
from tests.pipeline.small_logs import DAY, SMALL_ITEMS, SMALL_LOG, START, write_catalogue, write_log
from tests.untrained import store_untrained_adapter

SOON = ("--grace_hours", "0")


@pytest.fixture
def four_nights(raypipe: Run, tmp_path: Path, files: Path, ray_cluster: None) -> str:
    """Four nights, of which each brought a user something new; the second is in force."""
    uri = str(tmp_path / "workspace")
    catalogue = write_catalogue(files / "items.csv", SMALL_ITEMS)
    words = ("nightly", "--workspace", uri, "--summarize.engine.engine", "echo", "--ingest.catalogue.path", catalogue)
    words += ("--ingest.log.columns.time", "time", "--ingest.log.path")
    for night in range(1, 5):
        events = SMALL_LOG[:60] if night == 1 else [("u2", f"i{night}", START + (90 + night) * DAY)]
        log = write_log(files / f"{night}.csv", events)
        assert raypipe(*words, log, "--date", f"2026-01-0{night}").status == "ok"
    assert raypipe("night", "--workspace", uri, "--restore", "2026-01-02").code == 0
    return uri


def data_files(uri: str) -> set[str]:
    return {
        str(path.relative_to(uri)) for path in Path(uri, "tables").rglob("*.parquet") if "_delta_log" not in path.parts
    }


def test_old_nights_go_with_their_files_and_kept_ones_read_as_before(raypipe: Run, four_nights: str) -> None:
    workspace = Workspace(four_nights)
    nights = Nights(workspace.store)
    kept = [night for date in ("2026-01-02", "2026-01-04") if (night := nights.get(date)) is not None]
    before = [workspace.tables[name].read(version) for night in kept for name, version in night.tables.items()]
    needed = {
        f"tables/{name}/{file.path}"
        for night in kept
        for name, version in night.tables.items()
        for file in workspace.tables[name].files(version)
    }
    versions = {name: table.version() for name, table in workspace.tables.items()}
    stray = Path(four_nights, "tables/summaries/variant=x/bucket=0")
    stray.mkdir(parents=True)
    (stray / "an-attempt-that-lost.parquet").write_bytes(b"waste")

    dry = raypipe("vacuum", "--workspace", four_nights, "--keep_nights", 1, *SOON, "--dry_run")
    assert (dry.metrics["nights_removed"], nights.dates()[0]) == (2, "2026-01-01")
    assert data_files(four_nights) > needed
    ended = raypipe("vacuum", "--workspace", four_nights, "--keep_nights", 1, *SOON)
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert ended.metrics["nights_removed"] == 2
    assert ended.metrics["files_removed"] >= dry.metrics["files_removed"] > 0
    assert ended.metrics["bytes_freed"] > 0
    assert nights.dates() == ["2026-01-02", "2026-01-04"]
    assert data_files(four_nights) == needed
    fresh = Workspace(four_nights)
    after = [fresh.tables[name].read(version) for night in kept for name, version in night.tables.items()]
    assert after == before
    # Nothing is new to who compares versions: the next night has nothing to do.
    assert {name: table.version() for name, table in fresh.tables.items()} == versions
    again = raypipe("vacuum", "--workspace", four_nights, "--keep_nights", 1, *SOON)
    assert again.status == "nothing_to_do"


def test_files_that_lost_their_place_just_now_stay_for_who_reads_them(raypipe: Run, four_nights: str) -> None:
    before = data_files(four_nights)
    assert raypipe("vacuum", "--workspace", four_nights, "--keep_nights", 1).metrics["files_removed"] == 0
    assert data_files(four_nights) == before


def test_vacuum_waits_for_open_runs_and_for_trainings(raypipe: Run, summarised: str) -> None:
    workspace = Workspace(summarised)
    run = workspace.ledger("summarize").start("f" * 32, {"base": {"summaries": 0}, "scope": "all"})
    staged = workspace.tables["rejects"].stage(REJECTS.columns.empty_table(), "of-the-open-run", {"table": "summaries"})
    waits = raypipe("vacuum", "--workspace", summarised, *SOON)
    assert (waits.code, waits.status) == (2, "failed")
    assert "vacuum waits for runs that are open: summarize ffffffffffff" in waits.stderr
    assert workspace.store.exists(f"tables/rejects/{staged.path}")
    run.abandon("for the test")
    with hold(workspace.store, ["models-sasrec"], "train"):
        assert "models-sasrec is being written by train" in raypipe("vacuum", "--workspace", summarised).stderr
    assert raypipe("vacuum", "--workspace", summarised, *SOON).code == 0
    assert not workspace.store.exists(f"tables/rejects/{staged.path}")


def test_many_small_files_become_one(raypipe: Run, summarised: str) -> None:
    table = Workspace(summarised).tables["rejects"]
    for number in range(1, 10):
        row = [[f"run{number}"], [f"key{number}"], ["bad"], ["It is bad."], ["{}"], [1], [None], [None]]
        staged = table.stage(pa.table(row, schema=REJECTS.columns), f"one-{number}", {"table": "summaries"})
        table.publish([staged], mode="append", app="by-hand", number=number)
    staged = table.stage(pa.table(row, schema=REJECTS.columns), "other", {"table": "histories"})
    table.publish([staged], mode="append", app="by-hand", number=10)
    before = sorted(table.read(table.version()).to_pylist(), key=str)
    ended = raypipe("vacuum", "--workspace", summarised, "--compact_files", 9, *SOON)
    assert ended.metrics["partitions_compacted"] == 1
    table = Workspace(summarised).tables["rejects"]
    assert len(table.files(table.version())) == 2
    assert sorted(table.read(table.version()).to_pylist(), key=str) == before
    assert len(list(Path(summarised, "tables/rejects").rglob("*.parquet"))) == 2


def test_runs_canaries_and_spills_that_are_over_go(raypipe: Run, summarised: str) -> None:
    workspace = Workspace(summarised)
    ledger = workspace.ledger("example")
    for number in range(1, 6):
        ledger.start(f"{number}" * 32, {"base": {}, "scope": "all"}).finish(
            {"status": "ok", "tables": {}, "metrics": {}}
        )
    store = workspace.store
    store.put(f"staging/{'9' * 32}/spill/left.arrow", b"x")
    dates = ("nights/2020-01-01", "nights/2020-01-02")  # never published, the first one long ago
    for folder in ("canary/old", "canary/new", "staging/sasrec-old", "staging/sasrec-new", *dates):
        store.put(f"{folder}/file", b"x")
        if folder.endswith(("old", "01-01")):
            os.utime(store.local_path(f"{folder}/file"), (time.time() - 10 * 86_400,) * 2)
    half, whole = (store.local_path(f"tables/summaries/{name}") for name in ("part.parquet#12", "part#12.txt"))
    for path in (half, whole):
        path.write_bytes(b"x")
    assert raypipe("vacuum", "--workspace", summarised, "--dry_run").metrics["unfinished_removed"] == 1
    assert half.exists()
    ended = raypipe("vacuum", "--workspace", summarised, "--keep_runs", 2)
    assert (ended.metrics["runs_removed"], ended.metrics["folders_removed"]) == (3, 4)
    assert (ended.metrics["unfinished_removed"], half.exists(), whole.exists()) == (1, False, True)
    assert sorted(workspace.ledger("example").numbers()) == [4, 5]
    assert store.folders("canary") == ["new"]
    assert store.folders("staging") == ["sasrec-new"]
    assert store.folders("nights") == ["2020-01-02"]
    # Numbers go on where they were.
    assert workspace.ledger("example").start("a" * 32, {"base": {}, "scope": "all"}).number == 6
    assert raypipe("summarize", "--workspace", summarised, "--engine.engine", "echo").status == "nothing_to_do"


def test_models_go_that_no_kept_release_night_or_model_names(raypipe: Run, summarised: str, tmp_path: Path) -> None:
    store = Store(summarised)
    models, releases, nights = Models(store), Releases(store), Nights(store)

    def model(name: str, content: str, **lineage: str) -> str:
        folder = tmp_path / f"{name}-{content}"
        folder.mkdir()
        (folder / "weights.json").write_text(f'"{content}"')
        return named(models.add(name, folder, content, lineage))

    of_a_night, unnamed, of_an_adapter, newest = (model("sasrec", content) for content in ("a", "b", "c", "d"))
    adapter = model("recexplainer-h", "e", recommender=of_an_adapter)
    releases.add(Release(unnamed))
    in_a_night = releases.add(Release(of_a_night))
    champion = releases.add(Release(newest, "", dict([adapter.split("/")])))
    releases.point("champion", champion)
    nights.publish(Night("2026-01-05", {}, {"release": in_a_night.hash}, {}, "summarize-hierarchical"))
    evaluations = f"evaluations/{unnamed.split('/')[1]}"
    for name in ("attributes.html", "1.json"):
        store.put(f"{evaluations}/{name}", b"{}")
    ended = raypipe("vacuum", "--workspace", summarised, "--keep_models", 1, "--keep_releases", 1)
    assert (ended.metrics["models_removed"], ended.metrics["releases_removed"]) == (1, 1), ended.stderr
    left = {f"{one.name}/{one.hash}" for name in models.names() for one in models.all(name)}
    assert left == {of_a_night, of_an_adapter, newest, adapter}
    assert set(releases.hashes()) == {in_a_night.hash, champion.hash}
    assert not store.list(f"models/{unnamed}")
    # What was measured is still told, and users are no longer shown.
    assert [entry.path for entry in store.list("evaluations")] == [f"{evaluations}/1.json"]


def test_what_the_service_starts_with_stays(raypipe: Run, summarised: str) -> None:
    workspace = Workspace(summarised)
    releases, items = Releases(workspace.store), workspace.tables["items"]
    versions = [items.version()]
    before = items.read(versions[0])
    for number in (1, 2):
        staged = items.stage(before.slice(number).select(items.spec.columns.names), f"catalogue-{number}")
        versions.append(items.publish([staged], mode="overwrite", app="by-hand", number=number))
    served, unnamed, champion = (
        releases.add(Release(f"sasrec/{number:032x}", catalogue=version)) for number, version in enumerate(versions)
    )
    releases.point("served", served)
    releases.point("champion", champion)
    releases.point("candidate", unnamed)
    releases.remove(unnamed.hash)
    assert raypipe("vacuum", "--workspace", summarised, "--keep_releases", 1, *SOON).code == 0
    assert (releases.named("served"), releases.named("candidate"), releases.named("champion")) == (
        served,
        None,
        champion,
    )
    after = Workspace(summarised).tables["items"]
    assert after.read(versions[0]) == before
    assert after.read(versions[2]) == before.slice(2)
    with pytest.raises(FileNotFoundError):
        after.read(versions[1])


def test_the_language_model_stays_that_a_kept_adapter_reads_with_and_what_a_kept_recommender_started_from(
    raypipe: Run, tmp_path: Path
) -> None:
    uri = str(tmp_path / "workspace")
    Workspace(uri).decide("time", 4)
    models = Models(Store(uri))

    def lm(seed: int) -> tuple[Path, str]:
        folder = tmp_path / f"lm-{seed}"
        texts = ["Title genre user history"] * 5
        save_untrained(folder, BuiltinLmConfig(size="tiny"), train_tokenizer(texts, [], [], 300), seed=seed)
        return folder, named(models.add("lm", folder, "recipe", {"hold_out": 1}))

    def json_model(name: str, **lineage: object) -> str:
        folder = tmp_path / f"{name}-{len(models.all(name))}"
        folder.mkdir()
        (folder / "weights.json").write_text(f'"{folder.name}"')
        return named(models.add(name, folder, folder.name, lineage))

    told_by_name, told_by_content, told_by_card, unread = (lm(seed) for seed in range(4))
    start, other_start, stranger, newest = (json_model("sasrec") for _ in range(4))
    kept = {
        json_model("trsr", lm="0" * 64, lm_model=told_by_name[1], lm_path=""),
        json_model("guided", lm=checkpoint_hash(told_by_content[0])),
        json_model("dreamrec", config={"recommender": {"dreamrec": {"table": start}}}),
        json_model("gru4rec", config={"recommender": {"guided": {"base": other_start}}}),
    }
    recommender = models.newest("sasrec")
    assert recommender is not None
    adapter = store_untrained_adapter(uri, ExplainerConfig(), recommender, 16, told_by_card[0])
    last = lm(9)
    ended = raypipe("vacuum", "--workspace", uri, "--keep_models", 1, "--dry_run")
    assert ended.metrics["models_removed"] == 2, ended.stderr
    ended = raypipe("vacuum", "--workspace", uri, "--keep_models", 1)
    assert (ended.code, ended.metrics["models_removed"]) == (0, 2), ended.stderr
    left = {named(one) for name in models.names() for one in models.all(name)}
    read = {told_by_name[1], told_by_content[1], told_by_card[1], last[1]}
    assert left == {*kept, *read, named(adapter), start, other_start, newest}
    assert not {unread[1], stranger} & left


def named(model: Model) -> str:
    return f"{model.name}/{model.hash}"
