"""`raypipe plan`: predict what the next `summarize`, and a night's explanations, would cost, before a GPU is touched.

Users and calls are counted, not guessed, in up to `read_buckets` buckets, and scaled from there. Prompt tokens come
from a sample of real prompts under the real tokenizer, with two standard errors. The newest finished runs of the same
engine in this workspace give the rest: what earlier answers add to prompts, the generated tokens, and the seconds with
their range over these runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.config import free
from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.explain import ExplainPolicy
from raypipe.pipeline.past_runs import PastRun, past_runs, seconds_of
from raypipe.pipeline.plan_explain import plan_explanations
from raypipe.pipeline.summarize import JOB, SummarizeOptions
from raypipe.pipeline.summary_state import BucketState, Pins, PromptCatalogue, Recipes
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.storage.ledger import Usage
from raypipe.storage.releases import Release, Releases
from raypipe.storage.workspace import USERS_PER_BUCKET, Workspace
from raypipe.systems.paradigms import calls_needed
from raypipe.systems.summaries import SummariesConfig

_CROWDED = 4 * USERS_PER_BUCKET
_COST = {"calls": "calls", "tokens_in": "tokens_in", "tokens_out": "tokens_out_most", "seconds": "seconds"}
"""What the result's cost is called in the metrics."""


class PlanConfig(SummarizeOptions, ExplainPolicy, JobConfig):
    """Configuration of `plan`: the options of the `summarize` it is about, and those of a night's explanations."""

    read_buckets: int = free(8, "buckets that are counted; the others are scaled from them", ge=1)
    sample_users: int = free(100, "changed users whose prompts are tokenised", ge=1)


