"""What `raypipe submit` would send, and what it refuses to, without a job server. With one: tests/integration."""

from __future__ import annotations

import datetime
import getpass
import re
import shlex
import time
from pathlib import Path

import pytest

from raypipe.cli.main import JOBS, config_type
from raypipe.cli.submit import Submission, SubmitConfig, next_attempt, prepare, run_submit, split_words
from raypipe.errors import UsageError
from raypipe.runtime.job_server import Attempt, check_upload
from raypipe.storage.locks import run_lock
from raypipe.storage.store import Store
from tests.conftest import Run

LONG_AGO = 1_700_000_000.0


def prepared(*words: str, **options: object) -> Submission:
    config = SubmitConfig.model_validate({"working_dir": "none", **options})
    return prepare(config, list(words), JOBS, config_type)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which is the current one."""
    found = tmp_path / "project"
    found.mkdir()
    monkeypatch.chdir(found)
    return found


def test_options_before_the_job_are_submits_own() -> None:
    assert split_words(["--address", "http://a", "--again", "--no-wait", "nightly", "--date", "2026-01-05"]) == (
        ["--address", "http://a", "--again", "--no-wait"],
        ["nightly", "--date", "2026-01-05"],
    )
    assert split_words(["--address=http://a", "dataset", "synthetic"]) == (
        ["--address=http://a"],
        ["dataset", "synthetic"],
    )


def test_a_run_is_named_by_job_date_and_key(raypipe: Run, folder: Path) -> None:
    (folder / "night.yaml").write_text("summarize: {engine: {engine: echo}}\n")
    ended = raypipe("submit", "--dry_run", "nightly", "--config", folder / "night.yaml", "--date", "2026-01-05")
    assert ended.code == 0, ended.stderr
    shown = ended.metrics
    assert re.fullmatch(r"nightly-2026-01-05-[0-9a-f]{12}", shown["run"])
    assert ended.result["run_key"] == ""
    words = shlex.split(shown["entrypoint"])
    assert words[:4] == ["python", "-m", "raypipe.cli.main", "nightly"]
    # The path as it is where the folder is unpacked.
    assert words[4:8] == ["--config", "night.yaml", "--date", "2026-01-05"]
    assert words[-4:] == ["--run", shown["run"], "--cluster.driver_cpus", "1"]
    assert shown["runtime_env"] == {"working_dir": "."}
    assert shown["entrypoint_num_cpus"] == 1
    assert shown["metadata"]["owner"] == getpass.getuser()
    assert shown["metadata"]["git_sha"] == "none"
    assert {"job", "run", "workspace", "config_hash"} <= set(shown["metadata"])


def test_where_and_with_how_many_workers_is_not_part_of_the_key() -> None:
    plain = prepared("summarize", "--workspace", "s3://a/b")
    moved = prepared(
        *("summarize", "--workspace", "s3://a/b", "--cluster.workers", "9", "--tracking", "off"),
        *("--lock_lease_s", "5", "--webhook", "http://c"),
    )
    assert moved.run == plain.run
    assert moved.config_hash != plain.config_hash
    others = [
        prepared("summarize", "--workspace", "s3://a/c"),
        prepared("summarize", "--workspace", "s3://a/b", "--sample", "5"),
        prepared("summarize", "--workspace", "s3://a/b", "--engine.engine", "echo"),
        prepared("extract", "--workspace", "s3://a/b"),
    ]
    assert len({plain.config_key, *(other.config_key for other in others)}) == 5


def test_a_night_without_a_date_is_pinned_to_today() -> None:
    before = datetime.date.today().isoformat()
    submission = prepared("nightly")
    assert submission.words == submission.typed == ("--date", submission.date)
    assert before <= submission.date <= datetime.date.today().isoformat()
    assert prepared("nightly", "--date", submission.date).run == submission.run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dry_run", "summarise"], "There is no job 'summarise' to submit"),
        (["--dry_run", "serve"], "serve is no job that ends"),
        (["--dry_run", "token", "--name", "shop"], "would stand in the cluster's logs"),
        (["--dry_run", "summarize", "--engin.engine", "echo"], "--engine.engine"),
        (["--adress", "http://a", "summarize"], "Did you mean --address?"),
        (["--dry_run", "summarize", "--config", "/etc/hostname"], "is not in the working directory"),
        (["--dry_run", "--working_dir", "nowhere", "summarize"], "is no folder"),
        (["--dry_run", "--runtime_env", "nowhere.yaml", "summarize"], "cannot be read"),
    ],
)
def test_what_cannot_be_submitted_is_told_before_anything_is(
    raypipe: Run, folder: Path, words: list[str], told: str
) -> None:
    if "/etc/hostname" in words:
        (folder.parent / "night.yaml").write_text("{}")
        words = [str(folder.parent / "night.yaml") if word == "/etc/hostname" else word for word in words]
    ended = raypipe("submit", *words)
    assert (ended.code, ended.status) == (2, "failed")
    assert told in ended.stderr


def test_a_job_server_that_is_away_is_no_wrong_command(raypipe: Run, folder: Path) -> None:
    ended = raypipe("submit", "--address", "http://127.0.0.1:9", "summarize")
    assert (ended.code, ended.status) == (1, "failed")
    assert "The job server at http://127.0.0.1:9" in ended.stderr


def test_without_a_job_the_jobs_are_named() -> None:
    with pytest.raises(UsageError, match=r"No job is named.*the jobs are dataset synthetic, ingest"):
        run_submit(["--dry_run"], JOBS, config_type)


def test_a_folder_over_ray_s_limit_is_refused_and_its_largest_files_named(folder: Path) -> None:
    (folder / "small.txt").write_text("x" * 1000)
    (folder / "data").mkdir()
    for name, mib in (("events.parquet", 70), ("items.parquet", 40)):
        with (folder / "data" / name).open("wb") as file:
            file.truncate(mib << 20)
    with pytest.raises(UsageError, match=r"holds 110 MiB.*data/events.parquet \(70 MiB\), data/items.parquet"):
        check_upload(folder, [])
    assert check_upload(folder, ["data/events.parquet"]) == (40 << 20) + 1000
    (folder / ".gitignore").write_text("data/\n")
    assert check_upload(folder, []) == 1000 + len("data/\n")


def test_installing_packages_leaves_training_time_to_start(raypipe: Run, folder: Path) -> None:
    (folder / "env.yaml").write_text("pip: [example]\nenv_vars: {A: b}\n")
    ended = raypipe("submit", "--dry_run", "--runtime_env", "env.yaml", "train")
    assert ended.metrics["runtime_env"] == {
        "pip": ["example"],
        "env_vars": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", "A": "b"},
        "working_dir": ".",
    }


def test_attempts_are_counted_and_one_that_succeeded_is_refused(tmp_path: Path) -> None:
    submission = prepared("summarize", "--workspace", str(tmp_path))
    config = SubmitConfig()
    assert next_attempt([], submission, config) == 1
    failed = Attempt(1, f"{submission.run}-1", "FAILED", LONG_AGO)
    stopped = Attempt(2, f"{submission.run}-2", "STOPPED", LONG_AGO)
    assert next_attempt([failed, stopped], submission, config) == 3
    succeeded = Attempt(3, f"{submission.run}-3", "SUCCEEDED", LONG_AGO)
    with pytest.raises(UsageError, match="has succeeded"):
        next_attempt([failed, stopped, succeeded], submission, config)
    assert next_attempt([succeeded], submission, SubmitConfig(again=True)) == 4


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_driver_lives_is_refused_and_one_whose_cluster_died_is_not(tmp_path: Path, again: bool) -> None:
    submission = prepared("summarize", "--workspace", str(tmp_path))
    config = SubmitConfig(again=again)
    called_running = Attempt(1, f"{submission.run}-1", "RUNNING", LONG_AGO)
    with run_lock(Store(str(tmp_path)), submission.run), pytest.raises(UsageError, match="-1 is running"):
        next_attempt([called_running], submission, config)
    assert next_attempt([called_running], submission, config) == 2


def test_a_run_that_may_yet_take_its_lease_is_alive(tmp_path: Path) -> None:
    submission = prepared("summarize", "--workspace", str(tmp_path))
    for attempt in (
        Attempt(1, f"{submission.run}-1", "PENDING", LONG_AGO),
        Attempt(1, f"{submission.run}-1", "RUNNING", time.time() - 5),
    ):
        with pytest.raises(UsageError, match="ray job stop"):
            next_attempt([attempt], submission, SubmitConfig())
    elsewhere = prepared("summarize", "--workspace", str(tmp_path / "on-the-cluster"))
    running = Attempt(1, f"{elsewhere.run}-1", "RUNNING", LONG_AGO)
    with pytest.raises(UsageError, match="is running"):
        next_attempt([running], elsewhere, SubmitConfig())
