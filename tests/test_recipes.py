"""The recipes below `jobs`: each is a valid configuration of the job, model or system that it is named after."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from raypipe.cli.options import parse_config
from raypipe.errors import UsageError
from raypipe.pipeline.align_options import AlignConfig
from raypipe.pipeline.nightly import NightlyConfig
from raypipe.pipeline.train import TrainConfig
from raypipe.runtime.trainer import TrainerConfig
from raypipe.systems.recexplainer import ExplainerConfig

FOLDER = Path(__file__).parents[1] / "jobs/train"
NIGHTS = sorted(FOLDER.parent.glob("nightly*.yaml"))
ALIGNMENTS = FOLDER.parent / "align"
MODELS = ("sasrec", "gru4rec", "caser", "bert4rec", "dreamrec")
SETS = ("ml-100k", "ml-1m", "amazon-industrial")


def test_every_model_has_a_recipe_for_every_data_set() -> None:
    assert {f"{model}-{data}.yaml" for model, data in product(MODELS, SETS)} <= {p.name for p in FOLDER.iterdir()}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_it_is_run(path: Path) -> None:
    config = parse_config("train", TrainConfig, ["--config", str(path)])
    assert path.stem.startswith(config.recommender.model)
    assert f"--config jobs/train/{path.name}" in path.read_text().splitlines()[0]
    assert config.trainer.validate_every is not None
    assert config.trainer.weight_decay == 0
    assert config.hold_out == 2


@pytest.mark.parametrize("path", sorted(ALIGNMENTS.iterdir()), ids=lambda path: path.stem)
def test_an_alignment_holds_out_users_or_everybody_s_last_events_and_says_how_it_is_run(path: Path) -> None:
    config = parse_config("align", AlignConfig, ["--config", str(path)])
    assert path.stem.startswith(config.system)
    assert f"--config jobs/align/{path.name} " in path.read_text()
    # Of these everybody is asked, about what nothing that is trained has seen of them.
    everybody = config.system in ("trsr", "lancer")
    assert config.held_out_share == (0 if everybody else 0.1)
    if config.system == "lancer":
        assert config.hold_out == 2
    assert config.trainer.epochs


def test_every_system_has_a_recipe_for_two_domains() -> None:
    domains = ("ml-100k", "amazon-industrial")
    systems = ("recinterpreter", "recexplainer", "guided", "trsr", "lancer")
    assert {f"{system}-{data}.yaml" for system, data in product(systems, domains)} <= {
        path.name for path in ALIGNMENTS.iterdir()
    }


@pytest.mark.parametrize(
    ("system", "published"),
    [
        ("recinterpreter", {"epochs": 100, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-6, "validate_every": None}),
        ("recexplainer", {"epochs": 10, "batch_size": 64, "lr": 1e-4, "weight_decay": 1e-6, "validate_every": None}),
        ("guided", {"epochs": 10, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-6, "validate_every": None}),
        ("trsr", {"epochs": 5, "batch_size": 16, "lr": 1e-4, "weight_decay": 1e-6, "validate_every": 1}),
        ("lancer", {"epochs": 20, "batch_size": 16, "lr": 2e-4, "weight_decay": 0, "validate_every": None}),
    ],
)
def test_a_system_is_trained_as_published_where_nothing_else_is_said(system: str, published: dict[str, object]) -> None:
    words = ["--system", system]
    assert parse_config("align", AlignConfig, words).trainer == TrainerConfig.model_validate(published)
    assert AlignConfig.model_validate({"system": system}).trainer == TrainerConfig.model_validate(published)
    given = parse_config("align", AlignConfig, [*words, "--trainer.lr", "0.5", "--trainer.seed", "3"]).trainer
    assert given == TrainerConfig.model_validate({**published, "lr": 0.5, "seed": 3})


@pytest.mark.parametrize("data", ["ml-100k", "amazon-industrial"])
def test_guided_scores_see_no_more_than_the_recommenders_they_are_for(data: str) -> None:
    config = parse_config("align", AlignConfig, ["--config", str(ALIGNMENTS / f"guided-{data}.yaml")])
    trained = parse_config("train", TrainConfig, ["--config", str(FOLDER / f"sasrec-{data}.yaml")])
    assert config.hold_out == trained.hold_out


def test_another_set_of_prompts_is_a_recipe_and_a_task_left_out_an_option() -> None:
    terse = parse_config("align", AlignConfig, ["--config", str(ALIGNMENTS / "recinterpreter-ml-100k-terse.yaml")])
    plain = parse_config("align", AlignConfig, ["--config", str(ALIGNMENTS / "recinterpreter-ml-100k.yaml")])
    assert terse.recinterpreter.prompts.recovery_of_one.training == ("Any title: {state}",)
    assert terse.recinterpreter.prompts != plain.recinterpreter.prompts
    assert terse.model_copy(update={"recinterpreter": plain.recinterpreter}) == plain
    words = ["--config", str(ALIGNMENTS / "recexplainer-ml-100k.yaml"), "--recexplainer.tasks", "T1,T3,T4,T6"]
    assert parse_config("align", AlignConfig, words).recexplainer.tasks == ("T1", "T3", "T4", "T6")


@pytest.mark.parametrize("path", NIGHTS, ids=lambda path: path.stem)
def test_a_night_of_every_file_is_one_that_nightly_takes(path: Path) -> None:
    config = parse_config("nightly", NightlyConfig, ["--config", str(path)])
    assert config.ingest.log is not None


def test_the_night_to_copy_reads_a_log_by_date_caps_what_it_spends_and_loads_what_it_publishes() -> None:
    words = ["--config", str(FOLDER.parent / "nightly.yaml")]
    config = parse_config("nightly", NightlyConfig, words)
    assert config.ingest.log is not None
    assert "{date}" in config.ingest.log.path
    assert config.ingest.catalogue is not None
    limits = config.summarize.limits()
    assert None not in (limits.calls, limits.cost, limits.price_in, limits.price_out)
    assert config.explain.limits().calls is not None
    assert config.online is not None
    # What its comments say may be put there instead is taken too.
    changed = ["--train_policy", "nightly", "--explain_policy", "nightly", "--tracking", "off"]
    for engine in (("vllm", "example/model"), ("transformers", "builtin")):
        chosen = ["--summarize.engine.engine", engine[0], "--summarize.engine.lm", engine[1]]
        assert parse_config("nightly", NightlyConfig, [*words, *changed, *chosen]).train_policy == "nightly"


@pytest.mark.parametrize("step", ["extract", "recommend"])
def test_a_night_takes_no_recommender_but_that_of_its_release(step: str) -> None:
    words = ["--config", str(FOLDER.parent / "nightly.yaml"), f"--{step}.model", "gru4rec"]
    with pytest.raises(UsageError, match=f"{step}.model"):
        parse_config("nightly", NightlyConfig, words)


def test_an_oracle_has_a_recipe_that_reads_item_vectors_of_the_recommender_that_generates_them() -> None:
    oracle = parse_config("align", AlignConfig, ["--config", str(ALIGNMENTS / "recinterpreter-ml-100k-oracle.yaml")])
    plain = parse_config("align", AlignConfig, ["--config", str(ALIGNMENTS / "recinterpreter-ml-100k.yaml")])
    assert (oracle.model, oracle.recinterpreter.after, plain.recinterpreter.after) == ("dreamrec", "item", "state")
    other = {"model": plain.model, "recinterpreter": plain.recinterpreter}
    assert oracle.recinterpreter == plain.recinterpreter.model_copy(update={"after": "item"})
    assert oracle.model_copy(update=other) == plain
    trained = (FOLDER / "dreamrec-ml-100k-warm.yaml").name
    assert f"jobs/train/{trained}" in (ALIGNMENTS / "recinterpreter-ml-100k-oracle.yaml").read_text()


def test_every_switch_of_the_adapters_that_the_page_lists_is_one_that_align_takes() -> None:
    page = (FOLDER.parent / "README.md").read_text()
    (section,) = re.findall(r"## Adapters of the systems\n(.*?)\n## ", page, re.DOTALL)
    switches = [
        re.findall(r"`(--[^`]+)`", row.rsplit("|", 2)[1]) for row in section.splitlines() if row.startswith("| ")
    ][1:]
    assert len(switches) > 10
    for first, *others in switches:
        for switch in (first, *others):
            system = "recinterpreter" if "--recinterpreter" in switch else "recexplainer"
            words = ["--system", system, *shlex.split(switch)]
            parse_config("align", AlignConfig, words)
    default = ExplainerConfig()
    for switch, value in (("variant", "H"), ("hybrid", "paper"), ("projector.kind", "mlp")):
        assert any(mine[0] == f"--recexplainer.{switch} {value}" for mine in switches)
        assert parse_config(
            "align", AlignConfig, ["--system", "recexplainer", f"--recexplainer.{switch}", value]
        ).recexplainer == (default)
    recipes = [parse_config("align", AlignConfig, ["--config", str(path)]) for path in ALIGNMENTS.glob("recexplainer*")]
    assert {recipe.recexplainer.hybrid for recipe in recipes} == {"code"}
