"""`raypipe forget`: remove users from the workspace, so that nothing of them stays and no old log brings them back.

A tombstone, two hashes of the id, is published together with tables that no longer hold the user. Then everything else
that named the users is removed: nights that cannot exist without them, user cards, judgements, canaries' tables,
spills, the ledger's rows, what models keep of single users, and the files of every version that still had them. After a
kill at any point, the same command continues.

The hashes hold no secret: whoever can read `tombstones` and guesses an id can check that it was forgotten.

Some things it does not reach. Weights of models that were trained on the user's events keep traces of them until they
are trained anew. The logs themselves stay, and so does any copy outside of the workspace, such as versions that a
storage bucket keeps. If trainings that never ended keep histories in folders outside of the workspace, it names these
folders.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.config import free
from raypipe.errors import UsageError
from raypipe.pipeline.forget_nights import JOB, last_forgetting, move_nights
from raypipe.pipeline.forget_traces import Sought, forget_in_cards, forget_in_judgements
from raypipe.pipeline.forget_units import ForgetBucket
from raypipe.pipeline.forgotten import forgotten_keys, locked_traces
from raypipe.pipeline.job import cost_of, read_users
from raypipe.pipeline.online import OnlineConfig, run_online
from raypipe.pipeline.rebucket import BUCKETED
from raypipe.pipeline.training_folders import trainings_outside
from raypipe.pipeline.vacuum import remove_unfinished, remove_unneeded
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.session import Session, open_session, refuse_open_runs
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.hashing import stable_hash
from raypipe.storage.ledger import WHOLE, Publish, Receipt, Run, Unit, Usage, counts_of
from raypipe.storage.locks import check_held, hold
from raypipe.storage.model_users import forget_in_models
from raypipe.storage.night_runs import settle_all
from raypipe.storage.nights import Night, Nights
from raypipe.storage.online import ADDRESS, EMBEDDED, open_online_store
from raypipe.storage.releases import Releases
from raypipe.storage.retention import versions_to_keep
from raypipe.storage.schemas import REJECTS
from raypipe.storage.tombstones import digest, is_forgotten, tombstone_rows
from raypipe.storage.workspace import Workspace

STEP_VERSION = 1
_WRITES = (*BUCKETED, "tombstones")


class ForgetConfig(JobConfig):
    """Configuration of `forget`."""

    user: str | None = free(None, "the user's id")
    users: str | None = free(None, "file of user ids, a line each")
    store: str | None = free(None, "online store that is loaded anew without them, as of `raypipe online`")
    grace_s: float = free(10.0, "seconds until the online store drops what it had, as of `raypipe online`", ge=0)


def run_forget(config: ForgetConfig) -> JobResult:
    """Forget users; see the module.

    Raises UsageError while a run is open, or if the night in force reads older tables that hold one of the users.
    """
    started = time.monotonic()
    users = _users(config)
    workspace = config.open_workspace()
    workspace.require_info()
    # Trainings keep histories in their folders until they end.
    locks = [*_WRITES, "nights", *workspace.training_locks()]
    with open_session(workspace, JOB, locks, config.cluster, config.lock_lease_s) as session:
        refuse_open_runs(workspace, JOB)
        move_nights(workspace, last_forgetting(workspace))
        base = session.versions(*_WRITES, "rejects")
        sought = Sought(workspace, users)
        _check_night_in_force(sought, base)
        recipe = fingerprint({"step": STEP_VERSION, "users": sorted(digest(user) for user in users)})
        run = session.run(recipe, {}, base, WHOLE, {"users": len(users)})
        places = _buckets(users, session.info.buckets)
        units = [Unit("bucket", bucket) for bucket in sorted(places)]
        receipts = session.phase(run, units, partial(ForgetBucket, workspace, base, places), JOB)
        result = _publish(session, run, sought, base, list(receipts.values()), started)
        session.check_held()
        dropped = move_nights(workspace, run, sought)
        removed = _sweep(session, config, users)
    _load_anew(workspace, config)
    say(f"{JOB}: {len(users):,} users have a tombstone; {result.metrics['rows_forgotten']:,} rows of theirs are gone")
    say(f"{JOB}: models that were trained on them keep traces until they are trained anew")
    return replace(result, metrics={**result.metrics, "nights_removed": dropped, **removed})


def _users(config: ForgetConfig) -> list[str]:
    if (config.user is None) == (config.users is None):
        raise UsageError("Nobody is named, or in two ways.", "Give --user ID, or --users FILE with one id a line.")
    if config.user is not None:
        return [config.user]
    assert config.users is not None
    return read_users(config.users)


def _buckets(users: Sequence[str], buckets: int) -> dict[int, list[str]]:
    places = stable_hash(pa.array(users, pa.string())) % np.uint64(buckets)
    found: dict[int, list[str]] = {}
    for user, place in zip(users, places.tolist(), strict=True):
        found.setdefault(int(place), []).append(user)
    return found


def _check_night_in_force(sought: Sought, base: Mapping[str, int]) -> None:
    """Raise UsageError if the night in force reads older tables that hold one of the users.

    Such a night can be neither kept nor moved.
    """
    night = Nights(sought.workspace.store).current()
    if night is not None and any(
        version != base.get(name) and sought.are_in(name, version) for name, version in night.tables.items()
    ):
        raise UsageError(
            f"The night in force, of {night.date}, reads older tables than the newest, and a user who is to be forgotten is "
            "in them.",
            "Publish a night on the newest tables with `raypipe nightly`, then forget.",
        )


def _publish(
    session: Session,
    run: Run,
    sought: Sought,
    base: Mapping[str, int],
    receipts: Sequence[Receipt],
    started: float,
) -> JobResult:
    workspace = session.workspace
    tombstones, rejects = workspace.tables["tombstones"], workspace.tables["rejects"]
    parts = []
    known = is_forgotten(sought.users, tombstones.read(base["tombstones"]))
    if new := sought.users.filter(pa.array(~known)).to_pylist():
        parts.append(
            Publish("tombstones", "append", [tombstones.stage(tombstone_rows(new), f"{run.run_key[:12]}-driver")])
        )
    forgotten = counts_of(receipts).skipped.get("forgotten", 0)
    for name in BUCKETED:
        touched: dict[tuple[tuple[str, Any], ...], list[dict[str, str | int]]] = {}
        for receipt in receipts:
            for values in receipt.facts["touched"].get(name, []):
                others = tuple((key, value) for key, value in values.items() if key != "bucket")
                touched.setdefault(others, []).append(values)
        files = [file for receipt in receipts for file in receipt.staged.get(name, [])]
        for others, replaces in touched.items():
            mine = [file for file in files if dict(others).items() <= dict(file.partition).items()]
            parts.append(Publish(name, "overwrite", mine, replaces))
    for values, files in rejects.partitions(base["rejects"]):
        rows = rejects.read_files(files, REJECTS.columns.names)
        stay = sought.rejects_to_keep(rows, str(values["table"]))
        if not stay.all():
            forgotten += int((~stay).sum())
            kept = rows.filter(pa.array(stay))
            staged = [rejects.stage(kept, f"{run.run_key[:12]}-driver", values)] if kept.num_rows else []
            parts.append(Publish("rejects", "overwrite", staged, [values]))
    metrics = {"users": len(sought.users), "tombstones_added": len(new), "rows_forgotten": forgotten}
    status = "ok" if parts else "nothing_to_do"
    cost = cost_of(Usage(), time.monotonic() - started)
    result = JobResult(JOB, status, run.run_key, {part.table: {} for part in parts}, metrics=metrics, cost=cost)
    return session.publish(run, parts, result)


def _sweep(session: Session, config: ForgetConfig, users: Sequence[str]) -> dict[str, Any]:
    """Remove everything beside the tables' newest versions that may name a user. Returns counts of what was removed."""
    workspace, store = session.workspace, session.workspace.store
    session.check_held()
    nights = Nights(store)
    kept: list[Night] = [night for date in nights.dates() if (night := nights.get(date)) is not None]
    releases = Releases(store).all()
    for date in store.folders("nights"):  # those that were never published included
        forget_in_cards(store, date, users)
    with locked_traces(workspace, JOB, config.lock_lease_s):
        forget_in_judgements(store, users)
        # The users on these pages have numbers instead of ids, so that nobody can tell who is drawn.
        Evaluations(store).drop_pages()
        # Candidate sets are drawn anew when they are asked for.
        store.delete_folder("candidates")
    # For everybody who was ever forgotten, as a model may have come back from a backup.
    of_models = forget_in_models(store, forgotten_keys(workspace))
    # Canaries hold few users and are never published. What is staged is of runs that are over, or of trainings that
    # nobody runs.
    for place in trainings_outside(store):
        say(f"{JOB}: a training that has not ended keeps histories outside of the workspace; delete {place}")
    refuse_open_runs(workspace, JOB)  # a canary that began meanwhile has read tables that held them
    session.check_held()
    for folder in ("canary", "staging"):
        store.delete_folder(folder)
    settle_all(store)
    for job in store.folders("ledger"):
        ledger = workspace.ledger(job)
        for run_key in set(ledger.numbers().values()):
            if (run := ledger.run(run_key)).result() is not None:
                run.trim()
    remove_unfinished(workspace)
    files = []
    with hold(store, ["rejects"], JOB, config.lock_lease_s) as locks:
        for name, table in workspace.tables.items():
            session.check_held()  # a table of many files takes long
            check_held(locks)
            files += remove_unneeded(table, versions_to_keep(kept, releases, name), grace_hours=0)
    return {
        "files_removed": len(files),
        "bytes_freed": sum(file.size for file in files),
        "rows_of_models_removed": of_models,
    }


def _load_anew(workspace: Workspace, config: ForgetConfig) -> None:
    """Load the night in force into the online store once more, and remove all that was there before."""
    is_named = bool(config.store or os.environ.get(ADDRESS))
    if not is_named and not (workspace.store.is_local and workspace.store.local_path(EMBEDDED).exists()):
        if not workspace.store.is_local:
            say(f"{JOB}: no online store is named; where there is one, `raypipe online --keep 0` loads it without them")
        return
    shared = {name: getattr(config, name) for name in JobConfig.model_fields}
    if Nights(workspace.store).current() is not None:
        run_online(OnlineConfig(**shared, store=config.store, keep=0, grace_s=config.grace_s))
        store = open_online_store(config.store, workspace.store)
        try:
            if not store.scrub():
                say(f"{JOB}: the online store rewrites no files when it is asked; its own have them until it does")
        finally:
            store.close()
