"""`raypipe judge`: rate the newest summaries or explanations, by any number of engines and by a rule that counts.

Every judge rates the same sample of users. What each judge said of each user is written to `judgements/<key>.json`. The
means, the shares of each rating and the agreement of every two judges are reported, and logged with prompt, models and
seed. For explanations the report also tells how often the decision is right, their coherence, and their distinction
from every other variant that explains the same pairs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from pydantic import field_validator

from raypipe.config import shaping
from raypipe.engines.engine import EngineConfig
from raypipe.errors import UsageError
from raypipe.pipeline.forget_traces import without_users
from raypipe.pipeline.forgotten import forgotten_users, locked_traces
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.judge_engines import judge_params, resolved_judges
from raypipe.pipeline.judged import EXPLANATION_PIECES, SUMMARY_PIECES, sample_explanations, sample_summaries
from raypipe.runtime.job import JobConfig, JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.systems.judges import EXPLANATION, HIGHEST, EngineJudge, Rubric, agreement
from raypipe.systems.summaries import SummariesConfig

JOB = "judge"
RULE = "rule"


class JudgeConfig(JobConfig, ModelCache):
    """Configuration of `judge`."""

    what: Literal["summaries", "explanations"] = shaping("summaries", "of which the newest are judged")
    sample: int = shaping(100, "how many are judged, of users chosen by hash", ge=1)
    judges: dict[str, EngineConfig] = shaping(
        dict, 'name → engine, as JSON; lm `builtin` is the workspace\'s own; beside them the judge "rule", which counts'
    )
    rubric: Rubric | None = shaping(
        None, "what the engines are asked; unset: of {items} and {summary}, or {history}, {item}, {label} …"
    )
    explanations: str = shaping("explain-recexplainer-h", "whose explanations: their variant")
    summaries: SummariesConfig = shaping(SummariesConfig, "whose summaries: paradigm, window and prompts")

    @field_validator("judges")
    @classmethod
    def _the_rule_keeps_its_name(cls, judges: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        if RULE in judges:
            raise ValueError(f"the judge {RULE!r} is there anyway: give the engine another name")
        return judges


def run_judge(config: JudgeConfig) -> JobResult:
    """Rate a sample of the newest summaries or explanations.

    Raises UsageError if there are none, or if the rubric cannot be asked.
    """
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    of_summaries = config.what == "summaries"
    pieces = SUMMARY_PIECES if of_summaries else EXPLANATION_PIECES
    rubric = config.rubric or (Rubric() if of_summaries else Rubric(prompt=EXPLANATION))
    try:
        rubric.ask(dict.fromkeys(pieces, ""))
    except ValueError as error:
        raise UsageError(f"The rubric cannot be asked: {error}.", f"There are {', '.join(pieces)}.") from None
    engines = resolved_judges(config, workspace, config.judges, "--judges")
    identities = {name: engine.identity() for name, engine in engines.items()}
    if of_summaries:
        sample = sample_summaries(workspace, config.summaries, config.sample)
    else:
        sample = sample_explanations(workspace, config, config.explanations, config.sample)
    ratings: dict[str, list[int | None]] = {RULE: sample.rule}
    spent = Usage()
    for name, engine in engines.items():
        judge = EngineJudge(engine.build(), rubric)
        ratings[name] = judge.rate(sample.cases)
        spent += Usage(judge.calls, judge.tokens_in, judge.tokens_out)
    metrics = {"users": len(set(sample.users)), "cases": len(sample.cases), **_figures(ratings), **sample.figures}
    key = fingerprint(
        {
            "judges": identities,
            "rubric": rubric.shaping_values(),
            "cases": [dict(case) for case in sample.cases],
            "figures": dict(sample.figures),
        }
    )
    report = {
        "what": config.summaries.variant if of_summaries else config.explanations,
        "rubric": rubric.model_dump(mode="json"),
        "judges": identities,
        "users": sample.users,
        "ratings": ratings,
        "metrics": metrics,
        "created": time.time(),
    }
    path = f"judgements/{key}.json"
    with locked_traces(workspace, JOB, config.lock_lease_s):
        kept = without_users(report, forgotten_users(workspace, sample.users))
        workspace.store.put(path, json.dumps(kept, ensure_ascii=False, indent=1).encode())
    _say(ratings, metrics)
    say(f"{JOB}: every rating is in {workspace.store.object_uri(path)}")
    cost = cost_of(spent, time.monotonic() - started)
    params = judge_params(rubric, config.judges, identities)
    numbers = {name: value for name, value in metrics.items() if value is not None}
    tracking.log_run(JOB, key, params, {**numbers, **cost})
    return JobResult(JOB, "ok", key, metrics=metrics, cost=cost)


def _figures(ratings: Mapping[str, Sequence[int | None]]) -> dict[str, Any]:
    """The mean, the share rated and the share of each rating of each judge, and the agreement of every two judges."""
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
            f"{JOB}: {name} rates {metrics[f'{name}.mean']} of {HIGHEST} and rated {metrics[f'{name}.rated']:.0%} of the cases"
        )
    for pair in (pair for pair in metrics if pair.startswith("agreement.")):
        say(f"{JOB}: {pair.replace('.', ' ')} {metrics[pair]}")
    if metrics.get("decision.accuracy") is not None:
        say(
            f"{JOB}: {metrics['decision.accuracy']:.0%} of {metrics['decision.cases']:,} decisions are the recommender's, always "
            f"saying yes has {metrics['decision.constant']:.0%}"
        )
    if metrics.get("coherence.mse") is not None:
        say(
            f"{JOB}: the recommender's scores are read from the words with a squared error of {metrics['coherence.mse']}, "
            f"their mean has {metrics['coherence.constant']}"
        )
    for name in (name for name in metrics if name.startswith("distinction.") and name.endswith(".accuracy")):
        if metrics[name] is not None:
            other = name.removeprefix("distinction.").removesuffix(".accuracy")
            say(
                f"{JOB}: {metrics[name]:.0%} are told from {other}, {metrics[f'distinction.{other}.chance']:.0%} by guessing"
            )
