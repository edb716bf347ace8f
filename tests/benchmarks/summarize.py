"""Summaries of real, skewed histories: our engine beside plain `model.generate`, and the job beside the bare engine.

MovieLens 1M and the workspace's own LM, greedy, float32, one thread; all blocks of the users, then all merges. Plain is what
one would write at once: prompts in the order of their users, in left-padded batches of as many rows as the longest prompt
leaves room for in the same number of tokens, each batch until its last row has ended. Both must give the same texts. The job
is one worker's work from reading its buckets to staged files, by the worker's own clock, the loading of the model included,
beside the same prompts through the engine without Ray; Ray's start and the one transaction of a night come on top.

Figures: `vs_plain_generate` and `vs_bare_engine` (medians of the rounds' ratios of generated tokens/s), `tokens_per_s` of
the engine, `calls`, `ended_share` (answers that the model ended itself).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from raypipe.data.catalogue import AttributeColumn, CatalogueColumns, CatalogueConfig
from raypipe.data.log import LogColumns, LogConfig
from raypipe.engines.engine import Decoding, Engine, EngineConfig
from raypipe.language.backbone import Backbone, load_backbone
from raypipe.language.prompt import Prompt
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from raypipe.pipeline.lm import LmConfig, run_lm
from raypipe.pipeline.summarize import SummarizeConfig, run_summarize
from raypipe.runtime.cluster import ClusterConfig
from raypipe.storage.hashing import stable_hash
from tests.prompts import block_prompts

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/ml-1m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workspace", default=str(ROOT / "build/summarize-ml-1m"), help="made where it is not")
    given = parser.parse_args()
    torch.set_num_threads(1)
    make_workspace(given.workspace)
    config = SummarizeConfig(workspace=given.workspace, tracking="off", cluster=ClusterConfig(workers=1))
    users, folder = chosen(config, given.users)
    engine, backbone = EngineConfig(lm=folder, threads=1).build(), load_backbone(folder, device="cpu")
    ratios, job_ratios, speeds = [], [], []
    for number in range(given.rounds):
        mine, texts, ended = whole(partial(by_engine, engine), config, users)
        plain, plain_texts, _ = whole(partial(by_generate, backbone, config.engine.batch_tokens), config, users)
        differing = sum(a != b for a, b in zip(texts, plain_texts, strict=True))
        assert not differing, f"{differing} of {len(texts)} texts differ"
        job = through_the_job(config, users)
        print(
            f"round {number}: engine {mine:,.0f} tokens/s, plain generate {plain:,.0f}, the job {job:,.0f}",
            file=sys.stderr,
        )
        speeds.append(mine)
        ratios.append(mine / plain)
        job_ratios.append(job / mine)
    figures = {
        "vs_plain_generate": round(statistics.median(ratios), 2),
        "vs_bare_engine": round(statistics.median(job_ratios), 3),
        "tokens_per_s": round(statistics.median(speeds)),
        "calls": len(texts),
        "ended_share": round(ended, 4),
    }
    print(
        json.dumps(
            {"bench": "summarize", "figures": figures, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
        )
    )


def make_workspace(uri: str) -> None:
    """MovieLens 1M and its LM; nothing where they are already."""
    log = LogConfig(
        path=str(DATA / "interactions.csv.gz"), columns=LogColumns(user="user_id", item="item_id", order="pos")
    )
    genre = {"genre": AttributeColumn(column="genres", separator=" ")}
    catalogue = CatalogueConfig(path=str(DATA / "items.csv.gz"), columns=CatalogueColumns(attributes=genre))
    run_ingest(IngestConfig(workspace=uri, tracking="off", log=log, catalogue=catalogue))
    run_lm(LmConfig(workspace=uri, tracking="off"))


def chosen(config: SummarizeConfig, count: int) -> tuple[list[str], str]:
    """Users by the hash of their names, and the LM's folder."""
    workspace = config.open_workspace()
    table = workspace.tables["histories"]
    names = table.read(table.version(), ["user_id"])["user_id"].combine_chunks()
    users = names.take(pa.array(np.argsort(stable_hash(names), kind="stable")[:count])).to_pylist()
    model = config.resolve_model(workspace)
    assert model is not None
    return users, str(config.fetch(workspace, model))


