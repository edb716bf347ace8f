"""What the next `explain` would cost: pairs are counted in some buckets, and real prompts of a sample are tokenised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from raypipe.engines.engine import EngineConfig
from raypipe.language.adapters import AdapterConfig, read_card
from raypipe.language.prompt import Prompt, Text
from raypipe.pipeline.explain import JOB, Explainer, ExplainOptions, input_tables, read_pairs
from raypipe.pipeline.explain_units import TABLE, ExplainBucket
from raypipe.pipeline.past_runs import past_runs, seconds_of
from raypipe.runtime.budget import Budget, Limits
from raypipe.storage.ledger import Usage
from raypipe.storage.workspace import Workspace
from raypipe.systems.explanations import ExplanationRequest

_CALLS = 2  # for each pair: the decision is scored, the explanation generated


def plan_explanations(
    config: ExplainOptions, workspace: Workspace, buckets: Sequence[int], sample: int
) -> dict[str, Any]:
    """Pairs, calls, tokens and seconds, scaled from these buckets. Raises UsageError as `explain` would.

    `tokens_in_error` is two standard errors of the sample. Answers that are asked for again are not foreseen.
    """
    explainer = Explainer.of(config, workspace)
    versions = {name: workspace.tables[name].version() for name in (*input_tables(config), TABLE)}
    pairs = read_pairs(config, workspace, explainer)
    if pairs is None:
        explainer.check_lists(workspace)
    work = ExplainBucket(explainer.task(config, workspace, versions, pairs), Budget(Limits(), Usage()))
    users = seen = due = 0
    requests: list[ExplanationRequest] = []
    for bucket in buckets:
        rows = work.rows(bucket)
        found = work.due(rows)
        users, seen, due = users + len(rows.users), seen + found.pairs.num_rows, due + found.work.num_rows
        if (left := sample - len(requests)) > 0:
            requests += work.asked(rows, found.work.slice(0, left))
    scale = workspace.tables["histories"].rows(versions["histories"]) / users if users else 0.0
    changed = round(scale * due)
    past = past_runs(workspace, JOB, config.engine.engine)
    return {
        "pairs": round(scale * seen),
        "pairs_changed": changed,
        "calls": _CALLS * changed,
        **_tokens(explainer, config, workspace, requests, changed),
        "tokens_out": round(_CALLS * changed * float(np.median([run.answer for run in past]))) if past else None,
        "tokens_out_most": changed * config.decoding.most_written,
        **seconds_of(_CALLS * changed, past),
    }


def _tokens(
    explainer: Explainer,
    config: ExplainOptions,
    workspace: Workspace,
    requests: Sequence[ExplanationRequest],
    pairs: int,
) -> dict[str, int]:
    if not requests:
        return {"tokens_in": 0, "tokens_in_error": 0}
    folder = config.fetch(workspace, explainer.adapter)
    engine = config.engine
    if explainer.lm is not None:
        engine = engine.model_copy(update={"lm": str(config.fetch(workspace, explainer.lm))})
    prompts = [prompt for request in requests for prompt in (request.decision, request.explanation)]
    lengths = np.array(_lengths(prompts, engine, read_card(folder).config)).reshape(-1, 2).sum(1)
    error = 2 * float(np.std(lengths)) / math.sqrt(len(lengths))
    return {"tokens_in": round(pairs * float(np.mean(lengths))), "tokens_in_error": round(pairs * error)}


def _lengths(prompts: Sequence[Prompt], engine: EngineConfig, adapter: AdapterConfig) -> list[int]:
    """The lengths of prompts in tokens. Each piece of text is tokenised by itself, as the engine does."""
    texts = [[one.text for one in prompt.segments if isinstance(one, Text)] for prompt in prompts]
    counts = iter(engine.token_counter()([text for mine in texts for text in mine]))
    soft = [
        sum(
            adapter.projectors[one.source].tokens_of(len(one.values))
            for one in prompt.segments
            if not isinstance(one, Text)
        )
        for prompt in prompts
    ]
    return [tokens + sum(next(counts) for _ in mine) for tokens, mine in zip(soft, texts, strict=True)]
