"""From YAML and dotted options to a config; every mistake is one paragraph with its remedy."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from raypipe.cli.main import config_type
from raypipe.cli.options import parse_config
from raypipe.config import Config
from raypipe.errors import UsageError
from raypipe.pipeline.explain import ExplainConfig
from raypipe.pipeline.ingest import IngestConfig
from raypipe.pipeline.nightly import NightlyConfig
from raypipe.pipeline.summarize import SummarizeConfig
from raypipe.pipeline.train import TrainConfig
from tests.conftest import Run
from tests.ground import one_paragraph


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_options_win_over_the_file_and_the_file_over_defaults(files: Path) -> None:
    path = write(
        files, "workspace: /data/w\nlog:\n  path: a.csv\n  columns: {time: t, user: who}\nmax_reject_rate: 0.5\n"
    )
    config = parse_config(
        "ingest", IngestConfig, ["--config", path, "--log.columns.user", "person", "--workspace", "/w"]
    )
    assert (config.workspace, config.max_reject_rate, config.buckets) == ("/w", 0.5, None)
    assert config.log is not None
    assert (config.log.path, config.log.columns.time, config.log.columns.user) == ("a.csv", "t", "person")


def test_nothing_named_is_the_default() -> None:
    assert parse_config("ingest", IngestConfig, []) == IngestConfig()
    assert parse_config("summarize", SummarizeConfig, []).summaries.window_events == 50


def test_options_may_be_spelled_with_an_equals_sign_and_hold_any_text() -> None:
    config = parse_config("ingest", IngestConfig, ["--log.path=my log, the 2nd.csv", "--log.columns.time=naïve 🎬"])
    assert config.log is not None
    assert (config.log.path, config.log.columns.time) == ("my log, the 2nd.csv", "naïve 🎬")


@pytest.mark.parametrize("job", ["train", "align"])
def test_one_of_some_numbers_is_taken_from_the_command_line_too(job: str, files: Path) -> None:
    given = ["--trainer.workers", "2", "--trainer.zero_stage", "3"]
    assert parse_config(job, config_type(job), given).trainer.zero_stage == 3
    path = write(files, "trainer: {workers: 2, zero_stage: 1}\n")
    assert parse_config(job, config_type(job), ["--config", path]).trainer.zero_stage == 1
    with pytest.raises(UsageError, match=r"'trainer.zero_stage' is 4: Input should be 0, 1, 2 or 3"):
        parse_config(job, config_type(job), ["--trainer.zero_stage", "4"])
    layers = ["--recommender.model", "dreamrec", "--recommender.dreamrec.denoiser_layers", "2"]
    assert parse_config("train", TrainConfig, layers).recommender.dreamrec.denoiser_layers == 2


def test_options_that_do_not_fit_each_other_are_told_in_their_own_words() -> None:
    cases = {
        ("--hold_out", "1"): r"^validation asks for a held-out event, .*validate_every to null. Correct the options",
        (
            "--recommender.heads",
            "3",
        ): r"^--recommender: width 64 cannot be shared by 3 heads: choose a multiple. Correct",
        ("--recommender.heads", "zero"): r"^Config key 'recommender.heads' is 'zero': .* Correct --recommender.heads.",
    }
    for options, problem in cases.items():
        with pytest.raises(UsageError, match=problem) as refused:
            parse_config("train", TrainConfig, list(options))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("job", "config_type", "prefix"),
    [("summarize", SummarizeConfig, ""), ("explain", ExplainConfig, ""), ("nightly", NightlyConfig, "summarize.")],
)
def test_a_cap_on_money_is_refused_where_nothing_costs_any(job: str, config_type: type[Config], prefix: str) -> None:
    cap = [f"--{prefix}max_cost", "5"]
    with pytest.raises(
        UsageError, match=r"^A cap of 5.0 on money .* no price.*Give --price_in and --price_out"
    ) as refused:
        parse_config(job, config_type, cap)
    assert "\n" not in str(refused.value)
    for price in ("price_in", "price_out"):
        parse_config(job, config_type, [*cap, f"--{prefix}{price}", "2"])


@pytest.mark.parametrize("moment", ["2026-01-06T05:30", "2026-01-06", "2026-01-06 05:30:00"])
def test_a_deadline_names_one_moment_wherever_the_driver_runs(files: Path, moment: str) -> None:
    for argv in (["--deadline", moment], ["--config", write(files, f"deadline: {moment}\n")]):
        with pytest.raises(
            UsageError, match=r"without a UTC offset .* write it with Z for UTC or with an offset"
        ) as told:
            parse_config("summarize", SummarizeConfig, argv)
        assert "\n" not in str(told.value)
    for offset, hour in (("Z", 5), ("+01:00", 4)):
        text = f"2026-01-06T05:30:00{offset}"
        for argv in (["--deadline", text], ["--config", write(files, f"deadline: {text}\n")]):
            limits = parse_config("summarize", SummarizeConfig, argv).limits()
            assert limits.deadline == datetime.datetime(2026, 1, 6, hour, 30, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--log.pth", "x"], r"--log.pth.*Did you mean --log.path\?"),
        (["--cluster.workers", "two"], r"'cluster.workers' is 'two'.*Correct --cluster.workers"),
        (["--cluster.workers", "0"], r"'cluster.workers' is '?0'?: .*greater than or equal to 1"),
        (["--log.columns.time", "t"], r"'log.path' is missing. Add --log.path VALUE"),
        (["--tracking", "maybe"], r"tracking"),
    ],
)
def test_a_wrong_option_is_told_with_its_remedy(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config("ingest", IngestConfig, argv)


@pytest.mark.parametrize(
    ("job", "option", "value", "example"),
    [
        ("recommend", "only", "{genres: Drama}", '{"NAME": "TEXT"}'),
        ("recommend", "only", "genres", '{"NAME": "TEXT"}'),
        ("ingest", "log.event_weights", "{view: 1}", '{"NAME": 1.5}'),
        ("judge", "judges", "{bad", '{"NAME": {"engine": "echo"}}'),
        ("train", "trainer", "{epochs", '{"workers": 1}'),
    ],
)
def test_what_is_no_json_is_told_with_an_example_that_is(
    raypipe: Run, job: str, option: str, value: str, example: str
) -> None:
    others = ["--log.path", "log.csv"] if job == "ingest" else []
    ended = raypipe(job, f"--{option}", value, *others)
    assert (ended.code, ended.status) == (2, "failed")
    told = one_paragraph(ended.stderr)
    assert f"--{option} is {value!r}, which is not written as JSON." in told
    assert f"--{option} '{example}'." in told
    parse_config(job, config_type(job), [f"--{option}", example, *others])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workspce: /w\n", r"Unknown config key 'workspce'. Did you mean 'workspace'\?"),
        ("log:\n  path: a\n  columns: {tiem: t}\n", r"Unknown config key 'log.columns.tiem'. Did you mean 'time'\?"),
        ("log: [1]\n", r"'log'"),
        ("max_reject_rate: lots\n", r"'max_reject_rate' is 'lots'"),
        ("- a\n- b\n", r"holds no keys"),
        ("a: [\n", r"is not YAML"),
    ],
)
def test_a_wrong_file_is_told_with_its_remedy(files: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config("ingest", IngestConfig, ["--config", write(files, text)])


def test_a_missing_file_is_told(files: Path) -> None:
    with pytest.raises(UsageError, match=r"config file .*none.yaml cannot be read.*Check the path"):
        parse_config("ingest", IngestConfig, ["--config", str(files / "none.yaml")])
