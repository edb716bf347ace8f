"""`raypipe release`: judge a candidate beside the release in force, and put it in force; or restore an earlier one.

The gate asks both recommenders for the same held-out events over the same catalogue. A candidate has to reach a share
of the champion's figure and to beat popularity. The first release only has to beat popularity.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from pydantic import field_validator

from raypipe.config import Config, free, shaping
from raypipe.errors import RefusedError, UsageError
from raypipe.language.adapters import read_card
from raypipe.language.checkpoint import checkpoint_hash, resolve_checkpoint
from raypipe.pipeline.evaluate import MOST_ASKED, held_out
from raypipe.pipeline.loaded import BUILTIN, Loaded, find_builtin_lm
from raypipe.recommenders.evaluation import METRICS, evaluate_floor, evaluate_model
from raypipe.recommenders.floors import Popularity
from raypipe.runtime.job import JobConfig, JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.storage.locks import check_held, hold
from raypipe.storage.models import Models, find_model
from raypipe.storage.releases import Release, Releases, Verdict
from raypipe.storage.workspace import Workspace

JOB = "release"


class GateConfig(Config):
    """What a candidate has to reach."""

    metric: str = shaping("NDCG@10", "of `evaluate`, on the last event of every user")
    least_share: float = shaping(0.98, "of the champion's figure", ge=0)
    beats_popularity: bool = shaping(True, "better than recommending what is popular")
    asked: int = shaping(MOST_ASKED, "users asked at most, chosen by the hashes of their ids", ge=1)

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"`evaluate` has no such metric; it has {', '.join(METRICS)}")
        return metric


class ReleaseConfig(JobConfig, ModelCache):
    """Configuration of `release`."""

    recommender: str | None = free(
        None,
        "NAME, for its newest, or NAME/HASH: judge it and put it in force; unset: that in force, with what is given below",
    )
    lm: str | None = free(None, "the release's language model, a hash, hub name or builtin; unset: that in force")
    adapters: tuple[str, ...] | None = free(
        None,
        "NAME or NAME/HASH of adapters of this recommender and language model; unset: of those in force all that fit",
    )
    restore: str | None = free(None, "put this earlier release back in force, unjudged")
    gate: GateConfig = shaping(GateConfig, "what a candidate has to reach")


def run_release(config: ReleaseConfig) -> JobResult:
    """Judge and promote, restore, or list. Raises RefusedError, exit code 3, if the gate keeps the old release."""
    workspace = config.open_workspace()
    workspace.require_info()
    releases = Releases(workspace.store)
    parts = [name for name in ("recommender", "lm", "adapters") if getattr(config, name) is not None]
    if config.restore is not None:
        if parts:
            raise UsageError(f"Both --{parts[0]} and --restore are given.", "Use --restore HASH alone.")
        with hold(workspace.store, ["releases"], JOB, config.lock_lease_s):
            release = releases.get(config.restore)
            releases.point("champion", release)
        say(f"Release {release.hash[:12]} is in force: {release.recommender}")
        return JobResult(JOB, "ok", metrics=asdict(release))
    champion = releases.named("champion")
    if not parts:
        for name in releases.hashes():
            mark = "   in force" if champion is not None and name == champion.hash else ""
            say(f"{name[:12]}  {releases.get(name).recommender}{mark}")
        return JobResult(JOB, "ok", metrics={"champion": champion.hash if champion is not None else None})
    # A night without a recommender has a release too.
    recommender = config.recommender or (champion.recommender if champion is not None else "")
    if not recommender:
        raise UsageError(
            f"--{parts[0]} alone changes the release in force, and none with a recommender is.",
            "Name its recommender with --recommender.",
        )
    lm = find_builtin_lm(workspace, "--lm").hash if config.lm == BUILTIN else config.lm
    metrics = promote(config, workspace, recommender, lm)
    champion = releases.named("champion")
    assert champion is not None
    return JobResult(JOB, "ok", models={"recommender": champion.recommender}, metrics=metrics)


def promote(config: ReleaseConfig, workspace: Workspace, recommender: str, lm: str | None) -> dict[str, float]:
    """Make `recommender` a candidate, judge it, and put it in force. Returns the figures it was judged by.

    Raises RefusedError if the gate keeps the release in force.
    """
    releases = Releases(workspace.store)
    model = find_model(Models(workspace.store), recommender)
    named = f"{model.name}/{model.hash}"
    with hold(workspace.store, ["releases"], JOB, config.lock_lease_s) as locks:
        catalogue = workspace.tables["items"].version()
        champion = releases.named("champion") or Release()
        lm = champion.lm if lm is None else lm
        candidate = Release(named, lm, _adapters(config, workspace, named, lm, champion), catalogue)
        if (champion.recommender, champion.lm, champion.adapters) == (named, lm, candidate.adapters):
            return {}
        releases.point("candidate", releases.add(candidate))
        metrics = _judged(config, workspace, named, champion.recommender)
        gate = config.gate.model_dump(mode="json")
        try:
            _check(config.gate, named, metrics)
        except RefusedError as refusal:
            releases.judge(named, Verdict(False, metrics, gate, (refusal.problem, refusal.remedy)))
            raise
        check_held(locks)  # the judging takes longer than a lease
        releases.point("champion", candidate)
        releases.judge(named, Verdict(True, metrics, gate))
    say(f"Release {candidate.hash[:12]} is in force: {named}")
    return metrics


def _adapters(
    config: ReleaseConfig, workspace: Workspace, recommender: str, lm: str, champion: Release
) -> dict[str, str]:
    """The candidate's adapters, by name, without those of another recommender or language model.

    Raises UsageError if one that belongs to others is asked for.
    """
    models = Models(workspace.store)
    asked = config.adapters
    names = [f"{name}/{content}" for name, content in champion.adapters.items()] if asked is None else asked
    content = _content_of(config, workspace, lm) if names else ""
    found = {}
    for name in names:
        model = find_model(models, name)
        card = read_card(config.fetch(workspace, model))
        # An adapter that is told everything in words, as one that ranks, belongs to no recommender.
        if card.recommender in {"", recommender} and card.lm == content:
            found[model.name] = model.hash
        elif asked is None:
            say(
                f"{JOB}: the adapter {name} belongs to {card.recommender} or to another language model, so the new release is "
                "without it: align again"
            )
        else:
            raise UsageError(
                f"The adapter {name} was trained beside {card.recommender} and another language model or recommender than "
                f"the release's, {recommender} and {lm or 'none'}.",
                "Train one for these two with `raypipe align`.",
            )
    return found


def _content_of(config: ReleaseConfig, workspace: Workspace, lm: str) -> str:
    """The content hash of a release's language model, by which adapters know it."""
    stored = [model for model in Models(workspace.store).all("lm") if model.hash == lm]
    if not lm:
        return ""
    return checkpoint_hash(config.fetch(workspace, stored[0]) if stored else resolve_checkpoint(lm))


