"""Releases: a candidate is judged beside the release in force; a refusal keeps the old one and ends with exit code 3."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from raypipe.errors import RaypipeError, RefusedError
from raypipe.pipeline.release import GateConfig, ReleaseConfig, _check, promote
from raypipe.storage.models import Models
from raypipe.storage.releases import Release, Releases
from raypipe.storage.store import Store
from raypipe.storage.workspace import Workspace
from tests.conftest import Run
from tests.ground import one_paragraph
from tests.leases import taken_over
from tests.pipeline.small_logs import START, write_log


def champion(uri: str) -> str | None:
    release = Releases(Store(uri)).named("champion")
    return release.recommender if release is not None else None


def spoiled(uri: str, tmp_path) -> str:
    """A copy of the trained model that ranks the best item last."""
    store = Store(uri)
    model = Models(store).newest("sasrec")
    assert model is not None
    source, folder = store.local_path(f"{model.folder}/checkpoint"), tmp_path / "spoiled"
    folder.mkdir()
    (folder / "recommender.json").write_bytes((source / "recommender.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    for name in ("transformer.norm.weight", "transformer.norm.bias"):
        weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors")
    return f"sasrec/{Models(store).add('sasrec', folder, 'spoiled', model.lineage).hash}"


def test_the_better_model_is_put_in_force_the_worse_refused_and_the_old_one_restored(
    raypipe: Run, trained: str, tmp_path
) -> None:
    first = raypipe("release", "--workspace", trained, "--recommender", "sasrec")
    assert first.code == 0, first.stderr
    good = champion(trained)
    assert good is not None
    assert first.metrics["candidate.NDCG@10"] > first.metrics["popularity.NDCG@10"] + 0.5
    assert "champion.NDCG@10" not in first.metrics

    worse = spoiled(trained, tmp_path)
    refused = raypipe("release", "--workspace", trained, "--recommender", worse)
    assert (refused.code, refused.status) == (3, "refused")
    assert "of the release in force, which stays" in one_paragraph(refused.stderr)
    assert champion(trained) == good
    candidate = Releases(Store(trained)).named("candidate")
    assert candidate is not None
    assert candidate.recommender == worse

    lenient = ("--gate.least_share", 0, "--no-gate.beats_popularity")
    assert raypipe("release", "--workspace", trained, "--recommender", worse, *lenient).code == 0
    assert champion(trained) == worse
    listed = raypipe("release", "--workspace", trained)
    assert listed.stderr.count("in force") == 1
    releases = Releases(Store(trained))
    old = next(name for name in releases.hashes() if releases.get(name).recommender == good)
    assert raypipe("release", "--workspace", trained, "--restore", old[:8]).code == 0
    assert champion(trained) == good
    # What else is named changes the release in force.
    assert raypipe("release", "--workspace", trained, "--lm", "hub/another").code == 0
    changed = releases.named("champion")
    assert changed is not None
    assert (changed.recommender, changed.lm) == (good, "hub/another")


def test_a_model_that_does_not_beat_popularity_is_no_first_release(raypipe: Run, trained: str, tmp_path) -> None:
    refused = raypipe("release", "--workspace", trained, "--recommender", spoiled(trained, tmp_path))
    assert refused.code == 3
    assert "has not learnt" in one_paragraph(refused.stderr)
    assert champion(trained) is None


def test_a_figure_that_is_no_number_passes_no_gate() -> None:
    gate = GateConfig()
    good = {"candidate.NDCG@10": 0.3, "champion.NDCG@10": 0.2, "popularity.NDCG@10": 0.1}
    _check(gate, "sasrec/new", good)
    for value in (math.nan, math.inf):
        with pytest.raises(RefusedError, match="which is no number"):
            _check(gate, "sasrec/new", {**good, "candidate.NDCG@10": value})
    _check(gate, "sasrec/new", {**good, "champion.NDCG@10": math.nan})


def test_the_release_in_force_is_judged_on_a_catalogue_that_grew(raypipe: Run, trained: str, files, tmp_path) -> None:
    assert raypipe("release", "--workspace", trained, "--recommender", "sasrec").code == 0
    catalogue = files / "more.csv"
    catalogue.write_text("item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(1, 31)) + "new,Brand New\n")
    log = write_log(
        files / "log.csv", [("u1", "new", START + 100), ("u2", "new", START + 100), ("u2", "i4", START + 101)]
    )
    words = ("--log.path", log, "--log.columns.time", "time", "--catalogue.path", catalogue)
    assert raypipe("ingest", "--workspace", trained, *words).code == 0
    ended = raypipe("evaluate", "--workspace", trained)
    assert ended.code == 0, ended.stderr
    assert 0.8 < ended.metrics["sasrec.HR@10"] < 1
    lenient = ("--gate.least_share", 0, "--no-gate.beats_popularity")
    judged = raypipe("release", "--workspace", trained, "--recommender", spoiled(trained, tmp_path), *lenient)
    assert judged.code == 0, judged.stderr
    assert judged.metrics["champion.NDCG@10"] > 0.5


def test_what_was_trained_on_every_event_is_neither_judged_nor_compared_with(
    raypipe: Run, trained: str, tmp_path
) -> None:
    store = Store(trained)
    model = Models(store).newest("sasrec")
    assert model is not None
    good = f"sasrec/{model.hash}"
    assert raypipe("release", "--workspace", trained, "--recommender", good).code == 0
    folder = store.local_path(f"{model.folder}/checkpoint")
    (tmp_path / "whole").mkdir()
    for file in ("recommender.json", "model.safetensors"):
        (tmp_path / "whole" / file).write_bytes((folder / file).read_bytes())
    whole = Models(store).add("sasrec", tmp_path / "whole", "all events", {**model.lineage, "hold_out": 0})
    refused = raypipe("release", "--workspace", trained, "--recommender", f"sasrec/{whole.hash}")
    assert refused.code == 2
    assert "was trained on every event" in one_paragraph(refused.stderr)
    assert champion(trained) == good
    releases = Releases(store)
    leaky = Release(f"sasrec/{whole.hash}", catalogue=0)
    releases.add(leaky)
    releases.point("champion", leaky)
    ended = raypipe("release", "--workspace", trained, "--recommender", good)
    assert ended.code == 0, ended.stderr
    assert "is not compared with it" in ended.stderr
    assert "champion.NDCG@10" not in ended.metrics


def test_what_is_not_there_cannot_be_released(raypipe: Run, trained: str) -> None:
    cases = {
        ("--recommender", "gru4rec"): "No model gru4rec is stored",
        ("--restore", "abc"): "0 releases start with 'abc'",
        ("--restore", "abc", "--recommender", "sasrec"): "Both --recommender and --restore are given",
        ("--restore", "abc", "--lm", "builtin"): "Both --lm and --restore are given",
        (
            "--adapters",
            '["recexplainer-h"]',
        ): "--adapters alone changes the release in force, and none with a recommender is",
        ("--recommender", "sasrec", "--gate.metric", "Luck@10"): "`evaluate` has no such metric; it has HR@5, NDCG@5",
    }
    for options, told in cases.items():
        ended = raypipe("release", "--workspace", trained, *options)
        assert ended.code == 2
        assert told in one_paragraph(ended.stderr)
    releases = Releases(Store(trained))
    releases.point("champion", releases.add(Release("", "echo")))
    ended = raypipe("release", "--workspace", trained, "--adapters", '["recexplainer-h"]')
    assert (ended.code, "none with a recommender is" in ended.stderr) == (2, True)


def test_a_release_whose_lease_is_lost_while_it_is_judged_is_not_put_in_force(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(s3_uri)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.json").write_bytes(b"{}")
    model = Models(workspace.store).add("sasrec", tmp_path / "model", "untrained", {})
    with contextlib.ExitStack() as successor:

        def judged(*_: object) -> dict[str, float]:
            successor.enter_context(taken_over(workspace.store, "releases"))
            return {"candidate.NDCG@10": 1.0}

        monkeypatch.setattr("raypipe.pipeline.release._judged", judged)
        with pytest.raises(RaypipeError, match="lease on releases ran out"):
            promote(ReleaseConfig(workspace=s3_uri), workspace, f"sasrec/{model.hash}", "")
        assert champion(s3_uri) is None
