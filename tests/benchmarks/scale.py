"""What a whole night costs beside its models: ingest, states, lists, summaries by `echo`, night manifest, cards.

The users are synthetic, of 20 events each in the mean (log-normal), over 10,000 items; the recommender in force is an
untrained SASRec. Counted is the processor time, user and system, of the night's process and of all of Ray's, start-up
included. What models do is timed by itself in one process, on one thread, and taken off: encoding all histories and
finding the best items for them, twice the one and once the other, as `model_us_per_user`; the answers of `echo`, which
stands for a language model here, to the prompts of some users as `engine_us_per_user`.

Figures: `cpu_us_per_user`, `model_us_per_user`, `engine_us_per_user`, `worker_peak_mb` (largest resident set of a worker),
`bytes_per_user` (written to tables), `growth` (exponent of the seconds of processor time, models taken off, from a tenth of
the users to all), and `night_s`, seconds of the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raypipe.data.catalogue import CatalogueConfig
from raypipe.data.log import LogColumns, LogConfig
from raypipe.data.synthetic import SyntheticConfig
from raypipe.engines.engine import EngineConfig
from raypipe.pipeline.ingest import IngestConfig, IngestOptions, run_ingest
from raypipe.pipeline.nightly import NightlyConfig, run_nightly
from raypipe.pipeline.recommend import RecommendOptions
from raypipe.pipeline.summarize import SummarizeConfig, SummarizeOptions
from raypipe.recommenders.config import RecommenderConfig
from raypipe.runtime.cluster import ClusterConfig
from raypipe.storage.releases import Release, Releases
from raypipe.storage.workspace import Workspace
from tests.benchmarks.peak import Peak
from tests.benchmarks.processor_time import ProcessorTime
from tests.prompts import block_prompts
from tests.untrained import store_untrained

ITEMS, EVENTS_PER_USER, WIDTH, LENGTH, LIST = 10_000, 20, 64, 50, 10
ASKED = 20_000  # users whose prompts the engine alone answers

MODEL = """
import sys, time
from pathlib import Path
import pyarrow.dataset as ds, numpy as np, torch
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.ranking import batches_by_length, sequences_of
from raypipe.recommenders.scoring import Filters, top_k
from raypipe.recommenders.windows import Histories
torch.set_num_threads(1)
model, _ = load_recommender(Path(sys.argv[2]))
lists = ds.dataset(sys.argv[1], format="parquet", partitioning="hive").to_table(columns=["items"])["items"].combine_chunks()
histories = Histories(lists.flatten().to_numpy(), np.asarray(lists.offsets)[1:].astype(np.int64))
spent = 0.0
with torch.inference_mode():
    for rows in batches_by_length(histories, model.max_length):
        recent, seen = sequences_of(histories, rows, model.max_length), sequences_of(histories, rows)
        started = time.process_time()
        for _ in range(2):
            states = model.encode(recent)
        top_k(states, model.item_states(), int(sys.argv[3]), Filters(excluded=seen))
        spent += time.process_time() - started
