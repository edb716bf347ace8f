"""`raypipe plan`: what the next `summarize` would cost, before a GPU is touched.

Users and calls are counted, not guessed, in up to `buckets` buckets and scaled from there; tokens come from a sample of
real prompts under the real tokenizer; seconds from the newest finished run of the same engine in this workspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.config import free
from raypipe.pipeline.job import JobConfig, JobResult
from raypipe.pipeline.summarize import JOB, SummarizeOptions
from raypipe.pipeline.summary_state import BucketState, Catalogue, Pins, Recipes
from raypipe.runtime.progress import say
from raypipe.storage.ledger import Usage
from raypipe.storage.workspace import USERS_PER_BUCKET, Workspace
from raypipe.systems.paradigms import calls_needed

_CROWDED = 4 * USERS_PER_BUCKET


class PlanConfig(SummarizeOptions, JobConfig):
    """Configuration of `plan`: the options of the `summarize` it is about."""

    read_buckets: int = free(8, "buckets that are counted; the others are scaled from them", ge=1)
    sample_users: int = free(100, "changed users whose prompts are tokenised", ge=1)


def run_plan(config: PlanConfig) -> JobResult:
    """Count and predict; nothing is written. Raises UsageError as `summarize` would."""
    workspace = config.open_workspace()
    info = workspace.require_info()
    model = config.resolve_model(workspace)
    recipes = config.recipes(workspace, model)
    names = ("histories", "items", "summaries", "block_summaries", "rejects")
    pins = Pins(**{name: workspace.tables[name].version() for name in names})
    catalogue = Catalogue(workspace.tables["items"].read(pins.items), config.summaries)
    read = list(range(0, info.buckets, max(1, info.buckets // config.read_buckets)))[: config.read_buckets]
    users = workspace.tables["histories"].rows(pins.histories)
    counted = [_count(config, workspace, bucket, pins, recipes, catalogue) for bucket in read]
    seen = sum(count["users"] for count in counted)
    scale = users / seen if seen else 0.0
    changed = round(scale * sum(count["changed"] for count in counted))
    calls = round(scale * sum(count["calls"] for count in counted))
    sample = [length for count in counted for length in count["tokens"]]
    engine = config.engine
    if model is not None:
        folder = config.fetch(workspace, model)
        engine = engine.model_copy(update={"lm": str(folder)})
    lengths = engine.token_counter()(sample) if sample else []
    rate = _calls_per_s(workspace, engine.engine)
    metrics = {
        "users": users,
        "users_changed": changed,
        "calls": calls,
        **_tokens(calls, lengths, config.summaries.block_decoding.max_new_tokens),
        "seconds": round(calls / rate) if rate else None,
        "memory_mb_per_worker": _memory_mb(workspace, engine.lm, info.buckets, pins),
        "exact": len(read) == info.buckets,
        "buckets": info.buckets,
        "users_per_bucket": round(users / info.buckets),
    }
    _report(metrics, config)
    cost = {"calls": calls, "tokens_in": metrics["tokens_in"], "tokens_out": metrics["tokens_out_most"]}
    return JobResult("plan", "ok", metrics=metrics, cost={**cost, "seconds": float(metrics["seconds"] or 0)})


def _count(
    config: PlanConfig, workspace: Workspace, bucket: int, pins: Pins, recipes: Recipes, catalogue: Catalogue
) -> dict[str, Any]:
    state = BucketState(workspace, bucket, pins, recipes, config.summaries, catalogue)
    changed = np.flatnonzero(state.changed).tolist()
    names = state.users.take(changed).to_pylist() if changed else []
    known = state.known(names)
    calls = 0
    prompts: list[str] = []
    for user, name in zip(changed, names, strict=True):
        blocks = state.user_blocks(user)
        calls += calls_needed(config.summaries, blocks, known.get(name, {}))
        if len(prompts) < config.sample_users:
            prompts.append(config.summaries.prompts.block_prompt(blocks[0].lines).text)
    return {"users": len(state.users), "changed": len(changed), "calls": calls, "tokens": prompts}


def _tokens(calls: int, lengths: Sequence[int], most_out: int) -> dict[str, Any]:
    if not lengths:
        return {"tokens_in": 0, "tokens_in_error": 0, "tokens_out_most": 0}
    # Two standard errors of the mean prompt length, over all calls.
    error = 2 * float(np.std(lengths)) / math.sqrt(len(lengths))
    return {
        "tokens_in": round(calls * float(np.mean(lengths))),
        "tokens_in_error": round(calls * error),
        "tokens_out_most": calls * most_out,
    }


def _calls_per_s(workspace: Workspace, engine: str) -> float | None:
    """Calls per second of wall clock in the newest finished run that called a model at all."""
    ledger = workspace.ledger(JOB)
    for _, key in sorted(ledger.numbers().items(), reverse=True):
        run = ledger.run(key)
        if (result := run.result()) is None or run.manifest["facts"].get("engine") != engine:
            continue
        cost = result.get("cost", {})
        if cost.get("calls") and cost.get("seconds"):
            return float(cost["calls"]) / float(cost["seconds"])
    return None


def _memory_mb(workspace: Workspace, lm: str, buckets: int, pins: Pins) -> int:
    """Weights plus one bucket's rows, decompressed about fourfold, plus the interpreter."""
    weights = sum(file.stat().st_size for file in Path(lm).glob("*.safetensors")) if lm and Path(lm).is_dir() else 0
    tables = (("histories", pins.histories), ("block_summaries", pins.block_summaries))
    stored = sum(file.size for name, version in tables for file in workspace.tables[name].files(version))
    return round((weights + 4 * stored / buckets) / 2**20) + 500


def _report(metrics: dict[str, Any], config: PlanConfig) -> None:
    say(f"{metrics['users_changed']:,} of {metrics['users']:,} users changed; {metrics['calls']:,} model calls")
    say(
        f"about {metrics['tokens_in']:,} ± {metrics['tokens_in_error']:,} prompt tokens, "
        f"at most {metrics['tokens_out_most']:,} generated ones"
    )
    spent = Usage(metrics["calls"], metrics["tokens_in"], metrics["tokens_out_most"])
    if config.price_in or config.price_out:
        say(f"at most {config.money(spent):,.2f} at the prices given")
    seconds = metrics["seconds"]
    say(
        f"about {seconds / 3600:.2f} hours"
        if seconds
        else "no run of this engine yet to tell the hours from: try --sample"
    )
    if metrics["users_per_bucket"] > _CROWDED:
        say(f"{metrics['users_per_bucket']:,} users a bucket: ingest into a workspace with more --buckets")
