"""`raypipe judge`: how good the newest summaries are, by any engines asked and by a rule that counts.

A sample of users, the same for every judge. What each judge said of whom is written to `judgements/<key>.json`; the means, the
shares of each rating and the agreement of every two judges are reported, and logged with prompt, models and seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from pydantic import field_validator

from raypipe.config import shaping
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.metrics.text import Vocabulary, rule_rating, value_counts
from raypipe.pipeline.cards import choose_users
from raypipe.pipeline.job import JobConfig, JobResult, ModelCache, cost_of
from raypipe.pipeline.loaded import BUILTIN, find_builtin_lm
from raypipe.pipeline.summary_state import Catalogue
from raypipe.runtime.progress import say
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace
from raypipe.systems.judges import HIGHEST, Case, EngineJudge, Rubric, agreement
from raypipe.systems.summaries import SummariesConfig

JOB = "judge"
RULE = "rule"
_PIECES = ("items", "summary")


class JudgeConfig(JobConfig, ModelCache):
    """Configuration of `judge`."""

    sample: int = shaping(100, "users whose summaries are judged, chosen by hash", ge=1)
    judges: dict[str, EngineConfig] = shaping(
        dict, 'name → engine, as JSON; beside them the judge "rule", which counts'
    )
    rubric: Rubric = shaping(Rubric, "what the engines are asked of {items} and {summary}")
    summaries: SummariesConfig = shaping(SummariesConfig, "whose summaries: paradigm, window and prompts")

    @field_validator("judges")
    @classmethod
    def _the_rule_keeps_its_name(cls, judges: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        if RULE in judges:
            raise ValueError(f"the judge {RULE!r} is there anyway: give the engine another name")
        return judges


@dataclass(frozen=True)
class _Sample:
    """Users, what an engine is shown of each, and the rule's rating."""

    users: list[str]
    cases: list[Case]
    rule: list[int | None]


def run_judge(config: JudgeConfig) -> JobResult:
    """Rate a sample of the newest summaries. Raises UsageError where there are none."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    try:
        config.rubric.ask(dict.fromkeys(_PIECES, ""))
    except ValueError as error:
        raise UsageError(f"The rubric cannot be asked: {error}.", f"There are {', '.join(_PIECES)}.") from None
    engines = {name: _resolved(config, workspace, engine) for name, engine in config.judges.items()}
    identities = {name: engine.identity() for name, engine in engines.items()}
    sample = _read_sample(config, workspace)
    ratings: dict[str, list[int | None]] = {RULE: sample.rule}
    spent = Usage()
    for name, engine in engines.items():
        judge = EngineJudge(engine.build(), config.rubric)
        ratings[name] = judge.rate(sample.cases)
        spent += Usage(judge.calls, judge.tokens_in, judge.tokens_out)
    metrics = {"users": len(sample.users), **_figures(ratings)}
    key = fingerprint(
        {"judges": identities, "rubric": config.rubric.shaping_values(), "cases": [dict(case) for case in sample.cases]}
    )
    report = {
        "rubric": config.rubric.model_dump(mode="json"),
        "judges": identities,
        "users": sample.users,
        "ratings": ratings,
        "metrics": metrics,
    }
    path = f"judgements/{key}.json"
    workspace.store.put(path, json.dumps(report, ensure_ascii=False, indent=1).encode())
    _say(ratings, metrics)
    say(f"{JOB}: every rating is in {workspace.store.object_uri(path)}")
    cost = cost_of(spent, time.monotonic() - started)
    params = {
        "rubric": config.rubric.prompt,
        "seed": config.rubric.decoding.seed,
        **{f"judge.{name}": engine.model_name or engine.engine for name, engine in config.judges.items()},
    }
    numbers = {name: value for name, value in metrics.items() if value is not None}
    tracking.log_run(JOB, key, params, {**numbers, **cost})
    return JobResult(JOB, "ok", key, metrics=metrics, cost=cost)


def _resolved(config: JudgeConfig, workspace: Workspace, engine: EngineConfig) -> EngineConfig:
    """With the folder of the workspace's own language model, where that is the judge."""
    if not engine.reads_checkpoint or engine.lm != BUILTIN:
        return engine
    model = find_builtin_lm(workspace, "--judges, as lm")
    return engine.model_copy(update={"lm": str(config.fetch(workspace, model))})


def _read_sample(config: JudgeConfig, workspace: Workspace) -> _Sample:
    tables = workspace.tables
    versions = {name: tables[name].version() for name in ("items", "histories", "summaries")}
    files = []
    if ABSENT not in versions.values():
        files = tables["summaries"].files(versions["summaries"], variant=config.summaries.variant)
    if not files:
        raise UsageError(
            f"The workspace {workspace.uri} has no {config.summaries.paradigm} summaries.",
            "Run `raypipe summarize` first, or name the other with --summaries.paradigm.",
        )
    chosen, histories = choose_users(workspace, files, versions["histories"], config.sample)
    catalogue = Catalogue(tables["items"].read(versions["items"]), config.summaries)
    vocabulary = Vocabulary(chain.from_iterable(catalogue.values))
    users, summaries = chosen["user_id"].to_pylist(), chosen["summary"].to_pylist()
    cases: list[Case] = []
    rule: list[int | None] = []
    for user, summary in zip(users, summaries, strict=True):
        window = histories[user][config.summaries.window_start(len(histories[user])) :]
        cases.append(dict(zip(_PIECES, ("\n".join(map(catalogue.line, window)), summary), strict=True)))
        counts = value_counts(catalogue.values[index] for index in window)
        rule.append(rule_rating(vocabulary.named(summary), counts))
    return _Sample(users, cases, rule)


def _figures(ratings: Mapping[str, Sequence[int | None]]) -> dict[str, Any]:
    """Of each judge the mean, the share rated, and the share of each rating; of every two their agreement."""
    found: dict[str, Any] = {}
    for name, given in ratings.items():
        rated = [rating for rating in given if rating is not None]
        found[f"{name}.mean"] = round(sum(rated) / len(rated), 4) if rated else None
        found[f"{name}.rated"] = round(len(rated) / len(given), 4)
        for rating in range(HIGHEST + 1):
            found[f"{name}.share_{rating}"] = round(rated.count(rating) / len(rated), 4) if rated else None
    for one, other in combinations(ratings, 2):
        kappa = agreement(ratings[one], ratings[other])
        found[f"agreement.{one}.{other}"] = None if kappa is None else round(kappa, 4)
    return found


def _say(ratings: Mapping[str, Sequence[int | None]], metrics: Mapping[str, Any]) -> None:
    for name in ratings:
        say(
            f"{JOB}: {name} rates {metrics[f'{name}.mean']} of {HIGHEST} and rated {metrics[f'{name}.rated']:.0%} of the users"
        )
    for pair in (pair for pair in metrics if pair.startswith("agreement.")):
        say(f"{JOB}: {pair.replace('.', ' ')} {metrics[pair]}")