print(spent)
"""


@dataclass(frozen=True)
class Measured:
    """One night: processor seconds of all, of its models and of its engine alone, bytes written, and seconds of the wall."""

    users: int
    spent: float
    models: float
    engine: float
    peak_mib: float
    written: int
    seconds: float

    @property
    def beside(self) -> float:
        return self.spent - self.models - self.engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where logs are made and kept; unset: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        tenth, whole = (measure(folder, users) for users in (given.users // 10, given.users))
    figures = {
        "cpu_us_per_user": round(1e6 * whole.beside / whole.users, 1),
        "cpu_us_per_user_tenth": round(1e6 * tenth.beside / tenth.users, 1),
        "model_us_per_user": round(1e6 * whole.models / whole.users, 1),
        "engine_us_per_user": round(1e6 * whole.engine / whole.users, 1),
        "worker_peak_mb": round(whole.peak_mib),
        "bytes_per_user": round(whole.written / whole.users),
        "growth": round(math.log10(whole.beside / tenth.beside), 3),
        "night_s": round(whole.seconds, 1),
    }
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    print(json.dumps({"bench": "scale", "figures": figures, "machine": machine}))


def measure(folder: Path, users: int) -> Measured:
    """The first night over a log of so many users, in a workspace that has a recommender in force."""
    import ray

    data = folder / f"night-{users}"
    if not (data / "items.csv").exists():
        SyntheticConfig(users=users, items=ITEMS, events=EVENTS_PER_USER * users).write(data)
    # A Ray of its own for each night: its start is part of the cost, its workers' peaks are the night's.
    ray.shutdown()
    uri = folder / f"workspace-{users}"
    shutil.rmtree(uri, ignore_errors=True)
    catalogue = CatalogueConfig(path=str(data / "items.csv"))
    run_ingest(IngestConfig(workspace=str(uri), tracking="off", catalogue=catalogue))
    model = store_untrained(str(uri), RecommenderConfig(width=WIDTH, max_length=LENGTH, hidden=4 * WIDTH))
    workspace = Workspace(str(uri))
    releases = Releases(workspace.store)
    champion = Release(recommender=f"{model.name}/{model.hash}", catalogue=workspace.tables["items"].version())
    releases.point("champion", releases.add(champion))
    config = NightlyConfig(
        workspace=str(uri),
        tracking="off",
        ingest=IngestOptions(
            log=LogConfig(path=str(data / "log.parquet"), columns=LogColumns(time="time")), catalogue=catalogue
        ),
        recommend=RecommendOptions(length=LIST),
        summarize=SummarizeOptions(engine=EngineConfig(engine="echo")),
        # One worker: two on the two threads of one core would take each other for processor time.
        cluster=ClusterConfig(workers=1),
    )
    with (peak := Peak()), (spent := ProcessorTime()):
        started = time.monotonic()
        result = run_nightly(config)
        seconds = time.monotonic() - started
    figures: dict[str, Any] = result.metrics
    assert result.status == "ok", result
    assert figures["summarize.computed"] == figures["recommend.computed"] == users, figures
    ray.shutdown()
    written = sum(size for name, size in figures.items() if name.endswith("bytes_written"))
    models, engine = forward_seconds(uri), users * engine_seconds(str(uri), min(users, ASKED))
    print(
        f"{users:,} users: {spent.seconds:.0f} s of processor time, {models:.0f} s of models, {engine:.0f} s of the engine",
        file=sys.stderr,
    )
    return Measured(users, spent.seconds, models, engine, peak.mib, written, seconds)


def forward_seconds(workspace: Path) -> float:
    """Processor seconds of the models' work alone."""
    (model,) = (workspace / "models/sasrec").iterdir()
    command = [sys.executable, "-c", MODEL, str(workspace / "tables/histories"), str(model / "checkpoint"), str(LIST)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def engine_seconds(workspace: str, asked: int) -> float:
    """Processor seconds a user of the engine's answers to all block prompts and merges, in the mean over `asked` users."""
    config = SummarizeConfig(workspace=workspace, tracking="off", engine=EngineConfig(engine="echo"))
    opened = config.open_workspace()
    table = opened.tables["histories"]
    users = table.read(table.version(), ["user_id"])["user_id"].slice(0, asked).to_pylist()
    per_user = list(block_prompts(config, users).values())
    engine, summaries = config.engine.build(), config.summaries
    blocks = [prompt for mine in per_user for prompt in mine]
    started = time.process_time()
    texts = [outcome.text for outcome in engine.generate(blocks, summaries.block_decoding)]
    spent = time.process_time() - started
    written = iter(texts)
    merges = [
        summaries.prompts.merge_prompt(mine)
        for mine in ([next(written) for _ in prompts] for prompts in per_user)
        if len(mine) > 1
    ]
    started = time.process_time()
    for _ in engine.generate(merges, summaries.merge_decoding):
        pass
    return (spent + time.process_time() - started) / asked


if __name__ == "__main__":
    main()
