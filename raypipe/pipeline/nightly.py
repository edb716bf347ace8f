"""`raypipe nightly`: ingest, models, states, recommendations, summaries, explanations, night manifest, user cards.

A step is skipped if nothing it reads and nothing of its recipe changed. The language model is trained once, if the
workspace has none, and never again by this job. A recommender is trained if `train_policy` says so, and takes the place
of the one in force only if it passes the gate. If it does not pass, the night is published on the old one and the job
ends refused, exit code 3. If `explain_policy` says so, everybody's top recommendation is explained by the release's
adapter. A step's caps are for the whole night: they count what the step spends in every pass, and in every submission
until the night is published.

The manifest is written last: until then readers see the night before. It names the histories and items that states,
lists, summaries and explanations were made of. If another job has meanwhile published other histories or items, or rows
in the place of these, the steps run again, which costs only what changed. A training does not run again: a model may be
older than what it is asked about.

With `until` the job is a backfill: one night after the other, each over the log of its date.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator

from raypipe.config import free, shaping
from raypipe.errors import RaypipeError, RefusedError, UsageError
from raypipe.pipeline.cards import write_cards
from raypipe.pipeline.explain import ExplainConfig, Explainer, ExplainPolicy, run_explain
from raypipe.pipeline.extract import ExtractConfig, ExtractOptions, run_extract
from raypipe.pipeline.ingest import IngestConfig, IngestOptions, run_ingest
from raypipe.pipeline.job import CapOptions, cost_of
from raypipe.pipeline.lm import MODEL, LmConfig, LmOptions, run_lm
from raypipe.pipeline.loaded import BUILTIN, find_builtin_lm, is_builtin
from raypipe.pipeline.online import OnlineConfig, OnlineOptions, run_online
from raypipe.pipeline.recommend import RecommendConfig, RecommendOptions, run_recommend
from raypipe.pipeline.release import GateConfig, ReleaseConfig, promote
from raypipe.pipeline.summarize import SummarizeConfig, SummarizeOptions, run_summarize
from raypipe.pipeline.train import TrainConfig, TrainOptions, run_train
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.publishing import settled_versions
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import Lock, check_held, hold
from raypipe.storage.models import Models
from raypipe.storage.night_runs import NightRun, NightRuns
from raypipe.storage.nights import Night, Nights, check_date
from raypipe.storage.online import open_online_store
from raypipe.storage.releases import Release, Releases
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace

JOB = "nightly"
_DATE = "{date}"
_READ = ("histories", "items")
_PASSES = 3
"""How often the steps run at most, if other jobs keep publishing what they read."""


class NightlyConfig(ExplainPolicy, JobConfig):
    """Configuration of `nightly`: its steps' options, and the night's date."""

    date: str | None = free(None, "the night's date, YYYY-MM-DD, for {date} in the log's path too; unset: today")
    until: str | None = free(None, "last date of a backfill: a night for each date from `date` on, in order")
    ingest: IngestOptions = shaping(IngestOptions, "the log and the catalogue; without a log this step reads none")
    lm: LmOptions = shaping(LmOptions, "the workspace's own language model")
    train_policy: Literal["never", "nightly"] = free(
        "never", "whether a recommender is trained on what the night brought"
    )
    train: TrainOptions = shaping(TrainOptions, "the recommender, where one is trained")
    gate: GateConfig = shaping(GateConfig, "what a new recommender has to reach")
    extract: ExtractOptions = shaping(ExtractOptions, "states by the recommender in force")
    recommend: RecommendOptions = shaping(RecommendOptions, "lists by the recommender in force")
    summarize: SummarizeOptions = shaping(SummarizeOptions, "the summaries")
    online: OnlineOptions | None = free(
        None,
        "loads the published night into the online store, for example --online.keep 1; unset: `raypipe online` does",
    )
    cards: int = free(12, "users shown in the night's cards", ge=0)

    @model_validator(mode="after")
    def _gate_needs_an_event(self) -> NightlyConfig:
        if self.train_policy == "nightly" and not self.train.hold_out:
            raise ValueError(
                "the gate asks a new recommender for the last event of every user, which training sees with train.hold_out 0: "
                "set train.hold_out to 2 or more, to 1 if nothing is validated, or train_policy to never"
            )
        return self

    def shared(self) -> dict[str, Any]:
        """The options that every step takes from the night."""
        return {name: getattr(self, name) for name in JobConfig.model_fields}


def run_nightly(config: NightlyConfig) -> JobResult:
    """Run the night, or the nights; see the module. A step's failure leaves the night before in force.

    Raises UsageError for dates that make no sense together.
    """
    dates = _dates(config)
    results = [_run_night(config, date) for date in _left(config, dates)]
    if config.until is None:
        return results[0]
    status = next((name for name in ("refused", "ok") if any(r.status == name for r in results)), "nothing_to_do")
    cost: Counter[str] = Counter({"calls": 0})
    for result in results:
        cost.update(result.cost)
    last = results[-1] if results else JobResult(JOB, status)
    return replace(last, status=status, cost=dict(cost), metrics={**last.metrics, "nights": len(dates)})


def _left(config: NightlyConfig, dates: Sequence[str]) -> list[str]:
    """The dates to run: those without a published night, and the last one, which may be done again.

    The tables hold what later dates brought by now, and it would be in an earlier night. So a published night is left
    out if a later date is published or asked for. Raises UsageError if that is the only night asked for.
    """
    published = Nights(config.open_workspace().store).dates()
    done = [date for date in dates if date in published and date < max(dates[-1], published[-1])]
    if done and config.until is None:
        raise UsageError(
            f"The night of {done[0]} is published, and so is that of {published[-1]}, whose events the tables hold by now.",
            f"Run the night of a later date; `raypipe night --restore {done[0]}` puts that one back in force as it was.",
        )
    if done:
        say(f"{JOB}: {len(done)} of {len(dates)} nights were published before")
    return [date for date in dates if date not in done]


def _dates(config: NightlyConfig) -> list[str]:
    first = check_date(config.date or datetime.date.today().isoformat())
    if config.until is None:
        return [first]
    start, end = datetime.date.fromisoformat(first), datetime.date.fromisoformat(check_date(config.until))
    if config.date is None or end < start:
        raise UsageError(
            f"A backfill until {config.until} has no first date before it.", "Give --date, the date it begins with."
        )
    if config.ingest.log is None or _DATE not in config.ingest.log.path:
        raise UsageError(
            "A backfill reads a log for each date, and the log's path names none.",
            f"Put {_DATE} where the date stands in it, for example --ingest.log.path logs/{_DATE}.parquet.",
        )
    return [(start + datetime.timedelta(days)).isoformat() for days in range((end - start).days + 1)]


def _ingest_options(config: NightlyConfig, date: str) -> dict[str, Any]:
    log = config.ingest.log
    if log is None:
        return dict(config.ingest)
    return {**dict(config.ingest), "log": log.model_copy(update={"path": log.path.replace(_DATE, date)})}


def _run_night(config: NightlyConfig, date: str) -> JobResult:
    started = time.monotonic()
    workspace = config.open_workspace()
    runs = NightRuns(workspace.store, date)
    steps = _Steps(workspace, runs)
    trained = ""
    refusal: RefusedError | None = None
    if config.online is not None:  # if no store is named, this fails before the night's work
        open_online_store(config.online.store, workspace.store).close()
    champion = Releases(workspace.store).named("champion")
    if champion is not None and (explaining := config.of_release(workspace, champion)) is not None:
        Explainer.of(explaining, workspace)  # what cannot explain fails before the night's work

    engine = config.summarize.engine
    lm = engine.model_name or engine.engine
    if engine.reads_checkpoint and is_builtin(lm) and lm != BUILTIN:
        lm = find_builtin_lm(workspace, "--summarize.engine.lm", lm).hash
    shared = config.shared()
    if config.ingest.log is not None or config.ingest.catalogue is not None:
        steps.take("ingest", lambda: run_ingest(IngestConfig(**shared, **_ingest_options(config, date)), runs))
    if engine.reads_checkpoint and engine.lm == BUILTIN:
        lm = steps.take("lm", lambda: _train_once(config, workspace, shared)).models[MODEL]
    if config.train_policy == "nightly":
        training = steps.take("train", lambda: run_train(TrainConfig(**shared, **dict(config.train))))
        ((name, content),) = training.models.items()
        trained = f"{name}/{content}"
        refusal = _judge(config, workspace, trained, training.status == "ok", lm)
    release = _in_force(config, workspace, lm)
    explaining = config.of_release(workspace, release)
    if explaining is None and config.explain_policy == "nightly":
        say(
            f"{JOB}: the release in force holds no adapter {config.explain.adapter}, and nothing is explained: train one with "
            "`raypipe align`, and put it in force with `raypipe release --adapters`"
        )

    def compute() -> None:
        if release.recommender:
            model = {"model": release.recommender}
            extract = ExtractConfig(**shared, **dict(config.extract) | model)
            recommend = RecommendConfig(**shared, **dict(config.recommend) | model)
            steps.write("extract", lambda: run_extract(extract, runs))
            steps.write("recommend", lambda: run_recommend(recommend, runs))
        steps.write("summarize", lambda: run_summarize(SummarizeConfig(**shared, **dict(config.summarize)), runs))
        if explaining is not None:
            steps.write("explain", lambda: run_explain(ExplainConfig(**shared, **dict(explaining)), runs))

    parts = {"release": release.hash, "recommender": release.recommender, "lm": release.lm}
    tables, is_new = _published(config, workspace, date, parts, compute, steps)
    steps.end()  # now, as what follows spends nothing and may fail
    if (online := config.online) is not None:
        steps.take("online", lambda: run_online(OnlineConfig(**shared, **dict(online))))
    status = "ok" if is_new else "nothing_to_do"
    if refusal is not None:
        say(f"{JOB}: {refusal.problem} {refusal.remedy}")
        status = "refused"
    ended = _result(config, workspace, steps, status, tables, parts, time.monotonic() - started)
    if refusal is not None:
        Releases(workspace.store).tell(trained)  # last, so that a night that was interrupted refuses again
    return ended


class _Steps:
    """What the steps of a night did, in all its passes and submissions."""

    def __init__(self, workspace: Workspace, runs: NightRuns) -> None:
        self.workspace = workspace
        self._runs = runs
        self._ended: list[NightRun] | None = None
        self._results: dict[str, JobResult] = {}
        self._left: dict[tuple[str, str], set[str]] = {}

    def take(self, name: str, step: Callable[[], JobResult]) -> JobResult:
        before = time.monotonic()
        result = step()
        say(f"{name}: {result.status}, {time.monotonic() - before:.1f} s")
        self._results[name] = result
        return result

    def write(self, job: str, step: Callable[[], JobResult]) -> None:
        """Run a step that writes tables as `take` does, and note which files it left in them."""
        key, ledger = self.take(job, step).run_key, self.workspace.ledger(job)
        run = ledger.run(key) if key else ledger.newest()  # without a key there was nothing left to do
        assert run is not None, f"{job} has run"
        after = {name: table["version"] for name, table in (run.result() or {}).get("tables", {}).items()}
        variant = run.manifest["facts"]["variant"]
        for name, before in run.manifest["base"].items():
            self._left[name, variant] = self.workspace.tables[name].paths(after.get(name, before), variant=variant)

    def stand(self, versions: Mapping[str, int]) -> bool:
        """Whether these versions of the tables have the rows that the steps left there."""
        return all(
            self.workspace.tables[name].paths(versions[name], variant=variant) == paths
            for (name, variant), paths in self._left.items()
        )

    def end(self) -> None:
        """Note that the night is published. What comes next on its date is another night."""
        self._ended = self._runs.all()
        self._runs.close()

    def runs(self) -> list[NightRun]:
        """What the night has spent, run by run."""
        return self._runs.all() if self._ended is None else self._ended

    def told(self) -> dict[str, JobResult]:
        """The last result of each step by name.

        What a step did before it had to run again belongs to the night too, as `NAME.pass1` and so on.
        """
        runs, found = self.runs(), dict[str, JobResult]()
        for name, result in self._results.items():
            ended = [JobResult.from_dict(run.result) for run in runs if run.job == name and run.result is not None]
            did = [one for one in ended if one.status != "nothing_to_do"] or ended[-1:] or [result]
            found |= {f"{name}.pass{number}": earlier for number, earlier in enumerate(did[:-1], 1)}
            found[name] = did[-1]
        return found


def _published(
    config: NightlyConfig,
    workspace: Workspace,
    date: str,
    parts: Mapping[str, str],
    compute: Callable[[], None],
    steps: _Steps,
) -> tuple[dict[str, int], bool]:
    """Run the steps that write tables, and publish the night of what they wrote. `compute` runs them through `steps`.

    Returns the night's tables, and whether it is another than the one in force. Raises RaypipeError if, during each of
    the passes, other jobs published histories, items or rows in the place of the steps' rows.
    """
    for passes in range(_PASSES):
        if passes:
            say(
                f"{JOB}: another job published histories, items or other rows of the night's while it ran: its steps run again"
            )
        read = settled_versions(workspace, *_READ)
        compute()
        # Under the lock that `forget` takes, so that it removes nobody from the tables between this reading of their
        # versions and the manifest.
        with hold(workspace.store, ["nights"], JOB, config.lock_lease_s) as locks:
            versions = {name: table.version() for name, table in workspace.tables.items()}
            tables = {name: version for name, version in versions.items() if version != ABSENT}
            # Versions only grow: if those from before the steps are the newest now, no step and no line above read
            # others.
            if read is not None and settled_versions(workspace, *_READ) == read and steps.stand(versions):
                night = Night(date, tables, parts, _metrics(steps.told()), config.summarize.summaries.variant)
                return tables, _publish(config, workspace, night, locks)
    raise RaypipeError(
        f"Other jobs published histories, items or other rows of the night's during each of the {_PASSES} times that its steps ran, "
        "so that what they made is not all of the same ones.",
        "The night before stays in force. Stop what publishes all the time, or let it wait for the night, and submit the same "
        "command again: it computes only what changed.",
    )


def _publish(config: NightlyConfig, workspace: Workspace, night: Night, locks: Sequence[Lock]) -> bool:
    """Put the night in force, unless one of the same tables, release and summaries is. Returns whether it did.

    The caller holds the nights' lock.
    """
    nights = Nights(workspace.store)
    current = nights.current()
    if current is not None and replace(night, date=current.date, metrics=current.metrics) == current:
        return False
    write_cards(workspace, night.date, night.tables, config.cards, config.summarize.summaries)
    check_held(locks)  # cards of many users take longer than a lease
    nights.publish(night)
    say(f"{JOB}: the night of {night.date} is in force")
    return True


def _metrics(results: Mapping[str, JobResult]) -> dict[str, dict[str, Any]]:
    return {name: dict(result.metrics) for name, result in results.items()}


def _judge(config: NightlyConfig, workspace: Workspace, named: str, is_new: bool, lm: str) -> RefusedError | None:
    """Put a newly trained recommender in force, or return the refusal.

    A recommender that passed, or that this very gate refused, is not judged again. A refusal with which no night has
    ended yet is returned again.
    """
    releases = Releases(workspace.store)
    if not is_new and (verdict := releases.verdict(named)) is not None:
        if verdict.passed:
            return None
        if verdict.gate == config.gate.model_dump(mode="json"):
            return None if verdict.told else RefusedError(*verdict.refusal)
    if (champion := releases.named("champion")) is not None and champion.adapters:
        lm = champion.lm
    try:
        promote(ReleaseConfig(**config.shared(), gate=config.gate), workspace, named, lm)
    except RefusedError as refusal:
        return refusal
    return None


def _in_force(config: NightlyConfig, workspace: Workspace, lm: str) -> Release:
    """The release in force. Its language model is the one its adapters read with, or `lm` if it has no adapters.

    `lm` is the one that summarises.
    """
    releases = Releases(workspace.store)
    champion = releases.named("champion") or Release(catalogue=workspace.tables["items"].version())
    if champion.lm != lm and not champion.adapters:
        with hold(workspace.store, ["releases"], JOB, config.lock_lease_s):
            champion = releases.add(replace(champion, lm=lm))
            releases.point("champion", champion)
    return champion


def _train_once(config: NightlyConfig, workspace: Workspace, shared: Mapping[str, Any]) -> JobResult:
    if (model := Models(workspace.store).newest(MODEL)) is not None:
        return JobResult("lm", "nothing_to_do", model.recipe, models={MODEL: model.hash})
    return run_lm(LmConfig(**shared, **dict(config.lm)))


def _result(
    config: NightlyConfig,
    workspace: Workspace,
    steps: _Steps,
    status: str,
    tables: Mapping[str, int],
    release: Mapping[str, Any],
    seconds: float,
) -> JobResult:
    shown = {
        name: {"version": version, "rows": workspace.tables[name].rows(version), "rejected": 0}
        for name, version in tables.items()
    }
    results = steps.told()
    for result in results.values():
        # What a step published is not the night's if another job replaced it before the night was published.
        shown.update({name: dict(table) for name, table in result.tables.items() if table["version"] == tables[name]})
    spent = steps.runs()
    paying: list[CapOptions] = [config.recommend, config.summarize, config.explain]
    prices = dict(zip(("recommend", "summarize", "explain"), paying, strict=True))
    money = sum(prices[run.job].money(run.spent) for run in spent if run.job in prices)
    cost = {**cost_of(sum((run.spent for run in spent), Usage()), seconds), "money": round(money, 6)}
    metrics = {f"{name}.{key}": value for name, values in _metrics(results).items() for key, value in values.items()}
    run_key = results["summarize"].run_key
    return JobResult(JOB, status, run_key, shown, {key: str(value) for key, value in release.items()}, metrics, cost)
