"""`extract` beside a bare torch loop over the same histories, alternating in one run, and its memory as users grow.

Both encode every user of generated Parquet histories with the same untrained SASRec, one thread. The loop is what one
would write at once: histories read and batched in order of length beforehand, before its clock; states into an array.
Ours is the work of one worker from reading its bucket to the staged, checksummed Parquet file, by the workers' own clocks:
starting Ray and the one Delta transaction come once a night, whatever the users.

Figures: `vs_bare_loop` (median of the rounds' ratios of users/s per worker), `worker_peak_mb`, `worker_peak_mb_compared` and
`worker_peak_mb_few` (largest resident set of a worker with all users, with those of the rounds and with a hundredth; what was
freed, up to 256 MB, stays at hand between buckets), `users_per_s` (of the whole command with all users, by the wall).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.data.catalogue import CatalogueConfig
from raypipe.data.log import LogColumns, LogConfig
from raypipe.pipeline.extract import ExtractConfig, run_extract
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from raypipe.recommenders.config import RecommenderConfig
from raypipe.runtime.cluster import ClusterConfig
from raypipe.storage.workspace import Workspace
from tests.benchmarks.peak import Peak
from tests.untrained import store_untrained

ITEMS, WIDTH, LENGTH = 10_000, 64, 50
CHUNK = 50_000  # users written at a time

BARE = """
import sys, time
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.dataset as ds, torch
from raypipe.recommenders.checkpoint import load_recommender
from raypipe.recommenders.sequences import Sequences
torch.set_num_threads(1)
model, _ = load_recommender(Path(sys.argv[2]))
rows = ds.dataset(sys.argv[1], format="parquet", partitioning="hive").to_table(columns=["items"])
lists = rows["items"].combine_chunks()
values, ends = lists.flatten().to_numpy(), np.asarray(lists.offsets)[1:]
starts = np.maximum(ends - model.max_length, np.asarray(lists.offsets)[:-1])
order = np.argsort(ends - starts, kind="stable")
batches = []
for chosen in np.array_split(order, max(1, len(order) // 400)):
    lengths = ends[chosen] - starts[chosen]
    index = np.concatenate([np.arange(a, b) for a, b in zip(starts[chosen], ends[chosen])])
    batches.append((torch.from_numpy(values[index].astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))))
states = np.empty((len(order), model.width), np.float32)
at = 0
with torch.inference_mode():
    model.encode(Sequences(*batches[0]))
    started = time.monotonic()
    for items, lengths in batches:
        states[at : at + len(lengths)] = model.encode(Sequences(items, lengths)).numpy()
        at += len(lengths)
print(len(order) / (time.monotonic() - started))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--compared", type=int, default=100_000, help="users of the rounds beside the bare loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where workspaces are made; unset: a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        few, compared, all_users = (
            make_workspace(folder, users) for users in (given.users // 100, given.compared, given.users)
        )
        ratios, peaks = [], []
        for number in range(given.rounds):
            mine, _, peak_compared = ours(compared, workers=1)
            bare = bare_loop(compared)
            print(f"round {number}: raypipe {mine:,.0f} users/s a worker, bare loop {bare:,.0f}", file=sys.stderr)
            ratios.append(mine / bare)
            peaks.append(peak_compared)
        _, _, peak_few = ours(few, workers=2)
        _, seconds, peak = ours(all_users, workers=2)
    figures = {
        "vs_bare_loop": round(statistics.median(ratios), 3),
        "worker_peak_mb": round(peak),
        "worker_peak_mb_compared": round(max(peaks)),
        "worker_peak_mb_few": round(peak_few),
        "users_per_s": round(given.users / seconds),
    }
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    print(json.dumps({"bench": "extract", "figures": figures, "machine": machine}))


def make_workspace(folder: Path, users: int) -> Path:
    """Histories of 5 to 100 events, and an untrained SASRec; made once per size."""
    path = folder / f"users-{users}"
    if path.exists():
        return path
    log, items = folder / f"log-{users}.parquet", folder / "items.csv"
    folder.mkdir(parents=True, exist_ok=True)
    items.write_text("item_id,title\n" + "".join(f"{item},Title {item}\n" for item in range(ITEMS)))
    rng = np.random.default_rng(users)
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("time", pa.int64())])
    with pq.ParquetWriter(log, schema, compression="zstd") as writer:
        for start in range(0, users, CHUNK):
            count = min(CHUNK, users - start)
            lengths = np.clip(rng.lognormal(np.log(15), 0.8, count), 5, 100).astype(np.int64)
            user = np.repeat(start + np.arange(count), lengths)
            item = (ITEMS * rng.random(len(user)) ** 3).astype(np.int64)
            moment = 1_600_000_000_000 + 1000 * np.arange(len(user))
            writer.write_table(pa.table([user, item, moment], schema=schema))
    staging = path.with_suffix(".part")
    shutil.rmtree(staging, ignore_errors=True)
    run_ingest(
        IngestConfig(
            workspace=str(staging),
            tracking="off",
            log=LogConfig(path=str(log), columns=LogColumns(time="time")),
            catalogue=CatalogueConfig(path=str(items)),
        )
    )
    store_untrained(str(staging), RecommenderConfig(width=WIDTH, max_length=LENGTH, hidden=4 * WIDTH))
    staging.rename(path)
    return path


def ours(base: Path, workers: int) -> tuple[float, float, float]:
    """Users/s of one worker by the workers' clocks, seconds by the wall, and the largest worker in MiB."""
    import ray

    # A Ray of its own for each run: its workers' peaks are theirs.
    ray.shutdown()
    copy = base.with_name("extracted")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy)
    config = ExtractConfig(workspace=str(copy), tracking="off", cluster=ClusterConfig(workers=workers))
    with (peak := Peak()):
        started = time.monotonic()
        result = run_extract(config)
        seconds = time.monotonic() - started
    run = Workspace(str(copy)).ledger("extract").run(result.run_key)
    spent = sum(receipt.usage.seconds for receipt in run.receipts().values())
    assert result.metrics["computed"] == result.metrics["users"], result.metrics
    shutil.rmtree(copy)
    return result.metrics["users"] / spent, seconds, peak.mib


def bare_loop(workspace: Path) -> float:
    """Users per second, in a process of its own."""
    (model,) = (workspace / "models/sasrec").iterdir()
    command = [sys.executable, "-c", BARE, str(workspace / "tables/histories"), str(model / "checkpoint")]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