def run_plan(config: PlanConfig) -> JobResult:
    """Count and predict; nothing is written. Raises UsageError as `summarize` and `explain` would.

    Figures of explanations begin with `explain.`, and the cost is that of summaries and explanations together.
    """
    workspace = config.open_workspace()
    info = workspace.require_info()
    model = config.resolve_model(workspace)
    recipes = config.recipes(workspace, model)
    names = ("histories", "items", "summaries", "block_summaries", "rejects")
    pins = Pins(**{name: workspace.tables[name].version() for name in names})
    catalogue = PromptCatalogue(workspace.tables["items"].read(pins.items), config.summaries)
    read = list(range(0, info.buckets, max(1, info.buckets // config.read_buckets)))[: config.read_buckets]
    users = workspace.tables["histories"].rows(pins.histories)
    counted = [_count(config, workspace, bucket, pins, recipes, catalogue) for bucket in read]
    seen = sum(count.users for count in counted)
    scale = users / seen if seen else 0.0
    reads, merges = (round(scale * sum(getattr(count, name) for count in counted)) for name in ("reads", "merges"))
    engine = config.engine
    if model is not None:
        folder = config.fetch(workspace, model)
        engine = engine.model_copy(update={"lm": str(folder)})
    past = past_runs(workspace, JOB, engine.engine)
    calls = reads + merges
    metrics = {
        "users": users,
        "users_changed": round(scale * sum(count.changed for count in counted)),
        "calls": calls,
        **_tokens(config.summaries, engine, counted, reads, merges, past),
        **seconds_of(calls, past),
        "memory_mb_per_worker": _memory_mb(workspace, engine.lm, info.buckets, pins),
        "exact": len(read) == info.buckets,
        "buckets": info.buckets,
        "users_per_bucket": round(users / info.buckets),
    }
    cost = {name: metrics[kept] or 0 for name, kept in _COST.items()}
    _report(metrics, config)
    if (told := _explanations(config, workspace, read)) is not None:
        metrics |= {f"explain.{name}": value for name, value in told.items()}
        cost = {name: cost[name] + (told[kept] or 0) for name, kept in _COST.items()}
    return JobResult("plan", "ok", metrics=metrics, cost={**cost, "seconds": float(cost["seconds"])})


def _explanations(config: PlanConfig, workspace: Workspace, buckets: Sequence[int]) -> dict[str, Any] | None:
    """What the explanations of the next night would take; None if it would explain nothing."""
    if config.explain_policy == "never":
        return None
    release = Releases(workspace.store).named("champion") or Release()
    options = config.of_release(workspace, release)
    if options is None:
        say(f"the release in force holds no adapter {config.explain.adapter}: nothing would be explained")
        return None
    told = plan_explanations(options, workspace, buckets, config.sample_users)
    say(
        f"{told['pairs_changed']:,} of {told['pairs']:,} pairs to explain; {told['calls']:,} model calls, "
        f"about {told['tokens_in']:,} ± {told['tokens_in_error']:,} prompt tokens, at most {told['tokens_out_most']:,} generated ones"
    )
    return told


@dataclass(frozen=True)
class _Counted:
    """What one bucket holds: users, changed users, blocks to read (`reads`), and merges.

    `updates` is how many of the blocks to read are added to an earlier answer. Of a sample of the changed users,
    `prompts` has the prompt of one block each, without the earlier answer, and `merged` the number of blocks that are
    merged, for each user who has a merge.
    """

    users: int
    changed: int
    reads: int
    updates: int
    merges: int
    prompts: list[str]
    merged: list[int]


def _count(
    config: PlanConfig, workspace: Workspace, bucket: int, pins: Pins, recipes: Recipes, catalogue: PromptCatalogue
) -> _Counted:
    state = BucketState(workspace, bucket, pins, recipes, config.summaries, catalogue)
    changed = np.flatnonzero(state.changed).tolist()
    reads = updates = merges = 0
    recurrent = config.summaries.paradigm == "recurrent"
    prompts: list[str] = []
    merged: list[int] = []
    templates = config.summaries.prompts
    for blocks, known in zip(state.user_blocks(changed), state.known(changed), strict=True):
        read, merge = calls_needed(config.summaries, blocks, known)
        reads, merges = reads + len(read), merges + merge
        updates += sum(block.number > 0 for block in read) if recurrent else 0
        if read and len(prompts) < config.sample_users:
            block = read[len(read) // 2]
            is_update = recurrent and block.number > 0
            prompt = templates.update_prompt("", block.lines) if is_update else templates.block_prompt(block.lines)
            prompts.append(prompt.text)
            merged += [len(blocks)] * merge
    return _Counted(len(state.users), len(changed), reads, updates, merges, prompts, merged)


def _tokens(
    summaries: SummariesConfig,
    engine: EngineConfig,
    counted: Sequence[_Counted],
    reads: int,
    merges: int,
    past: Sequence[PastRun],
) -> dict[str, Any]:
    """Prompt tokens with two standard errors of the sample, and the expected and the most generated tokens."""
    prompts = [prompt for count in counted for prompt in count.prompts]
    most = reads * summaries.block_decoding.most_written + merges * summaries.merge_decoding.most_written
    if not prompts:
        return {"tokens_in": 0, "tokens_in_error": 0, "tokens_out": 0 if past else None, "tokens_out_most": most}
    merged = [blocks for count in counted for blocks in count.merged]
    frames = [summaries.prompts.merge_prompt([""] * blocks).text for blocks in merged]
    counts = engine.token_counter()([*prompts, *frames])
    lengths, frame_lengths = counts[: len(prompts)], counts[len(prompts) :]
    # Without a past run, answers are assumed to be as long as they may be.
    answer = float(np.median([run.answer for run in past])) if past else summaries.block_decoding.max_new_tokens
    shown = reads * answer * sum(count.updates for count in counted) / sum(count.reads for count in counted)
    if merged:
        shown += merges * (float(np.mean(frame_lengths)) + answer * float(np.mean(merged)))
    error = 2 * float(np.std(lengths)) / math.sqrt(len(lengths))
    return {
        "tokens_in": round(reads * float(np.mean(lengths)) + shown),
        "tokens_in_error": round(reads * error),
        "tokens_out": round((reads + merges) * answer) if past else None,
        "tokens_out_most": most,
    }


def _memory_mb(workspace: Workspace, lm: str, buckets: int, pins: Pins) -> int:
    """A worker's memory in MiB: weights, one bucket's rows, decompressed about fourfold, and the interpreter."""
    weights = sum(file.stat().st_size for file in Path(lm).glob("*.safetensors")) if lm and Path(lm).is_dir() else 0
    tables = (("histories", pins.histories), ("block_summaries", pins.block_summaries))
    stored = sum(file.size for name, version in tables for file in workspace.tables[name].files(version))
    return round((weights + 4 * stored / buckets) / 2**20) + 500


def _report(metrics: dict[str, Any], config: PlanConfig) -> None:
    say(f"{metrics['users_changed']:,} of {metrics['users']:,} users changed; {metrics['calls']:,} model calls")
    expected = f"about {metrics['tokens_out']:,} and " if metrics["tokens_out"] is not None else ""
    say(
        f"about {metrics['tokens_in']:,} ± {metrics['tokens_in_error']:,} prompt tokens, "
        f"{expected}at most {metrics['tokens_out_most']:,} generated ones"
    )
    spent = Usage(metrics["calls"], metrics["tokens_in"], metrics["tokens_out_most"])
    if config.price_in or config.price_out:
        say(f"at most {config.money(spent):,.2f} at the prices given")
    if metrics["seconds"] is None:
        say("no run of this engine yet to tell the hours from: try --sample")
    else:
        low, middle, high = (metrics[name] / 3600 for name in ("seconds_least", "seconds", "seconds_most"))
        say(f"about {middle:.2f} hours, {low:.2f} to {high:.2f} by the last runs of this engine")
    if metrics["users_per_bucket"] > _CROWDED:
        say(f"{metrics['users_per_bucket']:,} users a bucket: split them with `raypipe rebucket`")
