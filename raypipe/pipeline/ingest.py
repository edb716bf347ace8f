"""`raypipe ingest`: read one log and its catalogue into `items` and `histories`, exactly once.

It has two phases of units. In the first, splits of the log become spills regrouped by user. In the second, buckets
merge their share of every spill with the old histories. Rows in = histories + rejects + filtered + duplicates +
forgotten, which is checked before anything is published.
"""

from __future__ import annotations

import time
from functools import partial

import pyarrow as pa

from raypipe.config import Config, free, shaping
from raypipe.data.catalogue import CatalogueConfig, ParsedCatalogue, read_catalogue
from raypipe.data.items import MergedItems, merge_items
from raypipe.data.log import Log, LogConfig, is_movielens, open_log
from raypipe.data.spills import estimate_users, item_table_bytes
from raypipe.errors import UsageError
from raypipe.pipeline.ingest_units import MergeBucket, SpillSplit
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.rejects import reject_rows
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.session import Session, open_session
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import digest_lanes
from raypipe.storage.ledger import WHOLE, Counts, Publish, Receipt, Run, Unit, Usage, counts_of
from raypipe.storage.night_runs import NightRuns
from raypipe.storage.workspace import Workspace, WorkspaceInfo, choose_buckets

STEP_VERSION = 3
_WRITES = ("items", "histories", "logs")


class IngestOptions(Config):
    """What is ingested, and how it is read."""

    log: LogConfig | None = shaping(None, "the interaction log; unset: read the catalogue only")
    catalogue: CatalogueConfig | None = shaping(
        None, "the items; unset: those of the workspace, or the log's own layout"
    )
    partial_catalogue: bool = shaping(False, "items the catalogue does not name stay available")
    buckets: int | None = free(None, "user buckets, decided at the first ingest; unset: about 5,000 users each", ge=4)
    max_reject_rate: float = free(0.2, "share of rejected rows above which nothing is published", ge=0, le=1)


class IngestConfig(IngestOptions, JobConfig):
    """Configuration of `ingest`."""


def run_ingest(config: IngestConfig, night: NightRuns | None = None) -> JobResult:
    """Ingest one log, as a step of `night` if there is one; see the module.

    Raises UsageError before work starts, and if more rows are rejected than allowed, as the same log would fail again.
    """
    started = time.monotonic()
    if config.buckets is not None and config.buckets & (config.buckets - 1):
        raise UsageError(f"buckets is {config.buckets}, which is no power of two.", "Use 4, 8, 16, ...")
    workspace = config.open_workspace()
    tracking = config.open_tracking(workspace)
    log = open_log(config.log) if config.log is not None else None
    if log is not None:
        workspace.check_kind(log.kind)
    catalogue = _read_catalogue(config)
    with open_session(workspace, "ingest", _WRITES, config.cluster, config.lock_lease_s, night) as session:
        base = session.versions(*_WRITES)
        if log is not None and _is_ingested(workspace, log, base["logs"]):
            say(f"ingest: {log.uri} was ingested before; skipped")
            log = None
        items = _merge_catalogue(workspace, catalogue, base["items"], config.partial_catalogue)
        if log is None and not items.differs_from(workspace.tables["items"].read(base["items"])):
            return JobResult("ingest", "nothing_to_do", cost=cost_of(Usage(), time.monotonic() - started))
        result = _ingest(config, session, log, items, catalogue.rejects if catalogue else None, base, started)
    tracking.log_run(
        "ingest",
        result.run_key,
        {"log": log.uri if log else "none"},
        {**result.metrics, "seconds": result.cost["seconds"]},
    )
    return result


def _ingest(
    config: IngestConfig,
    session: Session,
    log: Log | None,
    items: MergedItems,
    item_rejects: pa.Table | None,
    base: dict[str, int],
    started: float,
) -> JobResult:
    workspace = session.workspace
    recipe = fingerprint(
        {
            "step": STEP_VERSION,
            "config": config.shaping_values(),
            "log": log.checksum if log else None,
            # Receipts are found by the number of a split. If the splits change, the same number stands for other rows.
            "splits": [[split.name, split.start, split.end] for split in log.splits] if log else None,
            "items": fingerprint({"hashes": items.rows["content_hash"].to_pylist()}),
        }
    )
    pins = session.versions("tombstones")
    run = session.run(recipe, pins, base, WHOLE, {"log": log.uri if log else None, "kind": log.kind if log else None})
    workspace.store.put(
        f"{run.staging}/items.arrow",
        item_table_bytes(items.rows["item_id"].combine_chunks(), digest_lanes(items.rows["content_hash"])),
    )
    info = workspace.info()
    spilled: dict[Unit, Receipt] = {}
    if log is not None:
        units = [Unit("split", index) for index in range(len(log.splits))]
        work = partial(
            SpillSplit, workspace, run, log.splits, pins["tombstones"], groups=info.buckets if info else config.buckets
        )
        spilled = session.phase(run, units, work, "ingest, reading the log")
        _check_rejects(spilled, config.max_reject_rate, log)
        info = info or _decide(workspace, log, spilled, config.buckets)
    merged: dict[Unit, Receipt] = {}
    if info is not None and (spilled or items.changed):
        units = [Unit("bucket", index) for index in range(info.buckets)]
        spills = [receipt.facts["spill"] for receipt in spilled.values()]
        work_on = partial(MergeBucket, workspace, run, base["histories"], spills, info, rekey=items.changed > 0)
        merged = session.phase(run, units, work_on, "ingest, merging histories")
    return _publish(session, run, log, items, item_rejects, spilled, merged, info, started)


