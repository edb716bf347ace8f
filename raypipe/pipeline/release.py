"""`raypipe release`: judge a candidate beside the release in force, and put it in force, or point back to an earlier one.

The gate asks for the same held-out events of both recommenders, over the same catalogue. A candidate has to reach a
share of the champion's figure and to beat popularity; the first release has popularity alone to beat.
"""

from __future__ import annotations

from dataclasses import asdict

from raypipe.config import Config, free, shaping
from raypipe.errors import RefusedError, UsageError
from raypipe.pipeline.evaluate import held_out
from raypipe.pipeline.job import JobConfig, JobResult, ModelCache
from raypipe.pipeline.loaded import Loaded, find_model
from raypipe.recommenders.evaluation import evaluate_floor, evaluate_model
from raypipe.recommenders.floors import Popularity
from raypipe.runtime.progress import say
from raypipe.storage.locks import hold
from raypipe.storage.models import Models
from raypipe.storage.releases import Release, Releases
from raypipe.storage.workspace import Workspace

JOB = "release"


class GateConfig(Config):
    """What a candidate has to reach."""

    metric: str = shaping("NDCG@10", "of `evaluate`, on the last event of every user")
    least_share: float = shaping(0.98, "of the champion's figure", ge=0)
    beats_popularity: bool = shaping(True, "better than recommending what is popular")


class ReleaseConfig(JobConfig, ModelCache):
    """Configuration of `release`."""

    recommender: str | None = free(None, "NAME, for its newest, or NAME/HASH: judge it and put it in force")
    lm: str | None = free(None, "the release's language model, a hash or hub name; unset: that of the one in force")
    restore: str | None = free(None, "put this earlier release back in force, unjudged")
    gate: GateConfig = shaping(GateConfig, "what a candidate has to reach")


def run_release(config: ReleaseConfig) -> JobResult:
    """Judge and promote, restore, or list. Raises RefusedError, exit code 3, where the gate keeps the old release."""
    workspace = config.open_workspace()
    workspace.require_info()
    releases = Releases(workspace.store)
    if config.restore is not None:
        if config.recommender is not None:
            raise UsageError("Both --recommender and --restore are given.", "Use --restore HASH alone.")
        with hold(workspace.store, ["releases"], JOB, config.lock_lease_s):
            release = releases.get(config.restore)
            releases.point("champion", release)
        say(f"Release {release.hash[:12]} is in force: {release.recommender}")
        return JobResult(JOB, "ok", metrics=asdict(release))
    if config.recommender is None:
        champion = releases.named("champion")
        for name in releases.hashes():
            mark = "   in force" if champion is not None and name == champion.hash else ""
            say(f"{name[:12]}  {releases.get(name).recommender}{mark}")
        return JobResult(JOB, "ok", metrics={"champion": champion.hash if champion is not None else None})
    metrics = promote(config, workspace, config.recommender, config.lm)
    champion = releases.named("champion")
    assert champion is not None
    return JobResult(JOB, "ok", models={"recommender": champion.recommender}, metrics=metrics)


def promote(config: ReleaseConfig, workspace: Workspace, recommender: str, lm: str | None) -> dict[str, float]:
    """Make `recommender` a candidate, judge it, and put it in force. Returns the figures it was judged by.

    Raises RefusedError where the gate keeps the release in force.
    """
    releases = Releases(workspace.store)
    model = find_model(Models(workspace.store), recommender)
    named = f"{model.name}/{model.hash}"
    with hold(workspace.store, ["releases"], JOB, config.lock_lease_s):
        catalogue = workspace.tables["items"].version()
        champion = releases.named("champion") or Release()
        candidate = Release(named, champion.lm if lm is None else lm, champion.adapters, catalogue)
        if (champion.recommender, champion.lm) == (candidate.recommender, candidate.lm):
            return {}
        releases.point("candidate", releases.add(candidate))
        metrics = _judged(config, workspace, named, champion.recommender)
        try:
            _check(config.gate, named, metrics)
        except RefusedError:
            releases.judge(named, False, metrics)
            raise
        releases.point("champion", candidate)
        releases.judge(named, True, metrics)
    say(f"Release {candidate.hash[:12]} is in force: {named}")
    return metrics


def _judged(config: ReleaseConfig, workspace: Workspace, candidate: str, champion: str) -> dict[str, float]:
    """The gate's metric of candidate, champion and popularity, on the events that neither model was trained on."""
    names = [candidate] + ([champion] if champion not in {"", candidate} else [])
    loaded = {name: Loaded.of(config, workspace, name) for name in names}
    held = held_out(workspace, max(int(one.model.lineage["hold_out"]) for one in loaded.values()))
    metric = config.gate.metric
    known = {name: evaluate_model(one.recommender, held) for name, one in loaded.items()}
    if metric not in known[candidate]:
        raise UsageError(f"There is no metric {metric}.", f"Known are: {', '.join(known[candidate])}.")
    figures = {"candidate": known[candidate][metric].value}
    if champion:
        figures["champion"] = known[champion][metric].value
    floor = evaluate_floor(Popularity(held.training, held.items), held)
    if metric in floor:
        figures["popularity"] = floor[metric].value
    return {f"{name}.{metric}": round(value, 6) for name, value in figures.items()}


def _check(gate: GateConfig, named: str, metrics: dict[str, float]) -> None:
    found = {name.split(".")[0]: value for name, value in metrics.items()}
    least = found.get("champion", 0.0) * gate.least_share
    if found["candidate"] < least:
        raise RefusedError(
            f"{named} has a {gate.metric} of {found['candidate']:.4f}, less than {gate.least_share:.0%} of the "
            f"{found['champion']:.4f} of the release in force, which stays.",
            "Train longer or with other options; `raypipe evaluate` shows where it loses.",
        )
    if gate.beats_popularity and found["candidate"] <= found.get("popularity", -1.0):
        raise RefusedError(
            f"{named} has a {gate.metric} of {found['candidate']:.4f} and popularity one of {found['popularity']:.4f}.",
            "A recommender that does not beat popularity has not learnt: train longer, or look at the log.",
        )