def _judged(config: ReleaseConfig, workspace: Workspace, candidate: str, champion: str) -> dict[str, float]:
    """The gate's metric of candidate, champion and popularity, on the events that neither model was trained on.

    A champion that was trained on every event is left out.
    """
    loaded = {candidate: Loaded.of(config, workspace, candidate)}
    if champion not in {"", candidate}:
        loaded[champion] = Loaded.of(config, workspace, champion)
        if not int(loaded[champion].model.lineage["hold_out"]):
            say(
                f"{JOB}: {champion}, which is in force, was trained on every event, so that the candidate is not compared with it",
                "warning",
            )
            del loaded[champion]
    held = held_out(workspace, [one.model for one in loaded.values()], config.gate.asked)
    metric = config.gate.metric
    known = {name: evaluate_model(one.recommender, held) for name, one in loaded.items()}
    figures = {"candidate": known[candidate][metric].value}
    if champion in known:
        figures["champion"] = known[champion][metric].value
    floor = evaluate_floor(Popularity(held.training, held.items), held)
    if metric in floor:
        figures["popularity"] = floor[metric].value
    return {f"{name}.{metric}": round(value, 6) for name, value in figures.items()}


def _check(gate: GateConfig, named: str, metrics: dict[str, float]) -> None:
    found = {name.split(".")[0]: value for name, value in metrics.items()}
    if not math.isfinite(found["candidate"]):
        raise RefusedError(
            f"{named} has a {gate.metric} of {found['candidate']}, which is no number.",
            "Train it again, or choose another --gate.metric; `raypipe evaluate` shows what it has.",
        )
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
