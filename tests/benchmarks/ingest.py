"""Ingest beside Polars: the same Parquet log into per-user histories, alternating in one run.

Both read the log and the catalogue, replace item ids by indices, order every user's events by time, drop repeated ones
and write the same columns (text ids; lists of items, times, order within equal times, weights) as bucketed Parquet. Ours
adds what a night needs: keys, counts, ledger, spills, a Delta transaction; Ray is started before the clock. Polars runs
in a process of its own, so that its peak memory is its own.

Figures: `ratio_to_polars` (median of the rounds' ratios), `worker_peak_mb` (largest resident set of any Ray worker),
`polars_peak_mb`, `growth` (exponent of our seconds from a tenth of the events to all), `events_per_s`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
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
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from tests.benchmarks.peak import Peak

ITEMS = 20_000
EVENTS_PER_USER = 100
BUCKETS_OF = 5_000
CHUNK = 1_000_000

POLARS = """
import sys, time
import polars as pl
log, items, out, buckets = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
started = time.monotonic()
catalogue = pl.scan_csv(items).with_row_index("index", offset=1).select("item_id", pl.col("index").cast(pl.Int32))
histories = (
    pl.scan_parquet(log)
    .with_columns(pl.col("user_id").cast(pl.String), pl.lit(1.0, pl.Float32).alias("weight"))
    .with_row_index("row")
    .join(catalogue, on="item_id", how="inner")
    .unique(["user_id", "item_id", "time"], keep="first")
    .sort("user_id", "time", "row")
    .with_columns(place=pl.int_range(pl.len(), dtype=pl.Int64))
    .with_columns(
        tie=pl.when((pl.col("user_id") != pl.col("user_id").shift()) | (pl.col("time") != pl.col("time").shift()))
        .then(pl.col("place")).forward_fill().fill_null(0)
    )
    .with_columns(seq=(pl.col("place") - pl.col("tie")).cast(pl.Int32))
    .group_by("user_id", maintain_order=True)
    .agg("index", "time", "seq", "weight")
    .with_columns((pl.col("user_id").hash(0) % buckets).alias("bucket"))
)
histories.sink_parquet(pl.PartitionBy(out, key="bucket"), mkdir=True)
seconds = time.monotonic() - started
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="where logs are made and kept; unset: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        small, large = (make_log(folder, events) for events in (arguments.events // 10, arguments.events))
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
        ours(make_log(folder, 10_000), Path(scratch) / "warm-up", 10_000)
        ratios, seconds, peaks, polars_peaks = [], [], [], []
        for number in range(arguments.rounds):
            mine, peak = ours(large, Path(scratch) / f"ours-{number}", arguments.events)
            theirs, polars_peak = polars(large, Path(scratch) / f"polars-{number}", arguments.events)
            print(f"round {number}: raypipe {mine:.1f} s, Polars {theirs:.1f} s", file=sys.stderr)
            ratios.append(mine / theirs)
            seconds.append(mine)
            peaks.append(peak)
            polars_peaks.append(polars_peak)
        tenth = min(ours(small, Path(scratch) / f"small-{n}", arguments.events // 10)[0] for n in range(2))
        ray.shutdown()
    figures = {
        "ratio_to_polars": round(statistics.median(ratios), 3),
        "worker_peak_mb": round(max(peaks)),
        "polars_peak_mb": round(max(polars_peaks)),
        "growth": round(math.log10(min(seconds) / tenth), 3),
        "events_per_s": round(arguments.events / min(seconds)),
        "seconds": round(min(seconds), 1),
        "seconds_tenth": round(tenth, 1),
    }
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}"
    print(json.dumps({"bench": "ingest", "figures": figures, "machine": machine}))


def make_log(folder: Path, events: int) -> Path:
    """A log in time order whose users come in no order at all; made once per size."""
    path = folder / f"log-{events}.parquet"
    items = folder / "items.csv"
    if not items.exists():
        folder.mkdir(parents=True, exist_ok=True)
        items.write_text("item_id,title\n" + "".join(f"{1000 + i},Title {i}\n" for i in range(ITEMS)))
    if path.exists():
        return path
    rng = np.random.default_rng(events)
    users = max(1, events // EVENTS_PER_USER)
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("time", pa.int64())])
    with pq.ParquetWriter(path.with_suffix(".part"), schema, compression="zstd") as writer:
        for start in range(0, events, CHUNK):
            count = min(CHUNK, events - start)
            # Squaring skews both: some users and items are far busier than others.
            user = (users * rng.random(count) ** 2).astype(np.int64)
            item = 1000 + (ITEMS * rng.random(count) ** 3).astype(np.int64)
            moment = 1_600_000_000_000 + 1000 * (start + np.arange(count))
            writer.write_table(pa.table([user, item, moment], schema=schema))
    path.with_suffix(".part").rename(path)
    return path


def ours(log: Path, workspace: Path, events: int) -> tuple[float, float]:
    """Seconds, and the largest resident set of any worker in MiB."""
    config = IngestConfig(
        workspace=str(workspace),
        tracking="off",
        log=LogConfig(path=str(log), columns=LogColumns(time="time")),
        catalogue=CatalogueConfig(path=str(log.with_name("items.csv"))),
    )
    with (peak := Peak()):
        started = time.monotonic()
        result = run_ingest(config)
        seconds = time.monotonic() - started
    assert result.metrics["rows_in"] == events, result.metrics
    return seconds, peak.mib


def polars(log: Path, out: Path, events: int) -> tuple[float, float]:
    """Seconds, and the process's own peak in MiB."""
    buckets = max(4, 2 ** math.ceil(math.log2(max(1, events // EVENTS_PER_USER // BUCKETS_OF))))
    command = [sys.executable, "-c", POLARS, str(log), str(log.with_name("items.csv")), str(out), str(buckets)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(peak)


if __name__ == "__main__":
    main()