@dataclass(frozen=True)
class Answered:
    """The texts in the order of their prompts, the tokens generated, and how many the model ended itself."""

    texts: list[str]
    tokens: int
    ended: int


Answer = Callable[[Sequence[Prompt], Decoding], Answered]


def by_engine(engine: Engine, prompts: Sequence[Prompt], decoding: Decoding) -> Answered:
    outcomes = sorted(engine.generate(prompts, decoding), key=lambda outcome: outcome.index)
    ended = sum(outcome.finish_reason == "stop" for outcome in outcomes)
    return Answered([outcome.text for outcome in outcomes], sum(outcome.tokens_out for outcome in outcomes), ended)


@torch.inference_mode()
def by_generate(backbone: Backbone, batch_tokens: int, prompts: Sequence[Prompt], decoding: Decoding) -> Answered:
    tokenizer, model = backbone.tokenizer, backbone.model
    tokenizer.padding_side = "left"
    texts, tokens, ended = [], 0, 0
    longest = max(len(ids) for ids in tokenizer([prompt.text for prompt in prompts])["input_ids"])
    rows = max(1, batch_tokens // (longest + decoding.max_new_tokens))
    for start in range(0, len(prompts), rows):
        batch = tokenizer([prompt.text for prompt in prompts[start : start + rows]], return_tensors="pt", padding=True)
        out = model.generate(**batch, do_sample=False, max_new_tokens=decoding.max_new_tokens)
        answers = out[:, batch["input_ids"].shape[1] :]
        lengths = (~torch.isin(answers, torch.tensor([*backbone.ends, tokenizer.pad_token_id]))).sum(1)
        tokens += int(lengths.sum())
        ended += int((lengths < decoding.max_new_tokens).sum())
        texts += backbone.decode(answers.tolist())
    return Answered(texts, tokens, ended)


def whole(answer: Answer, config: SummarizeConfig, users: Sequence[str]) -> tuple[float, list[str], float]:
    """All blocks of these users and then all merges, without Ray, tables and checks: tokens/s, texts, share that ended."""
    summaries, prompts = config.summaries, config.summaries.prompts
    per_user = list(block_prompts(config, users).values())
    started = time.monotonic()
    blocks = answer([prompt for mine in per_user for prompt in mine], summaries.block_decoding)
    texts = iter(blocks.texts)
    written = [[next(texts) for _ in mine] for mine in per_user]
    merges = answer([prompts.merge_prompt(mine) for mine in written if len(mine) > 1], summaries.merge_decoding)
    seconds = time.monotonic() - started
    answers = blocks.texts + merges.texts
    return (blocks.tokens + merges.tokens) / seconds, answers, (blocks.ended + merges.ended) / len(answers)


def through_the_job(config: SummarizeConfig, users: Sequence[str]) -> float:
    """Generated tokens/s of the job on these users, by its worker's clock."""
    names = Path(config.workspace) / "benchmark-users.txt"
    names.write_text("\n".join(users) + "\n")
    canary = Path(config.workspace) / "canary"
    shutil.rmtree(canary, ignore_errors=True)
    workspace = config.open_workspace()
    workspace.store.delete_folder("ledger/summarize")
    result = run_summarize(config.model_copy(update={"users": str(names)}))
    run = workspace.ledger("summarize").run(result.run_key)
    receipts = run.receipts().values()
    return sum(receipt.usage.tokens_out for receipt in receipts) / sum(receipt.usage.seconds for receipt in receipts)


if __name__ == "__main__":
    main()