def _publish(
    session: Session,
    run: Run,
    log: Log | None,
    items: MergedItems,
    item_rejects: pa.Table | None,
    spilled: dict[Unit, Receipt],
    merged: dict[Unit, Receipt],
    info: WorkspaceInfo | None,
    started: float,
) -> JobResult:
    tables = session.workspace.tables
    read = counts_of(spilled.values())
    placed = counts_of(merged.values())
    assert read.ok == placed.rows_in, f"{read.ok} events were spilled and {placed.rows_in} merged"
    name = f"{run.run_key[:12]}-driver"
    bad_items = reject_rows(run.run_key, item_rejects) if item_rejects is not None else None
    rejects = [file for receipt in spilled.values() for file in receipt.staged.get("rejects", [])]
    if bad_items is not None and bad_items.num_rows:
        rejects.append(tables["rejects"].stage(bad_items, name, {"table": "items"}))
    buckets = [receipt for receipt in merged.values() if receipt.staged]
    histories = [file for receipt in buckets for file in receipt.staged["histories"]]
    parts = []
    if rejects:
        parts.append(Publish("rejects", "append", rejects))
    if items.differs_from(tables["items"].read(run.manifest["base"]["items"])):
        parts.append(Publish("items", "overwrite", [tables["items"].stage(items.rows, name)]))
    if histories:
        replaces = [{"bucket": receipt.unit.index} for receipt in buckets]
        parts.append(Publish("histories", "overwrite", histories, replaces))
    if log is not None:
        parts.append(Publish("logs", "append", [tables["logs"].stage(_log_row(log, run.number, read, placed), name)]))
    users = sum(receipt.facts["users"] for receipt in merged.values())
    metrics = {
        "rows_in": read.rows_in,
        "events_added": placed.ok,
        "users": users,
        "users_changed": sum(receipt.facts["changed"] for receipt in merged.values()),
        "items": items.rows.num_rows,
        "items_added": items.added,
        "items_changed": items.changed,
        "items_unavailable": items.unavailable,
        "rejected": read.rejected + (bad_items.num_rows if bad_items is not None else 0),
        **(read + placed).skipped,
        "bytes_written": sum(file.size for part in parts for file in part.files),
    }
    rows = {"items": items.rows.num_rows, "histories": users, "rejects": metrics["rejected"]}
    shown = {part.table: {"rows": rows.get(part.table, 1), "rejected": read.rejected} for part in parts}
    result = JobResult(
        "ingest", "ok", run.run_key, shown, metrics=metrics, cost=cost_of(Usage(), time.monotonic() - started)
    )
    return session.publish(run, parts, result)


def _read_catalogue(config: IngestConfig) -> ParsedCatalogue | None:
    if config.catalogue is not None:
        return read_catalogue(config.catalogue)
    if config.log is not None and is_movielens(config.log):
        return read_catalogue(CatalogueConfig(path=config.log.path, format="movielens"))
    return None


def _merge_catalogue(
    workspace: Workspace, catalogue: ParsedCatalogue | None, version: int, partial_catalogue: bool
) -> MergedItems:
    old = workspace.tables["items"].read(version)
    if catalogue is not None:
        return merge_items(old, catalogue.items, partial=partial_catalogue)
    if old.num_rows == 0:
        raise UsageError(
            "The workspace has no items yet, and no catalogue was named.",
            "Add --catalogue.path FILE with at least the columns item_id and title.",
        )
    return MergedItems(old.sort_by("index"), 0, 0, 0)


def _is_ingested(workspace: Workspace, log: Log, version: int) -> bool:
    return log.checksum in set(workspace.tables["logs"].read(version, ["checksum"])["checksum"].to_pylist())


def _decide(workspace: Workspace, log: Log, spilled: dict[Unit, Receipt], buckets: int | None) -> WorkspaceInfo:
    users = estimate_users([receipt.facts["sketch"] for receipt in spilled.values()])
    return workspace.decide(log.kind, buckets or choose_buckets(users))


def _check_rejects(spilled: dict[Unit, Receipt], allowed: float, log: Log) -> None:
    total = counts_of(spilled.values())
    if total.rejected <= allowed * total.rows_in:
        return
    reasons: dict[str, int] = {}
    for receipt in spilled.values():
        for reason, count in receipt.facts["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    worst = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    example = next(receipt.facts["example"] for receipt in spilled.values() if receipt.facts["example"])
    raise UsageError(
        f"{total.rejected:,} of {total.rows_in:,} rows of {log.uri} cannot be used ({worst}); for example: {example}.",
        "Nothing was published. Check the column mapping, the time unit and that the catalogue belongs to this log; "
        f"to publish all the same, raise --max_reject_rate above {total.rejected / total.rows_in:.2f}.",
    )


def _log_row(log: Log, number: int, read: Counts, placed: Counts) -> pa.Table:
    return pa.table(
        {
            "uri": [log.uri],
            "checksum": [log.checksum],
            "ingest": [number],
            "rows_in": [read.rows_in],
            "rows_ok": [placed.ok],
            "rows_rejected": [read.rejected],
            "rows_duplicate": [placed.skipped.get("duplicate", 0)],
            "rows_filtered": [read.skipped.get("filtered", 0)],
            "rows_forgotten": [read.skipped.get("forgotten", 0)],
        }
    )
