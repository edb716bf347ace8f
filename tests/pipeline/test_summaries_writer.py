"""Summaries that a language model wrote which has read held-out users: what learns of them is not told to be unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raypipe.pipeline import align
from raypipe.pipeline.align_options import AlignConfig
from raypipe.pipeline.past_summaries import unread_by_writers
from raypipe.storage.models import Model, Models
from raypipe.storage.workspace import Workspace
from raypipe.systems.recexplainer import ExplainerConfig
from tests.conftest import Run
from tests.made import MODEL, make_ready, summarize
from tests.untrained import OF_LM, store_untrained_adapter

SHARE, VARIANT = 0.4, "summarize-hierarchical-cut1"
WROTE = "the language model that wrote the summaries may have been trained on users who are asked about here"
OUTSIDE = {"model": "m", "model_hold_out": None, "model_held_out_share": None}


def by(share: float) -> dict[str, object]:
    """What a run tells of a language model of the workspace's own."""
    return {"model": "0" * 32, "model_hold_out": 1, "model_held_out_share": share}


@pytest.fixture
def ready(tmp_path: Path, titled_lm: Path) -> str:
    """Chains with summaries before the cut; neither the recommender nor the newest language model has read held-out users."""
    uri = str(tmp_path / "workspace")
    make_ready(uri)
    summarize(uri, VARIANT)
    models = Models(Workspace(uri).store)
    (recommender,) = models.all("sasrec")
    folder = models.store.local_path(f"{recommender.folder}/checkpoint")
    models.add("sasrec", folder, recommender.recipe, {**recommender.lineage, "held_out_share": SHARE})
    models.add("lm", titled_lm, "untrained", {**OF_LM, "held_out_share": SHARE})
    return uri


def wrote(uri: str, facts: dict[str, object], status: str = "ok") -> None:
    """As if a run of `summarize` had written the summaries that are there."""
    ledger = Workspace(uri).ledger("summarize")
    told = {"facts": {"variant": VARIANT, "block_items": 5, **facts}}
    run = ledger.start(f"{len(ledger.numbers()):032d}", {"recipe": "", "pins": {}, "base": {}, "scope": "all", **told})
    run.finish({"status": status})


def unseen(uri: str, adapter: Model | None = None, **options: object) -> bool:
    """Whether the figures would be of users whom nothing that is joined has read."""
    config = AlignConfig(workspace=uri, system="recexplainer", held_out_share=SHARE, **options)  # type: ignore[arg-type]
    workspace = Workspace(uri)
    return align._read(config, workspace, workspace.tables["histories"].version(), adapter).unseen


@pytest.mark.parametrize(
    ("facts", "is_unseen"),
    [
        (by(0.0), False),
        (by(SHARE), True),
        ({"model": "0" * 32, "model_hold_out": 1}, False),  # a run that did not tell it
        (OUTSIDE, True),  # nobody knows, as of a language model from elsewhere that is named with --lm
    ],
)
def test_the_writer_of_the_summaries_counts_among_who_has_read_held_out_users(
    ready: str, capsys: pytest.CaptureFixture[str], facts: dict[str, object], is_unseen: bool
) -> None:
    wrote(ready, facts)
    assert unseen(ready, summaries="hierarchical") is is_unseen
    assert (WROTE in capsys.readouterr().err) is not is_unseen
    assert unseen(ready)


def test_a_killed_run_leaves_summaries_of_the_writer_before_it(ready: str) -> None:
    wrote(ready, by(0.0))
    wrote(ready, by(SHARE), "interrupted")
    assert unread_by_writers(Workspace(ready), VARIANT) == 0.0
    wrote(ready, by(SHARE))
    assert unread_by_writers(Workspace(ready), VARIANT) == SHARE


def test_a_stored_adapter_stays_one_that_learnt_such_summaries(ready: str, titled_lm: Path) -> None:
    models = Models(Workspace(ready).store)
    stored = store_untrained_adapter(ready, ExplainerConfig(), models.all("sasrec")[-1], MODEL.width, titled_lm)
    for learnt, is_unseen in (
        ({"summaries": None}, True),
        ({"summaries": "hierarchical", "summaries_held_out_share": SHARE}, True),
        ({"summaries": "hierarchical", "summaries_held_out_share": None}, True),
        ({"summaries": "hierarchical", "summaries_held_out_share": 0.0}, False),
        ({"summaries": "hierarchical"}, False),
    ):
        lineage = {**stored.lineage, "held_out_share": SHARE, **learnt}
        adapter = Model(stored.name, stored.hash, stored.recipe, lineage, stored.created)
        assert unseen(ready, adapter) is is_unseen


@pytest.mark.usefixtures("ray_cluster")
def test_an_adapter_that_learnt_such_summaries_tells_so_in_its_figures_and_its_lineage(
    raypipe: Run, ready: str
) -> None:
    wrote(ready, by(0.1))
    few = ("--recexplainer.tasks", json.dumps(["T6b"]), "--recexplainer.variant", "I", "--users", 10, "--positions", 1)
    size = (
        "--asked",
        2,
        "--answer_tokens",
        4,
        "--held_out_share",
        SHARE,
        "--trainer.steps",
        1,
        "--trainer.device",
        "cpu",
    )
    ended = raypipe(
        "align", "--workspace", ready, "--system", "recexplainer", "--summaries", "hierarchical", *few, *size
    )
    assert (ended.code, ended.status) == (0, "ok"), ended.stderr
    assert ended.metrics["unseen_by_all"] == 0
    assert WROTE in ended.stderr
    (adapter,) = Models(Workspace(ready).store).all("recexplainer-i")
    assert (adapter.lineage["summaries"], adapter.lineage["summaries_held_out_share"]) == ("hierarchical", 0.1)
